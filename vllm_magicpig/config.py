"""The options of `--additional-config '{"magicpig": {...}}'`: parsed once, strictly, then frozen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DENSE_LAYER_STRIDE = 16
"""Default dense layers: 0, 16, 32, ... as in the paper's Llama-3.1-8B set-up (section 5)."""

DEFAULT_INDEX = "signatures"

COMPILE_KEY = "magicpig_compile_key"
"""Of additional_config, beside the user's "magicpig": what compile_key.py puts there."""

CENTERS_WITHOUT_FILE = ("passage", "none")


@dataclass(frozen=True)
class MagicPigOptions:
    """One field per option; the README's table is the user's view of it.

    index: "buckets" (the paper's) or "signatures".

    Of buckets alone: K: bits per table, 0 = exact attention, under either index; L: tables;
    min_matches: tables in which a sampled token must match; rows: at most this fraction of the middle
    is sampled, best matches first, None = all that match (the paper's sample); center: "passage",
    "none" or the path of a calibration file.

    Of signatures alone: bits: of a dimension of a key; row_budget: at most this fraction of the
    middle's rows is read for all query heads of a kv head together.

    Of both: dense_layers: absolute layer indices that keep the platform's own backend, None = every
    16th; sink_tokens, window_tokens: always attended; exact_below: a shorter middle is attended exactly
    (tokens); threads: of the decode kernel, None = the physical cores that this process may use; seed:
    of all that is random; isa: instruction set of the kernels; host_kv_cache_gib: size of the pinned
    host pool (CUDA only); check_host_memory: refuse one that exceeds the free RAM.
    """

    index: str = DEFAULT_INDEX
    K: int = 10
    L: int = 150
    min_matches: int = 2
    rows: float | None = None
    bits: int = 2
    row_budget: float = 0.02
    dense_layers: tuple[int, ...] | None = None
    sink_tokens: int = 4
    window_tokens: int = 64
    exact_below: int = 2048
    threads: int | None = None
    seed: int = 0
    center: str = "passage"
    isa: str = "auto"
    host_kv_cache_gib: float | None = None
    check_host_memory: bool = True

    @property
    def is_exact(self) -> bool:
        """K = 0: no index at all, exact attention over the same pages."""
        return self.K == 0

    @property
    def num_tables(self) -> int:
        """Tables whose codes the pages hold and whose buckets are built; 0 without buckets."""
        return self.L if self.has_buckets else 0

    @property
    def has_buckets(self) -> bool:
        """Whether tokens are sampled by the paper's hash tables."""
        return self.index == "buckets" and not self.is_exact

    @property
    def has_signatures(self) -> bool:
        """Whether tokens are sampled by what their signatures predict."""
        return self.index == "signatures" and not self.is_exact

    @property
    def signature_bits(self) -> int:
        """Bits of a dimension whose pool lies beside the pages; 0 without signatures."""
        return self.bits if self.has_signatures else 0

    @property
    def center_file(self) -> str | None:
        """Path of the calibration file, None for the other ways to a centre."""
        return None if self.center in CENTERS_WITHOUT_FILE else self.center

    def is_dense(self, layer_index: int) -> bool:
        if self.dense_layers is None:
            return layer_index % DENSE_LAYER_STRIDE == 0
        return layer_index in self.dense_layers

    def samples(self, num_tokens: int) -> bool:
        """Whether a decode step over num_tokens tokens has a middle long enough to be sampled."""
        middle = num_tokens - self.sink_tokens - self.window_tokens
        return not self.is_exact and middle >= max(self.exact_below, 1)


_INT_RANGES = {
    "K": (0, 15, "0 for exact attention or 2 to 15 bits per table"),
    "L": (1, 255, "1 to 255 tables"),
    "min_matches": (1, 255, "1 to L tables"),
    "sink_tokens": (0, 1 << 20, "0 to 1048576 tokens"),
    "window_tokens": (1, 1 << 20, "1 to 1048576 tokens"),
    "exact_below": (0, 1 << 30, "0 to 1073741824 tokens"),
    "seed": (0, (1 << 63) - 1, "0 to 2**63 - 1"),
}
_OF_INDEX = {
    "buckets": ("K", "L", "min_matches", "rows", "center"),
    "signatures": ("bits", "row_budget"),
}
"""Options that the other index does not know; K = 0 is for both."""
INDEXES = tuple(_OF_INDEX)
_BITS = (1, 2, 4)
_ISAS = ("auto", "avx512_vpopcnt", "avx512", "avx2", "portable")


def has_options(additional_config: Any) -> bool:
    return isinstance(additional_config, Mapping) and "magicpig" in additional_config


