"""What vLLM sees of sampled layers whose pages are in the host pool: a few bytes a block, and steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_magicpig.backend import MagicPigBackend
from vllm_magicpig.device_layer import DeviceLayer
from vllm_magicpig.device_step import DeviceStep, make_device_step


class DevicePageBackend(MagicPigBackend):
    @staticmethod
    def get_builder_cls() -> type[DeviceMetadataBuilder]:
        return DeviceMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:  # type: ignore[override]
        return None  # any: nothing reads the layer's KV tensor

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """One element a token. vLLM asserts that a page has bytes, and zeroes the blocks of groups
        whose layers differ in dtype; with this spec one block table serves dense and sampled layers
        (v1/core/kv_cache_utils.py)."""
        return replace(spec, num_head_slots=1, state_content_bytes=spec.dtype.itemsize)


class DeviceMetadataBuilder(AttentionMetadataBuilder[DeviceStep]):
    # Host callbacks could be captured in a graph, but not the number of a step's requests.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold: int | None = None

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        block_size = vllm_config.cache_config.block_size
        if kv_cache_spec.block_size != block_size:
            raise ValueError(
                f"block size {block_size} is split into blocks of {kv_cache_spec.block_size} for the "
                "dense layers' backend, but a host page is a whole block; pass --block-size "
                f"{kv_cache_spec.block_size}."
            )
        context = vllm_config.compilation_config.static_forward_context
        self._impl = context[layer_names[0]].impl

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DeviceStep | None:
        """None before the host pool exists, when the layers answer with zeros."""
        layer = self._impl.sampled
        if layer is None:
            return None
        assert isinstance(layer, DeviceLayer)
        return make_device_step(common_attn_metadata, layer.device, layer.buffers.step)
