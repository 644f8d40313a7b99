"""What the workers of all platforms do about the segment builder, over a stub of vLLM's worker."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from native_helpers import Layer

from vllm_magicpig.published_stats import read_ranks
from vllm_magicpig.worker import PUBLISH_INTERVAL_S, MagicPigWorker

CPUS = sorted(os.sched_getaffinity(0))
INSTANCE = "abcde"


class VllmWorker:
    """As much of vLLM's worker as the mixin calls."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={"magicpig": options},
            compilation_config=SimpleNamespace(static_forward_context={}),
            instance_id=INSTANCE,
        )
        self.parallel_config = SimpleNamespace(data_parallel_index=0, rank=1)
        self.threads_at_shutdown: set[str] | None = None

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        pass

    def execute_model(self, scheduler_output: Any) -> str:
        return "output"

    def shutdown(self) -> None:
        self.threads_at_shutdown = set(os.listdir("/proc/self/task"))


class Worker(MagicPigWorker, VllmWorker):
    def _kernel_cpus(self) -> list[int]:
        return CPUS[:1]

    def _bind_layers(self, kv_cache_config: Any) -> None:
        self.bound_with = self._builder


@pytest.fixture(autouse=True)
def folder_of_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


STEP = SimpleNamespace(
    total_num_scheduled_tokens=1,
    finished_req_ids=set(),
    scheduled_new_reqs=[],
    scheduled_cached_reqs=SimpleNamespace(
        req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
    ),
)


def test_exact_mode_has_no_builder() -> None:
    worker = Worker({"K": 0})
    worker.initialize_from_config(None)
    assert worker.bound_with is worker._builder is None
    assert worker.execute_model(STEP) == "output"
    worker.shutdown()


def test_the_builder_is_there_for_the_layers_and_ends_before_the_pages_go() -> None:
    worker = Worker({})
    before = set(os.listdir("/proc/self/task"))
    worker.initialize_from_config(None)
    started = set(os.listdir("/proc/self/task")) - before
    assert started
    builder = worker.bound_with
    assert builder is worker._builder
    assert builder is not None
    layer = Layer(300, num_tables=255, num_bits=12, levels=[32])
    layer.store_codes(np.arange(300), 0, torch.zeros(1, 9600, 255, dtype=torch.int32))
    tables, lens = np.arange(300, dtype=np.int32)[None], np.array([9600], np.int32)
    builder.ask(layer.index, tables, lens)
    worker.shutdown()
    assert worker.threads_at_shutdown is not None
    assert not started & worker.threads_at_shutdown
    built = layer.index.segments_built
    assert built < 300, "what waited was withdrawn"
    builder.ask(layer.index, tables, lens)
    builder.drain()
    assert (builder.pending, layer.index.segments_built) == (0, built)


def test_an_error_of_the_builder_is_a_later_steps_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker({})
    worker.initialize_from_config(None)
    assert worker.execute_model(STEP) == "output"

    def raise_error() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(worker, "_builder", SimpleNamespace(raise_error=raise_error))
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.execute_model(STEP)


def test_statistics_are_published_once_a_second_and_when_the_worker_goes_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("vllm_magicpig.worker.time.monotonic", lambda: now)
    worker = Worker({"K": 0})
    written: list[float] = []
    worker.initialize_from_config(None)
    write = worker._stats_file.write  # type: ignore[union-attr]
    monkeypatch.setattr(
        worker._stats_file, "write", lambda stats: (written.append(now), write(stats))
    )
    for now in (100.1, 100.0 + PUBLISH_INTERVAL_S, 101.5):  # noqa: B007
        worker.execute_model(STEP)
    assert written == [101.0]
    idle = SimpleNamespace(**vars(STEP) | {"total_num_scheduled_tokens": 0})
    worker.execute_model(idle)
    assert written == [101.0], "an empty step between steps in flight"
    worker.execute_model(SimpleNamespace(**vars(idle) | {"finished_req_ids": {"a"}}))
    assert written == [101.0, 101.5]
    assert [(each.engine, each.rank) for each in read_ranks(INSTANCE)] == [(0, 1)]
    worker.shutdown()
    assert read_ranks(INSTANCE) == []


def test_a_worker_that_cannot_publish_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    worker = Worker({"K": 0})
    worker.initialize_from_config(None)
    assert worker.execute_model(STEP) == "output"
    worker.shutdown()