def parse_options(additional_config: Any) -> MagicPigOptions:
    """MagicPigOptions from vLLM's additional_config; raises ValueError in one sentence."""
    if additional_config is None or not isinstance(additional_config, Mapping):
        return MagicPigOptions()
    if "magicpig" not in additional_config:
        _check_no_near_miss(additional_config)
    given = additional_config.get("magicpig", {})
    if not isinstance(given, Mapping):
        raise ValueError(
            f'additional_config["magicpig"] is {given!r}, but must be an object of options such as '
            '{"K": 10}; pass --additional-config \'{"magicpig": {...}}\'.'
        )
    known = [field.name for field in fields(MagicPigOptions)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it."
            raise ValueError(
                f"magicpig option {name!r} is unknown; allowed are {', '.join(known)}; {hint}"
            )
    options = MagicPigOptions(**{name: _checked(name, value) for name, value in given.items()})
    _check_index(options.index, given)
    _check_together(options)
    return options


def _check_no_near_miss(additional_config: Mapping[Any, Any]) -> None:
    """Raises ValueError where options were meant but not found; other plugins' keys are theirs."""
    known = [field.name for field in fields(MagicPigOptions)]
    for key in additional_config.keys() - {COMPILE_KEY}:
        letters = "".join(filter(str.isalpha, str(key).lower()))
        if "magicpig" in letters or difflib.get_close_matches(letters, ["magicpig"], cutoff=0.8):
            raise ValueError(
                f'additional_config has {key!r} and no "magicpig", under which magicpig looks for its '
                'options; rename it to "magicpig".'
            )
        if key in known:
            raise ValueError(
                f"additional_config has magicpig option {key!r} at its top, but it must be in an "
                'object under "magicpig"; pass --additional-config \'{"magicpig": {...}}\'.'
            )


def _check_index(index: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that was given and belongs to another index than this."""
    for other, names in _OF_INDEX.items():
        for name in names:
            if other == index or name not in given or (name == "K" and given["K"] == 0):
                continue
            raise ValueError(
                f'magicpig option {name} is {given[name]!r}, but belongs to index "{other}" and the '
                f'index is "{index}"; remove {name}, or set index to "{other}" in --additional-config.'
            )


def _check_together(options: MagicPigOptions) -> None:
    """Raises ValueError for options that are right by themselves only."""
    if not options.check_host_memory and options.host_kv_cache_gib is None:
        raise _wrong(
            "check_host_memory",
            False,
            "true where host_kv_cache_gib is null, which is a share of the free RAM",
        )
    if options.min_matches > options.L:
        raise _wrong("min_matches", options.min_matches, f"1 to L = {options.L} tables")


def _checked(name: str, value: Any) -> Any:
    if name in _INT_RANGES:
        low, high, allowed = _INT_RANGES[name]
        checked = _integer(name, value, low, high, allowed)
        if name == "K" and checked == 1:
            raise _wrong(name, value, allowed)
        return checked
    if name == "threads":
        allowed = "1 to the number of physical cores, or null"
        return None if value is None else _integer(name, value, 1, 1 << 16, allowed)
    if name == "dense_layers":
        return _dense_layers(value)
    if name in ("isa", "index"):
        choices = _ISAS if name == "isa" else INDEXES
        if value not in choices:
            raise _wrong(name, value, f"one of {', '.join(choices)}")
        return value
    if name == "bits":
        if isinstance(value, bool) or not isinstance(value, int) or value not in _BITS:
            raise _wrong(name, value, "1, 2 or 4 bits a dimension")
        return value
    if name == "rows":
        allowed = "a fraction of the middle above 0 and up to 1, or null"
        return None if value is None else _fraction(name, value, allowed)
    if name == "row_budget":
        return _fraction(name, value, "a fraction of the middle above 0 and up to 1")
    if name == "center":
        return _center(value)
    if name == "check_host_memory":
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value
    assert name == "host_kv_cache_gib"
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 20:
        raise _wrong(name, value, "a positive number of GiB, or null")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int, allowed: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(name, value, allowed)
    return value


def _fraction(name: str, value: Any, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise _wrong(name, value, allowed)
    return float(value)


def _dense_layers(value: Any) -> tuple[int, ...] | None:
    allowed = "a list of layer indices from 0 up, such as [0, 16], [] for none, or null"
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise _wrong("dense_layers", value, allowed)
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
        raise _wrong("dense_layers", value, allowed)
    return tuple(sorted(set(value)))


def _center(value: Any) -> str:
    allowed = '"passage", "none" or the path of a calibration file'
    if value == "first_prompt":
        raise _wrong(
            "center",
            value,
            f'{allowed}, since requests no longer fix it and "passage" takes its place',
        )
    if not isinstance(value, str) or not value:
        raise _wrong("center", value, allowed)
    if value not in CENTERS_WITHOUT_FILE and not Path(value).is_file():
        raise _wrong("center", value, f"{allowed}, and there is no such file")
    return value


def _wrong(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"magicpig option {name} is {value!r}, but must be {allowed}; correct it in "
        "--additional-config."
    )
