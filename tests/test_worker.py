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

from vllm_magicpig.backend import MagicPigImpl
from vllm_magicpig.capacity import content_bytes
from vllm_magicpig.config import parse_options
from vllm_magicpig.cpus import kernel_cpus
from vllm_magicpig.host_layer import HostLayer
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.published_stats import read_ranks
from vllm_magicpig.stats import HIGH_ERROR_BAR, LayerStats
from vllm_magicpig.step import Chunk, Step
from vllm_magicpig.worker import LOG_INTERVAL_S, PUBLISH_INTERVAL_S, MagicPigWorker

CPUS = sorted(os.sched_getaffinity(0))
INSTANCE = "abcde"


class VllmWorker:
    """As much of vLLM's worker as the mixin calls."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={"magicpig": options},
            compilation_config=SimpleNamespace(static_forward_context={}),
            instance_id=INSTANCE,
            model_config=SimpleNamespace(max_model_len=4096),
        )
        self.parallel_config = SimpleNamespace(data_parallel_index=0, rank=1)
        self.threads_at_shutdown: set[str] | None = None
        self.has_loaded = False

    def load_model(self) -> None:
        self.has_loaded = True

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        pass

    def compile_or_warm_up_model(self) -> str:
        self.warm_up()
        return "times"

    def warm_up(self) -> None:
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
    worker = Worker({"index": "buckets"})
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


def host_layer(worker: Worker, options: dict[str, Any]) -> MagicPigImpl:
    """A sampled layer of the CPU platform with 2 kv heads of size 16 and 8 blocks of 128."""
    impl = MagicPigImpl.__new__(MagicPigImpl)  # its __init__ asks vLLM's current configuration
    impl.options, impl.layer_index, impl._segments_reused = parse_options(options), 1, 0
    impl.center = KeyCenter("none", 1, 0, 2)
    impl.center.prepare(16)
    elements = content_bytes(16, 4, impl.options.num_tables) // 4
    kv_cache = torch.zeros(8, 2, 128, elements)
    layer = HostLayer(
        impl.options, 1, kv_cache, 16, 0.25, 0, impl.center, worker._isa, worker._pool,
        worker._builder, 0,
    )  # fmt: skip
    impl.bind(layer)
    worker.vllm_config.compilation_config.static_forward_context["1"] = SimpleNamespace(impl=impl)
    return impl


def test_what_warm_up_stored_and_counted_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"magicpig": {"index": "buckets", "K": 4, "L": 20, "exact_below": 100}}
    worker = Worker(options["magicpig"])
    worker._num_dense_layers = lambda: 0  # type: ignore[method-assign]
    worker.initialize_from_config(None)
    impl = host_layer(worker, options)
    table = np.arange(8, dtype=np.int32)[None]
    lives = []

    def run(num_tokens: int) -> None:
        """A prompt and a decode step."""
        for n, length in ((num_tokens, num_tokens), (1, num_tokens + 1)):
            slots = np.arange(length - n, length)
            chunks = (Chunk(0, 0, n, 0),) if n > 1 else ()
            decode = np.arange(1 if n == 1 else 0)
            step = Step(n, np.array([length], np.int32), chunks, decode, decode, slots, table)
            query, key, value = (torch.randn(n, heads, 16) for heads in (4, 2, 2))
            impl.forward(None, query, key, value, torch.empty(0), step, torch.empty_like(query))
        impl.count_reuse([0], 128)

    def warm_up() -> None:
        run(1020)  # segments of it are queued when vLLM's warm-up ends
        lives.append(worker.magicpig_stats())

    monkeypatch.setattr(worker, "warm_up", warm_up)
    assert worker.compile_or_warm_up_model() == "times"
    assert (lives[0]["page_tokens"], lives[0]["decode_steps"]) == (1021, 1)
    forgotten = worker.magicpig_stats()
    counts = (
        "page_tokens", "page_bytes", "index_bytes", "segments", "segments_built",
        "segments_reused", "decode_steps", "sampled_heads", "sampled_rows", "middle_rows",
    )  # fmt: skip
    assert {name: forgotten[name] for name in counts} == dict.fromkeys(counts, 0)
    assert read_ranks(INSTANCE)[0].stats["page_tokens"] == 0
    run(300)
    assert worker.magicpig_stats()["page_tokens"] == 301
    assert worker.magicpig_stats()["decode_steps"] == 1
    worker.shutdown()


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threads": 4096}, "threads is 4096, but must be 1 to "),
        ({"isa": "avx512"}, "this build and CPU have"),
    ],
)
def test_what_the_machine_lacks_is_said_before_the_weights_are_read(
    options: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve_isa(name: str) -> None:
        if name != "auto":
            raise ValueError(f"isa is {name}, but this build and CPU have others")

    monkeypatch.setattr("vllm_magicpig._C.resolve_isa", resolve_isa)
    worker = Worker(options)
    monkeypatch.setattr(worker, "_kernel_cpus", lambda: kernel_cpus(worker._options.threads))
    with pytest.raises(ValueError, match=sentence):
        worker.load_model()
    assert not worker.has_loaded


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, False),
        ({"K": 0, "window_tokens": 1 << 20}, False),
        ({"exact_below": 4096 - 4 - 64}, False),
        ({"exact_below": 4096 - 4 - 64 + 1}, True),
        ({"window_tokens": 4096}, True),
        ({"sink_tokens": 5000}, True),
    ],
)
def test_options_under_which_nothing_can_be_sampled_are_warned_of(
    options: dict[str, Any], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "vllm_magicpig.worker.logger.warning", lambda text, *values: said.append(text % values)
    )
    worker = Worker(options)
    worker.initialize_from_config(None)
    worker.shutdown()
    assert [("max_model_len = 4096" in text) for text in said] == [True] * warned


def test_a_layer_that_errs_much_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 100.0, []
    monkeypatch.setattr("vllm_magicpig.worker.time.monotonic", lambda: now)
    monkeypatch.setattr(
        "vllm_magicpig.worker.logger.warning", lambda text, *values: said.append(text % values)
    )
    worker = Worker({"K": 0})
    worker.initialize_from_config(None)
    for index, mean in ((3, HIGH_ERROR_BAR), (5, HIGH_ERROR_BAR + 0.1)):
        impl = MagicPigImpl.__new__(MagicPigImpl)
        impl.layer_index, impl.sampled, impl.center = index, None, None
        stats = LayerStats(
            layer_index=index, decode_steps=1, error_bars=4096, error_bar_sum=4096 * mean
        )
        monkeypatch.setattr(impl, "stats", lambda stats=stats: stats)
        layers = worker.vllm_config.compilation_config.static_forward_context
        layers[str(index)] = SimpleNamespace(impl=impl)
    for steps in (1, 2):
        now += LOG_INTERVAL_S
        for layer in layers.values():
            layer.impl.stats().decode_steps = steps
        worker.execute_model(STEP)
    worker.shutdown()
    (sentence,) = said
    assert "the outputs of layer 5 are expected to err by 0.60 of their size" in sentence
    assert "dense_layers" in sentence
