"""The options of `--additional-config '{"magicpig": {...}}'`: parsed once, strictly, then frozen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DENSE_LAYER_STRIDE = 16
"""Default dense layers: 0, 16, 32, ... as in the paper's Llama-3.1-8B set-up (section 5)."""


@dataclass(frozen=True)
class MagicPigOptions:
    """One field per option; the README's table is the user's view of it.

    K: bits per table, 0 = exact attention; L: tables; min_matches: tables in which a sampled token
    must match; dense_layers: absolute layer indices that keep the platform's own backend, None =
    every 16th; sink_tokens, window_tokens: always attended; exact_below: a shorter middle is
    attended exactly (tokens); threads: of the decode kernel, None = the physical cores that this
    process may use; seed: of the hyperplanes; center: "first_prompt", "none" or the path of a
    calibration file; isa: instruction set of the kernels; host_kv_cache_gib: size of the pinned
    host pool (CUDA only).
    """

    K: int = 10
    L: int = 150
    min_matches: int = 2
    dense_layers: tuple[int, ...] | None = None
    sink_tokens: int = 4
    window_tokens: int = 64
    exact_below: int = 2048
    threads: int | None = None
    seed: int = 0
    center: str = "first_prompt"
    isa: str = "auto"
    host_kv_cache_gib: float | None = None

    @property
    def is_exact(self) -> bool:
        """K = 0: no hashing at all, exact attention over the same pages."""
        return self.K == 0

    @property
    def num_tables(self) -> int:
        """Tables whose codes a page holds."""
        return 0 if self.is_exact else self.L

    def is_dense(self, layer_index: int) -> bool:
        if self.dense_layers is None:
            return layer_index % DENSE_LAYER_STRIDE == 0
        return layer_index in self.dense_layers

    def samples(self, num_tokens: int) -> bool:
        """Whether a decode step over num_tokens tokens has a middle long enough to be sampled."""
        middle = num_tokens - self.sink_tokens - self.window_tokens
        return not self.is_exact and middle >= max(self.exact_below, 1)


_INT_RANGES = {
    "K": (0, 15, "0 for exact attention or 1 to 15 bits per table"),
    "L": (1, 255, "1 to 255 tables"),
    "min_matches": (1, 255, "1 to L tables"),
    "sink_tokens": (0, 1 << 20, "0 to 1048576 tokens"),
    "window_tokens": (1, 1 << 20, "1 to 1048576 tokens"),
    "exact_below": (0, 1 << 30, "0 to 1073741824 tokens"),
    "seed": (0, (1 << 63) - 1, "0 to 2**63 - 1"),
}
_ISAS = ("auto", "avx512_vpopcnt", "avx512", "avx2", "portable")


def parse_options(additional_config: Any) -> MagicPigOptions:
    """MagicPigOptions from vLLM's additional_config; raises ValueError in one sentence."""
    if additional_config is None or not isinstance(additional_config, Mapping):
        return MagicPigOptions()
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
    if options.min_matches > options.L:
        raise _wrong("min_matches", options.min_matches, f"1 to L = {options.L} tables")
    return options


def _checked(name: str, value: Any) -> Any:
    if name in _INT_RANGES:
        low, high, allowed = _INT_RANGES[name]
        return _integer(name, value, low, high, allowed)
    if name == "threads":
        return None if value is None else _integer(name, value, 1, 4096, "1 to 4096, or null")
    if name == "dense_layers":
        return _dense_layers(value)
    if name == "isa":
        if value not in _ISAS:
            raise _wrong(name, value, f"one of {', '.join(_ISAS)}")
        return value
    if name == "center":
        return _center(value)
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
    allowed = '"first_prompt", "none" or the path of a calibration file'
    if not isinstance(value, str) or not value:
        raise _wrong("center", value, allowed)
    if value not in ("first_prompt", "none") and not Path(value).is_file():
        raise _wrong("center", value, f"{allowed}, and there is no such file")
    return value


def _wrong(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"magicpig option {name} is {value!r}, but must be {allowed}; correct it in "
        "--additional-config."
    )
