"""What magicpig adds to a platform class of vLLM; with another backend chosen it changes nothing."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from vllm_magicpig import BACKEND_NAME
from vllm_magicpig.compile_key import add_compile_key
from vllm_magicpig.config import MagicPigOptions, has_options, parse_options
from vllm_magicpig.key_center import check_centers
from vllm_magicpig.metrics import expose
from vllm_magicpig.support import check_config, check_dense_layers

logger = logging.getLogger("vllm.magicpig")


def is_magicpig(backend: Any) -> bool:
    return backend is not None and backend.name == BACKEND_NAME


DEFAULT_BLOCK_SIZE = 128
"""Tokens: a block of a kv head is then a run of 64 KiB in the host pool (head size 128, bf16)."""


class MagicPigHooks:
    """Mixed into a platform class, before it."""

    platform_worker: ClassVar[str]  # what the platform itself would take
    magicpig_worker: ClassVar[str]

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if not is_magicpig(selected_backend):
            path: str = super().get_attn_backend_cls(  # type: ignore[misc]
                selected_backend, attn_selector_config, num_heads
            )
            return path
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(
            device_capability=cls.get_device_capability(),  # type: ignore[attr-defined]
            **attn_selector_config._asdict(),
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
        """vLLM calls this again in EngineCore, with the configuration that came out of it here."""
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        attention = vllm_config.attention_config
        if any(map(is_magicpig, attention.backend_per_kind.values())):
            raise ValueError(
                "magicpig is chosen in backend_per_kind, but it has to be the backend of the whole "
                "model; pass --attention-backend magicpig."
            )
        if not is_magicpig(attention.backend):
            if has_options(vllm_config.additional_config):
                logger.warning(
                    "magicpig has options in --additional-config, but is not chosen: pass "
                    "--attention-backend magicpig, or drop the options"
                )
            return
        if attention.backend_per_kind:
            raise ValueError(
                f"backend_per_kind names other backends for {', '.join(attention.backend_per_kind)}, "
                "but magicpig chooses those of the layers that it does not sample; drop "
                "backend_per_kind."
            )
        options = parse_options(vllm_config.additional_config)
        _set_block_size(vllm_config.cache_config)
        check_config(vllm_config, options)
        cls.check_options(vllm_config, options)
        model = vllm_config.model_config
        if model is not None:
            check_dense_layers(options, model.get_total_num_hidden_layers())
        if model is not None and options.center_file is not None:
            check_centers(
                options.center_file,
                model.get_total_num_hidden_layers(),
                model.get_total_num_kv_heads(),
            )
        # One block table serves sampled, dense and sliding-window layers, whose pages differ in size.
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is None:
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        cls._set_worker(vllm_config.parallel_config)
        add_compile_key(vllm_config, options)
        expose(vllm_config)

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        """vLLM calls this once the layers exist. It would take the smallest size that their backends
        share, 32 or less; on the CPU, 0.32 has set its own before and 0.33 does so here."""
        if is_magicpig(vllm_config.attention_config.backend):
            _set_block_size(vllm_config.cache_config)
        else:
            super().update_block_size_for_backend(vllm_config)  # type: ignore[misc]

    @classmethod
    def _set_worker(cls, parallel_config: Any) -> None:
        """Raises ValueError for a worker class that would leave the layers without pages."""
        if parallel_config.worker_cls == cls.platform_worker:
            parallel_config.worker_cls = cls.magicpig_worker
        if parallel_config.worker_cls == cls.magicpig_worker:
            return
        from vllm.utils.import_utils import resolve_obj_by_qualname

        from vllm_magicpig.worker import MagicPigWorker

        if not issubclass(resolve_obj_by_qualname(parallel_config.worker_cls), MagicPigWorker):
            raise ValueError(
                f"magicpig does not support worker class {parallel_config.worker_cls}, it supports "
                f"{cls.magicpig_worker} and its subclasses; drop --worker-cls."
            )

    @classmethod
    def check_options(cls, vllm_config: Any, options: MagicPigOptions) -> None:
        """Raises ValueError for what this platform cannot do."""


def _set_block_size(cache_config: Any) -> None:
    if not cache_config.user_specified_block_size:
        cache_config.block_size = DEFAULT_BLOCK_SIZE
