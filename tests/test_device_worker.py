"""The device worker's own duties over a stub of vLLM's worker: what it has allocated when vLLM looks
at the memory, what it tells vLLM to take, and where errors of host callbacks come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_magicpig import device_worker
from vllm_magicpig.backend import MagicPigImpl
from vllm_magicpig.device import Device
from vllm_magicpig.device_backend import DevicePageBackend
from vllm_magicpig.device_worker import DevicePagesWorker

GIB = 1 << 30
SPEC = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.float32)
SPARSE = DevicePageBackend.customize_spec(SPEC)


def sampled_layer() -> SimpleNamespace:
    impl = MagicPigImpl.__new__(MagicPigImpl)  # its __init__ asks vLLM's current configuration
    impl.num_heads, impl.num_kv_heads, impl.head_size = 4, 2, 64
    impl.kv_cache_dtype, impl.sampled = "auto", None
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

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return {"0": SPEC, "1": SPARSE, "2": SPARSE}

    def determine_available_memory(self) -> int:
        self.buffers_when_measured = getattr(self, "_buffers", None)
        return self.device_bytes

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self.output


class Worker(DevicePagesWorker, VllmWorker):
    def _make_device(self) -> Device:
        return FakeDevice()


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


def test_where_the_device_is_the_limit_its_bytes_stay() -> None:
    worker = Worker({"host_kv_cache_gib": 2})
    worker.device_bytes = 200 * DEVICE_BLOCK_BYTES
    assert worker.determine_available_memory() == worker.device_bytes


def test_the_default_budget_is_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_worker, "free_ram_bytes", lambda: GIB // 4)
    worker = Worker({"K": 0})
    blocks = worker.determine_available_memory() // DEVICE_BLOCK_BYTES
    assert blocks == int(0.7 * (GIB // 4)) // (2 * 2 * 128 * 2 * 64 * 4)


def test_more_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_worker, "free_ram_bytes", lambda: GIB)
    with pytest.raises(ValueError, match=r"host_kv_cache_gib is 5\.0, but this machine has 1\.0"):
        Worker({"host_kv_cache_gib": 5}).determine_available_memory()


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
