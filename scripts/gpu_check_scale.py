"""Sizes of a gpu-check: those of a machine with a GPU, and those of a rehearsal on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class ParityScale:
    """Exact mode against dense attention: `lengths` prompt tokens, `tokens` generated for each.

    random_models: of tests/e2e/random_models.py, in these dtypes. shape: of
    examples/compare_setup.py, cut to two layers.
    """

    random_models: tuple[str, ...]
    random_dtypes: tuple[str, ...]
    lengths: tuple[int, ...]
    tokens: int
    shape: str
    shape_lengths: tuple[int, ...]
    shape_tokens: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class RecallScale:
    """num_questions of each length; options: magicpig's."""

    lengths: tuple[int, ...]
    num_questions: int
    options: dict[str, Any]
    kv_cache_bytes: int
    max_sampled_fraction: float


@dataclass(frozen=True)
class SpeedScale:
    """The 8B shape. shape, num_layers: see ParityScale, None = all of its layers; longest: a context
    that is run if there is time; *_gib: budgets of device memory, None on a CPU."""

    shape: str
    num_layers: int | None
    long: int
    longest: int | None
    short: int
    num_requests: tuple[int, ...]
    output_tokens: int
    options: dict[str, Any]
    small_gib: float | None
    large_gib: float | None
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Scale:
    """dense_backend: what magicpig is compared with; fp32_backend: the same in float32, None where
    vLLM has to choose; at_once: engines that only have to be right run side by side; compiles:
    engines run with torch.compile and CUDA graphs, as when serving, except in the parity part;
    tests: arguments of pytest."""

    is_rehearsal: bool
    dense_backend: str
    fp32_backend: str | None
    at_once: int
    compiles: bool
    host_buffer_bytes: int
    device_buffer_bytes: int
    gathered_bytes: int
    tests: tuple[str, ...]
    parity: ParityScale
    recall: RecallScale
    speed: SpeedScale

    def small_engine_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """magicpig's, of an engine that runs beside others: few threads, a small pinned pool."""
        if self.is_rehearsal:
            return dict(options)
        return {**options, "host_kv_cache_gib": 2.0, "threads": 4}

    def small_engine_arguments(self) -> dict[str, Any]:
        """EngineArgs of such an engine. The share has only to be free; the KV cache is sized by
        kv_cache_memory_bytes, without which vLLM fails when a neighbour's memory use changes."""
        return {} if self.is_rehearsal else {"gpu_memory_utilization": 0.15}


# Dummy weights are small random numbers, so that all keys are about as far from a query: cosines are
# normal with a spread of 1 / sqrt(head_dim). K = 10 and L = 170 then sample 2.0 % of the middle
# (cost_model._mean_over_cosines); the default L = 150 samples 1.6 % of it, and 2.1 % of real text.
SPEED_TABLES: dict[str, Any] = {"K": 10, "L": 170}

GPU = Scale(
    is_rehearsal=False,
    dense_backend="FLASH_ATTN",
    fp32_backend=None,  # FLASH_ATTN has no float32
    at_once=4,
    compiles=True,
    host_buffer_bytes=8 * GIB,  # more than any cache, and than its TLB reaches in 2 MiB pages
    device_buffer_bytes=1 * GIB,
    gathered_bytes=2 * GIB,
    tests=("-m", "gpu"),
    parity=ParityScale(
        random_models=("gemma3", "llama"),  # gemma3 has sliding-window layers too
        random_dtypes=("float32", "bfloat16"),
        lengths=(3, 130, 2100, 5800),
        tokens=256,
        shape="llama-3.1-8b",
        shape_lengths=(64, 1500, 4000),
        shape_tokens=64,
        kv_cache_bytes=2 * GIB,
    ),
    recall=RecallScale(
        lengths=(16_384, 65_536),
        num_questions=30,
        options={},
        kv_cache_bytes=4 * GIB,
        max_sampled_fraction=0.05,
    ),
    speed=SpeedScale(
        shape="llama-3.1-8b",
        num_layers=None,
        long=98_304,
        longest=131_072,
        short=32_768,
        num_requests=(1, 2, 4),
        output_tokens=32,
        options=SPEED_TABLES,
        small_gib=24.0,
        large_gib=40.0,
        max_num_batched_tokens=8192,
    ),
)

REHEARSAL = Scale(
    is_rehearsal=True,
    dense_backend="CPU_ATTN",
    fp32_backend="CPU_ATTN",
    at_once=2,
    compiles=False,
    host_buffer_bytes=256 * MIB,
    device_buffer_bytes=0,
    gathered_bytes=64 * MIB,
    tests=("tests/test_stats.py",),  # some that run without a GPU
    parity=ParityScale(
        random_models=("llama",),
        random_dtypes=("float32",),
        lengths=(17, 300),
        tokens=24,
        shape="small",
        shape_lengths=(64, 200),
        shape_tokens=8,
        kv_cache_bytes=256 * MIB,
    ),
    recall=RecallScale(
        lengths=(1024, 2048),
        num_questions=6,
        options={"exact_below": 256},
        kv_cache_bytes=256 * MIB,
        max_sampled_fraction=0.05,
    ),
    speed=SpeedScale(
        shape="small",
        num_layers=2,
        long=3072,
        longest=None,
        short=1024,
        num_requests=(1, 2),
        output_tokens=8,
        options=SPEED_TABLES | {"exact_below": 256, "dense_layers": [0]},
        small_gib=None,
        large_gib=None,
        max_num_batched_tokens=1024,
    ),
)
