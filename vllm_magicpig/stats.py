"""What the plugin measures while it serves; read by `magicpig_stats` and the periodic log line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_magicpig import _C

HIGH_ERROR_BAR = 0.5
"""Of a layer's mean: trained heads err by .03 to .13 in the median and by up to .36 in one of ten, so
that half an output is noise only where scores predict badly."""

LEAST_ERROR_BARS = 1000
"""Of a layer, before its mean says something: 500 steps of 32 heads."""


@dataclass
class LayerStats:
    """Counters of one sampled layer; times in nanoseconds, hash as wall time, lookup and attention
    summed over the kernel's threads."""

    decode_steps: int = 0
    sampled_heads: int = 0
    sampled_rows: int = 0
    middle_rows: int = 0
    exact_heads: int = 0
    layer_index: int = -1
    error_bars: int = 0  # query heads that had one: in one step of 16, by signatures
    error_bar_sum: float = 0.0
    hash_ns: int = 0
    lookup_ns: int = 0
    attend_ns: int = 0
    decode_ns: int = 0
    segments_reused: int = 0
    recent_rows: npt.NDArray[np.int32] = field(
        default_factory=lambda: np.zeros(0, dtype=np.int32), repr=False
    )

    @classmethod
    def from_counters(
        cls, counters: _C.DecodeCounters, recent_rows: npt.NDArray[np.int32]
    ) -> LayerStats:
        """What the native layer counted; a device's own hashing is not in it.

        recent_rows: rows sampled by the last query heads.
        """
        return cls(
            decode_steps=counters.decode_steps,
            sampled_heads=counters.sampled_heads,
            sampled_rows=counters.sampled_rows,
            middle_rows=counters.middle_rows,
            exact_heads=counters.exact_heads,
            error_bars=counters.error_bars,
            error_bar_sum=counters.error_bar_sum,
            hash_ns=counters.hash_ns,
            lookup_ns=counters.lookup_ns,
            attend_ns=counters.attend_ns,
            decode_ns=counters.step_ns,
            recent_rows=recent_rows,
        )

    @property
    def error_bar(self) -> float:
        """Mean over heads and steps of the expected relative error; 0 before the first."""
        return self.error_bar_sum / max(self.error_bars, 1)

    @property
    def errs_much(self) -> bool:
        return self.error_bars >= LEAST_ERROR_BARS and self.error_bar > HIGH_ERROR_BAR


@dataclass(frozen=True)
class PageUse:
    """What one layer holds in memory."""

    tokens: int
    page_bytes: int
    index_bytes: int = 0
    segments: int = 0
    segments_built: int = 0
    builds_refused: int = 0  # the index had no room for them


@dataclass(frozen=True)
class MagicPigStats:
    """One worker's figures over all of its sampled layers since start. Sampled rows are per query
    head, which by signatures all read their group's; fraction = sampled rows / rows of the middle;
    *_us_per_step sums over layers; error bars are means over heads and steps."""

    index: str
    sampled_layers: int
    dense_layers: int
    threads: int
    isa: str
    key_centers: int
    page_tokens: int
    page_bytes: int
    index_bytes: int
    idle_index_bytes: int  # kept for the next segments
    segments: int
    segments_built: int
    segments_reused: int
    builds_refused: int
    decode_steps: int
    sampled_heads: int
    exact_heads: int
    sampled_rows: int
    middle_rows: int
    sampled_rows_mean: float
    sampled_rows_p50: float
    sampled_rows_p99: float
    sampled_fraction: float
    error_bars: int
    error_bar: float
    worst_layer: int  # by its error bar; -1: none has any
    worst_layer_error_bar: float
    hash_us_per_step: float
    lookup_us_per_step: float
    attend_us_per_step: float
    decode_us_per_step: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        # A device hashes in its own time, which nobody measures.
        hashing = f"hash {self.hash_us_per_step:.0f} us, " if self.hash_us_per_step else ""
        if self.index == "signatures":
            index, head = f"signatures {_mib(self.index_bytes)}", "kv head, for its whole group"
        else:
            refused = self.builds_refused
            refusals = f", {refused} refused for lack of room" if refused else ""
            index = (
                f"index {_mib(self.index_bytes)} in {self.segments} segments "
                f"({self.segments_built} built, {self.segments_reused} reused{refusals}; "
                f"{_mib(self.idle_index_bytes)} idle)"
            )
            head = "query head"
        errors = (
            f"error bar {self.error_bar:.3f} on average, {self.worst_layer_error_bar:.3f} in layer "
            f"{self.worst_layer}; "
            if self.error_bars
            else ""
        )
        return (
            f"{self.page_tokens} tokens in {_mib(self.page_bytes)} of pages, {index}; "
            f"sampled rows per {head}: mean "
            f"{self.sampled_rows_mean:.0f}, p50 {self.sampled_rows_p50:.0f}, p99 "
            f"{self.sampled_rows_p99:.0f}, {100 * self.sampled_fraction:.2f} % of the middle; "
            f"{errors}per decode step: {hashing}lookup {self.lookup_us_per_step:.0f} us, attend "
            f"{self.attend_us_per_step:.0f} us, whole {self.decode_us_per_step:.0f} us over "
            f"{self.decode_steps} steps"
        )


