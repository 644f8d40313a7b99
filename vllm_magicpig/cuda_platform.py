"""vLLM's CUDA platform with magicpig's worker behind the backend's name."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cuda import CudaPlatform

from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.platform_hooks import MagicPigHooks
from vllm_magicpig.support import check_device_config

_Base: Any = CudaPlatform


class MagicPigCudaPlatform(MagicPigHooks, _Base):
    platform_worker = "vllm.v1.worker.gpu_worker.Worker"
    magicpig_worker = "vllm_magicpig.cuda_worker.MagicPigCudaWorker"

    @classmethod
    def check_options(cls, vllm_config: Any, options: MagicPigOptions) -> None:
        check_device_config(vllm_config)
