"""The CUDA platform's hooks on a machine without CUDA: vLLM's CudaPlatform is imported over a stub of
its kernel library, in a process of its own, and asked what a start-up would ask."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_plugin import output

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="about vLLM's CPU build, and this is a CUDA build"
)

STUB = """
import sys, types
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
from types import SimpleNamespace as NS
import vllm_magicpig
from vllm_magicpig.cuda_platform import MagicPigCudaPlatform as P
backend = vllm_magicpig.register()

def config(attention_backend=backend, options=None, **changes):
    made = NS(
        attention_config=NS(backend=attention_backend, backend_per_kind={}),
        additional_config={} if options is None else {"magicpig": options},
        model_config=NS(
            use_mla=False, is_hybrid=False, is_attention_free=False, is_encoder_decoder=False,
            is_mm_prefix_lm=False, is_diffusion=False, runner_type="generate",
            attention_chunk_size=None, dtype="torch.bfloat16",
            enable_sleep_mode=changes.pop("sleep", False), get_total_num_hidden_layers=lambda: 3,
        ),
        cache_config=NS(
            cache_dtype="auto", block_size=16, user_specified_block_size=False,
            kv_offloading_size=None,
        ),
        parallel_config=NS(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, worker_cls="auto",
            use_ubatching=changes.pop("ubatching", False),
        ),
        scheduler_config=NS(disable_hybrid_kv_cache_manager=None),
        offload_config=NS(uva=NS(cpu_offload_gb=0)),
        compilation_config=NS(cudagraph_mode=None),
        speculative_config=None, kv_transfer_config=None,
    )
    assert not changes, changes
    return made
"""


RESULTS = """
import json
results = {}

c = config(options={"host_kv_cache_gib": 4})
P.check_and_update_config(c)
P.check_and_update_config(c)  # as the engine's core does again
P.update_block_size_for_backend(c)
results["chosen"] = [
    c.parallel_config.worker_cls, c.scheduler_config.disable_hybrid_kv_cache_manager,
    c.cache_config.block_size, P.is_cuda(P()),
]

c = config(attention_backend=None, options={"K": 99})
P.check_and_update_config(c)
results["other"] = [
    c.parallel_config.worker_cls, c.scheduler_config.disable_hybrid_kv_cache_manager,
]

for change in ("sleep", "ubatching"):
    try:
        P.check_and_update_config(config(**{change: True}))
    except ValueError as error:
        results[change] = str(error)

from vllm_magicpig.cuda_worker import MagicPigCudaWorker
from vllm_magicpig.device import CudaDevice
results["worker"] = [c.__name__ for c in MagicPigCudaWorker.__mro__[:5]]
try:
    CudaDevice("cuda")
except RuntimeError as error:
    results["driver"] = str(error)

c = config()
c.cache_config.block_size, c.cache_config.user_specified_block_size = 256, True
P.check_and_update_config(c)
P.update_block_size_for_backend(c)
results["block size of the user"] = c.cache_config.block_size

import vllm.platforms
vllm.platforms.cuda_platform_plugin = lambda: "vllm.platforms.cuda.CudaPlatform"
vllm.platforms.cpu_platform_plugin = lambda: None
results["offered"] = vllm_magicpig.platform_plugin()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    answers: dict[str, Any] = json.loads(output(STUB + RESULTS).splitlines()[-1])
    return answers


def test_choosing_magicpig_takes_its_worker_one_block_table_and_larger_blocks(
    results: dict[str, Any],
) -> None:
    worker = "vllm_magicpig.cuda_worker.MagicPigCudaWorker"
    assert results["chosen"] == [worker, True, 128, True]


def test_a_block_size_of_the_users_stays(results: dict[str, Any]) -> None:
    assert results["block size of the user"] == 256


def test_with_another_backend_chosen_nothing_changes(results: dict[str, Any]) -> None:
    assert results["other"] == ["vllm.v1.worker.gpu_worker.Worker", None]


def test_what_a_host_pool_cannot_go_with_is_refused(results: dict[str, Any]) -> None:
    assert "does not support sleep mode" in results["sleep"]
    assert "does not support dual batch overlap" in results["ubatching"]


def test_the_worker_is_vllms_gpu_worker_with_the_device_path_before_it(
    results: dict[str, Any],
) -> None:
    names = ["MagicPigCudaWorker", "DevicePagesWorker", "MagicPigWorker", "Worker", "WorkerBase"]
    assert results["worker"] == names


def test_without_a_driver_there_is_one_sentence(results: dict[str, Any]) -> None:
    assert "libcuda.so.1" in results["driver"]


def test_a_cuda_build_is_offered_the_cuda_platform(results: dict[str, Any]) -> None:
    assert results["offered"] == "vllm_magicpig.cuda_platform.MagicPigCudaPlatform"