def summarise(
    layers: Sequence[LayerStats],
    pages: Sequence[PageUse],
    *,
    dense_layers: int,
    key_centers: int,
    threads: int,
    isa: str,
    index: str = "buckets",
    idle_index_bytes: int = 0,
) -> MagicPigStats:
    """Adds the layers up; every sampled layer sees every step, so steps are those of one layer.

    index: "buckets" or "signatures", as the option says.
    idle_index_bytes: of the process, beside what the layers hold."""
    heads = sum(layer.sampled_heads for layer in layers)
    rows = sum(layer.sampled_rows for layer in layers)
    middle = sum(layer.middle_rows for layer in layers)
    steps = max((layer.decode_steps for layer in layers), default=0)

    def us_per_step(name: str) -> float:
        total_ns: int = sum(getattr(layer, name) for layer in layers)
        return total_ns / 1e3 / max(steps, 1)

    error_bars = sum(layer.error_bars for layer in layers)
    worst = max(
        (layer for layer in layers if layer.error_bars),
        key=lambda layer: layer.error_bar,
        default=LayerStats(),
    )
    p50, p99 = percentiles([layer.recent_rows for layer in layers], [50, 99])
    return MagicPigStats(
        index=index,
        sampled_layers=len(layers),
        dense_layers=dense_layers,
        threads=threads,
        isa=isa,
        key_centers=key_centers,
        page_tokens=max((use.tokens for use in pages), default=0),
        page_bytes=sum(use.page_bytes for use in pages),
        index_bytes=sum(use.index_bytes for use in pages),
        idle_index_bytes=idle_index_bytes,
        segments=sum(use.segments for use in pages),
        segments_built=sum(use.segments_built for use in pages),
        builds_refused=sum(use.builds_refused for use in pages),
        segments_reused=sum(layer.segments_reused for layer in layers),
        decode_steps=steps,
        sampled_heads=heads,
        exact_heads=sum(layer.exact_heads for layer in layers),
        sampled_rows=rows,
        middle_rows=middle,
        sampled_rows_mean=rows / max(heads, 1),
        sampled_rows_p50=p50,
        sampled_rows_p99=p99,
        sampled_fraction=rows / max(middle, 1),
        error_bars=error_bars,
        error_bar=sum(layer.error_bar_sum for layer in layers) / max(error_bars, 1),
        worst_layer=worst.layer_index,
        worst_layer_error_bar=worst.error_bar,
        hash_us_per_step=us_per_step("hash_ns"),
        lookup_us_per_step=us_per_step("lookup_ns"),
        attend_us_per_step=us_per_step("attend_ns"),
        decode_us_per_step=us_per_step("decode_ns"),
    )


def percentiles(parts: Sequence[npt.NDArray[np.int32]], percents: Sequence[float]) -> list[float]:
    """np.percentile over all parts together, 0 without any; parts: int32 [n], 0 or more.

    From counts per value: a serving worker asks for it every second, and selecting among 30 layers'
    half a million sizes takes several times as long.
    """
    histograms = [np.bincount(part) for part in parts if part.size]
    if not histograms:
        return [0.0 for _ in percents]
    counts = np.zeros(max(h.size for h in histograms), dtype=np.int64)
    for histogram in histograms:
        counts[: histogram.size] += histogram
    at_most = counts.cumsum()
    places = (int(at_most[-1]) - 1) * np.asarray(percents) / 100
    below = np.searchsorted(at_most, np.floor(places), side="right")
    above = np.searchsorted(at_most, np.ceil(places), side="right")
    found: list[float] = (below + (above - below) * (places % 1)).tolist()
    return found


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
