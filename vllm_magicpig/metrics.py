"""magicpig's figures among the Prometheus metrics that vLLM's API server shows at /metrics.

vLLM 0.32's own metrics of workers need a KV connector, and an installed stat logger plugin would
overrule --disable-log-stats for every backend; so a collector reads what workers publish whenever
/metrics is asked for. With several API servers (--api-server-count) vLLM serves another registry,
made of vLLM's own files, and these figures are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vllm_magicpig.published_stats import RankStats, read_ranks

PREFIX = "magicpig_"
LABELS = ("engine", "rank")


@dataclass(frozen=True)
class Figure:
    """One metric: `name` without the prefix (and without _total, for a counter)."""

    name: str
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    meaning: str
    index: str = ""
    """Whose layers alone have it: "buckets", "signatures"; empty: either's."""

    def value(self, stats: Any) -> float:
        """stats: MagicPigStats as a dict. A stage's time is kept there per step, in microseconds."""
        if self.name.endswith("_seconds"):
            stage = self.name.removesuffix("_seconds")
            return float(stats[f"{stage}_us_per_step"] * stats["decode_steps"] / 1e6)
        return float(stats[self.name])


FIGURES = (
    Figure("sampled_layers", GaugeMetricFamily, "Layers with magicpig."),
    Figure("dense_layers", GaugeMetricFamily, "Layers with the platform's own attention."),
    Figure("key_centers", GaugeMetricFamily, "Layers that hash keys around a centre.", "buckets"),
    Figure("threads", GaugeMetricFamily, "Threads of the decode kernel."),
    Figure("page_tokens", GaugeMetricFamily, "Tokens in host pages."),
    Figure("page_bytes", GaugeMetricFamily, "Bytes of host pages in use, all layers."),
    Figure("index_bytes", GaugeMetricFamily, "Bytes of the index or of signatures, all layers."),
    Figure(
        "idle_index_bytes",
        GaugeMetricFamily,
        "Bytes that dropped segments left for the next ones; at most four of the largest.",
        "buckets",
    ),
    Figure("segments", GaugeMetricFamily, "Index segments held.", "buckets"),
    Figure("segments_built", CounterMetricFamily, "Index segments built.", "buckets"),
    Figure(
        "segments_reused",
        CounterMetricFamily,
        "Index segments found for a cached prefix.",
        "buckets",
    ),
    Figure(
        "builds_refused", CounterMetricFamily, "Segments not built for lack of room.", "buckets"
    ),
    Figure("error_bars", CounterMetricFamily, "Query heads with an error bar.", "signatures"),
    Figure(
        "error_bar",
        GaugeMetricFamily,
        "Mean expected relative error of a head's output, since start.",
        "signatures",
    ),
    Figure("worst_layer", GaugeMetricFamily, "Layer of the largest mean error bar.", "signatures"),
    Figure(
        "worst_layer_error_bar", GaugeMetricFamily, "The error bar of this layer.", "signatures"
    ),
    Figure("decode_steps", CounterMetricFamily, "Decode steps of a sampled layer."),
    Figure("sampled_heads", CounterMetricFamily, "Query heads sampled, over layers and steps."),
    Figure("exact_heads", CounterMetricFamily, "Query heads attended exactly."),
    Figure("sampled_rows", CounterMetricFamily, "Rows of the middle read by sampled heads."),
    Figure("middle_rows", CounterMetricFamily, "Rows of the middle that sampled heads had."),
    Figure("sampled_rows_p50", GaugeMetricFamily, "Median rows per recent sampled head."),
    Figure("sampled_rows_p99", GaugeMetricFamily, "99th percentile of the same."),
    Figure("hash_seconds", CounterMetricFamily, "Time of hashing on the CPU, all layers."),
    Figure("lookup_seconds", CounterMetricFamily, "Time of lookups, summed over threads."),
    Figure("attend_seconds", CounterMetricFamily, "Time of attention, summed over threads."),
    Figure("decode_seconds", CounterMetricFamily, "Wall time of the decode of sampled layers."),
)


class MagicPigCollector:
    """Metrics of the engine of the last configuration that was made in this process."""

    vllm_config: Any = None

    def describe(self) -> list[Metric]:
        """Nothing: prometheus_client would otherwise collect once to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        # vLLM names an instance after the platform has seen its configuration, so ask now.
        ranks = [] if self.vllm_config is None else read_ranks(self.vllm_config.instance_id)
        if ranks:
            yield from families(ranks)


def families(ranks: list[RankStats]) -> Iterator[Metric]:
    for figure in FIGURES:
        having = [each for each in ranks if figure.index in ("", each.stats["index"])]
        if not having:
            continue
        family = figure.kind(PREFIX + figure.name, figure.meaning, labels=LABELS)
        for each in having:
            family.add_metric([str(each.engine), str(each.rank)], figure.value(each.stats))
        yield family


@cache
def _registered_collector() -> MagicPigCollector:
    collector = MagicPigCollector()
    REGISTRY.register(collector)
    return collector


def expose(vllm_config: Any) -> None:
    """Shows the engine of this configuration in the metrics of this process, from now on."""
    _registered_collector().vllm_config = vllm_config
