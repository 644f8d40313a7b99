"""vLLM's CPU platform with one more backend to choose.

CpuPlatform ignores every backend but CPU_ATTN and never validates a choice, so the hooks do both.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.platform_hooks import MagicPigHooks

_cpu_platform = cpu_platform_plugin()
assert _cpu_platform is not None, "platform_plugin() offers this class on CPU builds only"
_Base: Any = resolve_obj_by_qualname(_cpu_platform)  # CpuPlatform or ZenCpuPlatform


class MagicPigCpuPlatform(MagicPigHooks, _Base):
    platform_worker = "vllm.v1.worker.cpu_worker.CPUWorker"
    magicpig_worker = "vllm_magicpig.cpu_worker.MagicPigCPUWorker"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> None:
        return None

    @classmethod
    def check_options(cls, vllm_config: Any, options: MagicPigOptions) -> None:
        if options.host_kv_cache_gib is not None and (
            vllm_config.parallel_config.worker_cls == cls.platform_worker
        ):
            raise ValueError(
                f"magicpig option host_kv_cache_gib is {options.host_kv_cache_gib}, but it sizes the "
                "pinned pool of the CUDA path and must be null on the CPU platform; size the cache "
                "with --kv-cache-memory-bytes."
            )
