"""vLLM's CPU platform with one more backend to choose; with any other one chosen it changes nothing.

CpuPlatform ignores every backend but CPU_ATTN and never validates a choice, so both are done here.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_magicpig import BACKEND_NAME
from vllm_magicpig.config import parse_options
from vllm_magicpig.support import check_config

_CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
_MAGICPIG_CPU_WORKER = "vllm_magicpig.worker.MagicPigCPUWorker"

_cpu_platform = cpu_platform_plugin()
assert _cpu_platform is not None, "platform_plugin() offers this class on CPU builds only"
_Base: Any = resolve_obj_by_qualname(_cpu_platform)  # CpuPlatform or ZenCpuPlatform


def _is_magicpig(backend: Any) -> bool:
    return backend is not None and backend.name == BACKEND_NAME


class MagicPigCpuPlatform(_Base):
    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if not _is_magicpig(selected_backend):
            path: str = super().get_attn_backend_cls(
                selected_backend, attn_selector_config, num_heads
            )
            return path
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"magicpig cannot run this model ({'; '.join(reasons)}), it runs dense decoder "
                "attention; choose another --attention-backend."
            )
        qualified_name: str = selected_backend.get_path()
        return qualified_name

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        if not _is_magicpig(vllm_config.attention_config.backend):
            return
        options = parse_options(vllm_config.additional_config)
        if options.host_kv_cache_gib is not None:
            raise ValueError(
                f"magicpig option host_kv_cache_gib is {options.host_kv_cache_gib}, but it sizes the "
                "pinned pool of the CUDA path and must be null on the CPU platform; size the cache "
                "with --kv-cache-memory-bytes."
            )
        check_config(vllm_config)
        # One block table serves sampled, dense and sliding-window layers, whose pages differ in size.
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is None:
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        if vllm_config.parallel_config.worker_cls == _CPU_WORKER:
            vllm_config.parallel_config.worker_cls = _MAGICPIG_CPU_WORKER
