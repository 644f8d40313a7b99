"""vLLM's CUDA platform with magicpig's worker behind the backend's name."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cuda import CudaPlatform

from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.platform_hooks import MagicPigHooks, is_magicpig
from vllm_magicpig.support import check_device_config

_Base: Any = CudaPlatform

DEFAULT_BLOCK_SIZE = 128
"""Tokens: a block of a kv head is then a run of 64 KiB in the host pool (head size 128, bf16)."""


class MagicPigCudaPlatform(MagicPigHooks, _Base):
    platform_worker = "vllm.v1.worker.gpu_worker.Worker"
    magicpig_worker = "vllm_magicpig.cuda_worker.MagicPigCudaWorker"

    @classmethod
    def check_options(cls, vllm_config: Any, options: MagicPigOptions) -> None:
        check_device_config(vllm_config)

    @classmethod
    def set_block_size(cls, cache_config: Any) -> None:
        if not cache_config.user_specified_block_size:
            cache_config.block_size = DEFAULT_BLOCK_SIZE

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        """vLLM would take the smallest size that its backends share, 32 or less."""
        if is_magicpig(vllm_config.attention_config.backend):
            cls.set_block_size(vllm_config.cache_config)
        else:
            super().update_block_size_for_backend(vllm_config)
