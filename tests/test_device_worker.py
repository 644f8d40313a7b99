"""The device worker's own duties over a stub of vLLM's worker: what it has allocated when vLLM looks
at the memory, what it tells vLLM to take, and where errors of host callbacks come out."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from test_step import metadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_magicpig import _C, device_worker
from vllm_magicpig.backend import MagicPigImpl
from vllm_magicpig.device import Device
from vllm_magicpig.device_backend import DevicePageBackend
from vllm_magicpig.device_step import make_device_step
from vllm_magicpig.device_worker import DevicePagesWorker
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.stats import PageUse
from vllm_magicpig.worker import MagicPigWorker

GIB = 1 << 30
SPEC = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.float32)
SPARSE = DevicePageBackend.customize_spec(SPEC)


def sampled_layer() -> SimpleNamespace:
    impl = MagicPigImpl.__new__(MagicPigImpl)  # its __init__ asks vLLM's current configuration
    impl.num_heads, impl.num_kv_heads, impl.head_size = 4, 2, 64
    impl.kv_cache_dtype, impl.sampled = "auto", None
    impl.layer_index, impl.first_kv_head = 1, 0
    impl.scale, impl._segments_reused = 0.125, 0
    impl.center = KeyCenter("none", 1, 0, 2)
    impl.center.prepare(64)
    return SimpleNamespace(impl=impl, attn_backend=DevicePageBackend)


def dense_layer() -> SimpleNamespace:
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    return SimpleNamespace(impl=object(), attn_backend=type("Dense", (), vars(backend)))


class VllmWorker:
    """As much of vLLM's worker as the mixin calls."""

    device_bytes = GIB

    def __init__(self, options: dict[str, Any]) -> None:
        layers = {"0": dense_layer(), "1": sampled_layer(), "2": sampled_layer()}
        self.vllm_config = SimpleNamespace(
            additional_config={"magicpig": options},
            cache_config=SimpleNamespace(block_size=128),
            compilation_config=SimpleNamespace(static_forward_context=layers),
            model_config=SimpleNamespace(
                max_model_len=4096, original_max_model_len=4096, dtype=torch.float32
            ),
            parallel_config=SimpleNamespace(local_world_size=1, data_parallel_size_local=1),
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=256),
        )
        self.buffers_when_measured: Any = None
        self.output: Any = None
        self.warm_up: Any = lambda: None
        self.shut_down = False

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return {"0": SPEC, "1": SPARSE, "2": SPARSE}

    def determine_available_memory(self) -> int:
        self.buffers_when_measured = getattr(self, "_buffers", None)
        return self.device_bytes

    def compile_or_warm_up_model(self) -> str:
        self.warm_up()
        return "times"

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self.output

    def shutdown(self) -> None:
        self.shut_down = True


class Worker(DevicePagesWorker, VllmWorker):
    def _make_device(self) -> Device:
        return FakeDevice()

    def _kernel_cpus(self) -> list[int]:
        return [min(os.sched_getaffinity(0))] * 2


DEVICE_BLOCK_BYTES = 128 * 2 * 2 * 64 * 4 + 2 * 128 * 4


def test_the_buffers_are_there_when_vllm_measures_the_memory() -> None:
    worker = Worker({})
    worker.determine_available_memory()
    assert worker.buffers_when_measured is not None
    assert worker.buffers_when_measured.prefill


def test_vllm_takes_as_many_device_bytes_as_the_hosts_blocks_need() -> None:
    worker = Worker({"K": 0, "host_kv_cache_gib": 0.05})
    exact_block = 2 * 2 * 128 * 2 * 64 * 4
    blocks = int(0.05 * GIB) // exact_block
    assert worker.determine_available_memory() == blocks * DEVICE_BLOCK_BYTES


