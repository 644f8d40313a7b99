"""Sizes of a gpu-check: those of a machine with a GPU, and those of a rehearsal on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_check_jobs import ProbesJob

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class ParityScale:
    """Exact mode against dense attention on a shape of examples/compare_setup.py, cut to two layers:
    prompts of `lengths` tokens, `tokens` generated for each."""

    shape: str
    lengths: tuple[int, ...]
    tokens: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class CompiledScale:
    """The same two layers sampled, with torch.compile and graphs where `compiles`: prompts of
    `lengths` tokens, one after another."""

    shape: str
    lengths: tuple[int, ...]
    tokens: int
    options: dict[str, Any]
    kv_cache_bytes: int
    max_num_batched_tokens: int


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
    """The 8B shape. shape, num_layers: see ParityScale, None = all of its layers; cases: magicpig's,
    (tokens, requests), those that say most first; dense_cases: of the dense backend, run after
    magicpig's; *_gib: budgets of device memory, None on a CPU."""

    shape: str
    num_layers: int | None
    cases: tuple[tuple[int, int], ...]
    dense_cases: tuple[tuple[int, int], ...]
    max_num_seqs: int
    output_tokens: int
    options: dict[str, Any]
    small_gib: float | None
    large_gib: float | None
    max_num_batched_tokens: int

    @property
    def longest(self) -> int:
        return max(length for length, _ in self.cases)


@dataclass(frozen=True)
class Scale:
    """dense_backend: what magicpig is compared with; fp32_backend: the same in float32, None where
    vLLM has to choose; compiles: engines run with torch.compile and CUDA graphs, as when serving,
    except in the parity part; test_files, test_marker: each file is a pytest of its own; limits:
    seconds of each part."""

    is_rehearsal: bool
    dense_backend: str
    fp32_backend: str | None
    compiles: bool
    host_buffer_bytes: int
    device_buffer_bytes: int
    gathered_bytes: int
    probes: ProbesJob
    test_files: tuple[str, ...]
    test_marker: str
    parity: ParityScale
    compiled: CompiledScale
    recall: RecallScale
    speed: SpeedScale
    limits: Mapping[str, float]

    def small_engine_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """magicpig's, of an engine that runs beside others: few threads, a small pinned pool."""
        if self.is_rehearsal:
            return dict(options)
        return {**options, "host_kv_cache_gib": 2.0, "check_host_memory": False, "threads": 4}

    def small_engine_arguments(self) -> dict[str, Any]:
        """EngineArgs of such an engine. The share has only to be free; the KV cache is sized by
        kv_cache_memory_bytes, without which vLLM fails when a neighbour's memory use changes."""
        return {} if self.is_rehearsal else {"gpu_memory_utilization": 0.15}


# Dummy weights are small random numbers, so that all keys are about as far from a query: cosines are
# normal with a spread of 1 / sqrt(head_dim). K = 10 and L = 170 then sample 2.0 % of the middle
# (cost_model._mean_over_cosines); the default L = 150 samples 1.6 % of it, and 2.1 % of real text.
SPEED_TABLES: dict[str, Any] = {"index": "buckets", "K": 10, "L": 170}

FIRST_STAGE_S, SECOND_STAGE_S = 225.0, 430.0
"""Of a whole stage. A command that also unpacks vLLM and installs a wheel (45 s) then stays within
270 s, and within 8 minutes."""

GPU = Scale(
    is_rehearsal=False,
    dense_backend="FLASH_ATTN",
    fp32_backend=None,  # FLASH_ATTN has no float32
    compiles=True,
    host_buffer_bytes=4 * GIB,  # more than any cache, and than its TLB reaches in 2 MiB pages
    device_buffer_bytes=1 * GIB,
    gathered_bytes=2 * GIB,
    probes=ProbesJob([2 * GIB, 40 * GIB], latency_rounds=1000, callback_ms=5.0),
    test_files=(
        "tests/test_triton_simhash.py",
        "tests/test_triton_pages.py",
        "tests/test_triton_merge.py",
        "tests/test_device_layer.py",
    ),
    test_marker="gpu",
    parity=ParityScale(
        shape="llama-3.1-8b",
        lengths=(64, 1500, 4000),
        tokens=64,
        kv_cache_bytes=2 * GIB,
    ),
    compiled=CompiledScale(
        shape="llama-3.1-8b",
        lengths=(8192, 16_384),
        tokens=64,
        options={"dense_layers": [0]},
        kv_cache_bytes=2 * GIB,
        max_num_batched_tokens=8192,
    ),
    recall=RecallScale(
        lengths=(16_384,),
        num_questions=30,
        options={},
        kv_cache_bytes=4 * GIB,
        max_sampled_fraction=0.05,
    ),
    speed=SpeedScale(
        shape="llama-3.1-8b",
        num_layers=None,
        cases=((32_768, 1), (98_304, 1)),
        dense_cases=((32_768, 1),),
        max_num_seqs=4,
        output_tokens=16,
        options=SPEED_TABLES,
        small_gib=24.0,
        large_gib=40.0,
        max_num_batched_tokens=8192,
    ),
    limits={
        "hardware": 25,
        "probes": 50,
        "tests": 70,
        "parity": 80,
        "compiled": 75,
        "recall": 60,
        "speed": 190,
        "dense speed": 80,
    },
)

REHEARSAL = Scale(
    is_rehearsal=True,
    dense_backend="CPU_ATTN",
    fp32_backend="CPU_ATTN",
    compiles=False,
    host_buffer_bytes=64 * MIB,
    device_buffer_bytes=0,
    gathered_bytes=16 * MIB,
    probes=ProbesJob([16 * MIB, 64 * MIB], latency_rounds=10, callback_ms=5.0),
    test_files=("tests/test_stats.py", "tests/test_cpus.py"),  # that run without a GPU
    test_marker="not gpu",
    parity=ParityScale(
        shape="small",
        lengths=(64, 200),
        tokens=8,
        kv_cache_bytes=256 * MIB,
    ),
    compiled=CompiledScale(
        shape="small",
        lengths=(512, 1024),
        tokens=8,
        options={"dense_layers": [0], "exact_below": 256},
        kv_cache_bytes=256 * MIB,
        max_num_batched_tokens=1024,
    ),
    recall=RecallScale(
        lengths=(1024,),
        num_questions=6,
        options={"exact_below": 256},
        kv_cache_bytes=256 * MIB,
        max_sampled_fraction=0.05,
    ),
    speed=SpeedScale(
        shape="small",
        num_layers=2,
        cases=((1024, 1), (3072, 1)),
        dense_cases=((1024, 1),),
        max_num_seqs=4,
        output_tokens=8,
        options=SPEED_TABLES | {"exact_below": 256, "dense_layers": [0]},
        small_gib=None,
        large_gib=None,
        max_num_batched_tokens=1024,
    ),
    # Engines share two cores here; the stages take no longer than on a GPU.
    limits={
        "hardware": 25,
        "probes": 20,
        "tests": 40,
        "parity": 140,
        "compiled": 100,
        "recall": 105,
        "speed": 110,
        "dense speed": 90,
    },
)