def test_signatures_take_their_part_of_the_hosts_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(device_worker.logger, "info", lambda text, *rest: said.append(text % rest))
    worker = Worker({**SIGNATURES, "host_kv_cache_gib": 0.05})
    blocks = worker.determine_available_memory() // DEVICE_BLOCK_BYTES
    assert any("GiB for pages and signatures)" in text for text in said)
    with_layers = with_pool(blocks, index=SIGNATURES)
    assert with_layers._host_pool is not None
    layers = [impl.sampled for _, impl in with_layers._sampled_layers()]
    taken = sum(with_layers._host_pool.layer(i).nbytes for i in range(2))
    taken += sum(layer.signatures.memory.nbytes for layer in layers)
    assert 0 <= 0.05 * GIB - taken < taken / blocks, "all of it, but for less than a block"


def test_where_the_device_is_the_limit_its_bytes_stay() -> None:
    worker = Worker({"host_kv_cache_gib": 2})
    worker.device_bytes = 200 * DEVICE_BLOCK_BYTES
    assert worker.determine_available_memory() == worker.device_bytes


def test_the_default_budget_is_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_worker, "free_ram_bytes", lambda: GIB // 4)
    said: list[str] = []
    monkeypatch.setattr(device_worker.logger, "info", lambda text, *rest: said.append(text % rest))
    worker = Worker({"K": 0})
    blocks = worker.determine_available_memory() // DEVICE_BLOCK_BYTES
    assert any("0.2 GiB of RAM that are free now" in text for text in said)
    assert blocks == int(0.7 * (GIB // 4)) // (2 * 2 * 128 * 2 * 64 * 4)


def test_more_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_worker, "free_ram_bytes", lambda: GIB)
    with pytest.raises(ValueError, match=r"host_kv_cache_gib is 5\.0, but this machine has 1\.0"):
        Worker({"host_kv_cache_gib": 5}).determine_available_memory()


def test_the_check_can_be_switched_off_where_ram_grows_as_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_worker, "free_ram_bytes", lambda: GIB // 100)
    worker = Worker({"K": 0, "host_kv_cache_gib": 0.05, "check_host_memory": False})
    assert worker.determine_available_memory() > 0


BUCKETS: dict[str, Any] = {"index": "buckets", "K": 4, "L": 20}
SIGNATURES: dict[str, Any] = {"index": "signatures", "bits": 4}


def with_pool(
    num_blocks: int, max_model_len: int = 4096, index: dict[str, Any] = BUCKETS
) -> Worker:
    """A worker whose sampled layers have their pages; max_model_len: once the cache is sized."""
    worker = Worker({**index, "exact_below": 100, "host_kv_cache_gib": 0.05})
    worker.determine_available_memory()
    worker.vllm_config.model_config.max_model_len = max_model_len
    worker._isa, worker._pool = _C.resolve_isa("auto"), worker._make_pool()
    if index is BUCKETS:
        worker._builder = _C.SegmentBuilder(worker._builder_cpus())
    else:
        for _, impl in worker._sampled_layers():
            impl.center = None
    worker._bind_layers(SimpleNamespace(num_blocks=num_blocks))
    return worker


def run(worker: Worker, query_len: int, seq_len: int, block: int = 1) -> None:
    """A step of one request whose blocks follow `block`, in all layers."""
    assert worker._device is not None
    made = metadata([query_len], [seq_len], [query_len > 1])
    made.seq_lens_cpu_upper_bound = made.seq_lens
    made.query_start_loc = made.query_start_loc_cpu
    made.slot_mapping = torch.arange(seq_len - query_len, seq_len) + 128 * block
    made.block_table_tensor = torch.arange(block, block + 4, dtype=torch.int32)[None]
    step = make_device_step(made, worker._device, worker._buffers.step)
    for _, impl in worker._sampled_layers():
        query, key, value = (torch.randn(query_len, heads, 64) for heads in (4, 2, 2))
        impl.forward(None, query, key, value, torch.empty(0), step, torch.empty_like(query))


def test_the_kernels_threads_wait_for_the_next_layer_and_no_others_do() -> None:
    """500 us: a device's own work between two layers takes 100 and more."""
    worker = Worker({})
    assert worker._make_pool().spin_us == device_worker.SPIN_US >= 300
    assert MagicPigWorker._make_pool(worker).spin_us == 40


def test_block_tables_are_those_of_the_length_that_vllm_has_settled_on() -> None:
    """With --max-model-len -1 it comes down to what the cache holds."""
    assert with_pool(num_blocks=8, max_model_len=900)._buffers.step.block_tables.shape == (4, 8)


@pytest.mark.parametrize("index", [BUCKETS, SIGNATURES], ids=lambda index: index["index"])
def test_what_warm_up_stored_and_counted_is_forgotten(index: dict[str, Any]) -> None:
    """vLLM's V2 runner warms up with scheduled requests of made-up tokens."""
    worker = with_pool(num_blocks=8, index=index)
    layers = [impl for _, impl in worker._sampled_layers()]

    def warm_up() -> None:
        run(worker, 200, 200)
        run(worker, 1, 201)
        assert [impl.page_use().tokens for impl in layers] == [201, 201]

    worker.warm_up = warm_up
    assert worker.compile_or_warm_up_model() == "times"
    assert [impl.page_use() for impl in layers] == [PageUse(0, 0)] * 2
    assert [impl.stats().decode_steps for impl in layers] == [0, 0]
    run(worker, 150, 150, block=4)
    run(worker, 1, 151, block=4)
    assert [impl.page_use().tokens for impl in layers] == [151, 151]
    assert [impl.stats().decode_steps for impl in layers] == [1, 1]


def test_an_error_during_warm_up_ends_the_start() -> None:
    worker = with_pool(num_blocks=4)
    worker.warm_up = lambda: run(worker, 1, 201, block=5)
    with pytest.raises(RuntimeError, match="slot"):
        worker.compile_or_warm_up_model()


def device_of(worker: Worker) -> FakeDevice:
    device = worker._device
    assert isinstance(device, FakeDevice)
    return device


def test_shutdown_waits_for_the_device_and_unpins_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = with_pool(num_blocks=8)
    device = device_of(worker)
    monkeypatch.setattr(device, "settle", lambda: None)
    gate = threading.Event()
    device.launch(gate.wait)
    run(worker, 200, 200)
    assert (len(device.registered), device.callbacks.pending) == (2, 2)
    threading.Timer(0.2, gate.set).start()
    worker.shutdown()
    assert device.callbacks.pending == 0
    assert device.registered == []
    assert worker.shut_down


def test_a_device_that_has_failed_does_not_keep_the_rest_from_being_shut_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = with_pool(num_blocks=8)
    device, builder = device_of(worker), worker._builder
    assert builder is not None
    threads = set(os.listdir("/proc/self/task"))

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker.shutdown()
    assert set(os.listdir("/proc/self/task")) < threads, "the builder's have ended"
    assert device.registered == []
    assert [impl.sampled for _, impl in worker._sampled_layers()] == [None, None]
    assert worker.shut_down


class Output(AsyncModelRunnerOutput):
    def get_output(self) -> Any:
        return "tokens"

    def get_kv_connector_output(self) -> Any:
        return "blocks"


def failed_callback(worker: Worker) -> None:
    def raise_error() -> None:
        raise RuntimeError("block_tables[0, 3] is 77")

    worker._device = SimpleNamespace(callbacks=SimpleNamespace(raise_error=raise_error))  # type: ignore[assignment]


def test_an_error_comes_out_of_the_step_that_vllm_waits_for() -> None:
    worker = Worker({})
    worker.output = Output()
    output = worker.sample_tokens(None)
    assert output.get_output() == "tokens"
    failed_callback(worker)
    waiting = worker.sample_tokens(None)  # asynchronous: the device may not have come to it
    with pytest.raises(RuntimeError, match="is 77"):
        waiting.get_output()
    assert waiting.get_kv_connector_output() == "blocks"  # vLLM 0.33 asks after an error
    worker.output = "tokens"  # synchronous
    with pytest.raises(RuntimeError, match="is 77"):
        worker.sample_tokens(None)
    worker.output = None  # nothing was waited for
    assert worker.sample_tokens(None) is None
