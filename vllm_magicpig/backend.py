"""The attention backend that vLLM sees: one impl per layer, dense or sampled.

Hooks and their reasons: vLLM 0.32's v1/attention/backend.py and
model_executor/layers/attention/attention.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_magicpig import BACKEND_NAME
from vllm_magicpig.capacity import content_bytes
from vllm_magicpig.config import MagicPigOptions, parse_options
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.layer_signatures import LayerSignatures
from vllm_magicpig.lsh_index import LshIndex
from vllm_magicpig.stats import LayerStats, PageUse
from vllm_magicpig.step import Step, make_step
from vllm_magicpig.support import TILE_TOKENS, block_size_multiple, check_layer


class MagicPigBackend(AttentionBackend):
    # One opaque op per layer, so that no host work can be baked into a graph.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "float32"]

    options: ClassVar[MagicPigOptions] = MagicPigOptions(K=0)
    """Of the engine, in the classes that with_options makes."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[MagicPigImpl]:
        return MagicPigImpl

    @staticmethod
    def get_builder_cls() -> type[MagicPigMetadataBuilder]:
        return MagicPigMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(TILE_TOKENS)]  # with_options may ask for more

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True  # such layers are made dense

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A larger cell: K, V and the token's codes."""
        size = content_bytes(spec.head_size, spec.dtype.itemsize, cls.options.num_tables)
        return replace(spec, state_content_bytes=size)


@cache
def with_options(backend: type[MagicPigBackend], options: MagicPigOptions) -> type[MagicPigBackend]:
    """The backend of sampled layers under these options.

    vLLM asks a backend's class for the shape of its cache and its block sizes, hence a class for each;
    it keeps the parent's name, by which vLLM groups layers.
    """

    def block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(block_size_multiple(options))]

    names = {
        "options": options,
        "get_supported_kernel_block_sizes": staticmethod(block_sizes),
        "__module__": backend.__module__,
        "__qualname__": backend.__qualname__,
    }
    return type(backend.__name__, (backend,), names)


class MagicPigMetadataBuilder(AttentionMetadataBuilder[Step]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold: int | None = None

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:  # abstract in the parent, although complete there
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        return make_step(common_attn_metadata)


class SampledLayer(Protocol):
    """What a sampled layer does once its pages exist: host_layer.py or device_layer.py."""

    pages: HostPages
    index: LshIndex | None
    signatures: LayerSignatures | None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        step: Any,
    ) -> None: ...

    def forget(self) -> None:
        """All tokens stored and steps counted so far; no step and no builder is at work."""

    def take_center(self) -> None:
        """Hashes and samples from now on, by the centre that has just been fixed."""

    def stats(self) -> LayerStats: ...


class MagicPigImpl(AttentionImpl[Any]):
    """Attention of one layer. In dense layers layer_selection.py replaces it by the platform's own
    impl; the worker gives the others their pages through `bind`."""

    observes_keys = False
    """Whether steps add their keys to the centre: those of the worker's passage do."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        check_layer(
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=head_size,
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            extra=extra,
        )
        self.impl_args = (
            num_heads,
            head_size,
            scale,
            self.num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
        )
        config = get_current_vllm_config()
        self.first_kv_head = _first_kv_head(config, self.num_kv_heads)
        self.options: MagicPigOptions = parse_options(config.additional_config)
        self.layer_index = -1
        self.center: KeyCenter | None = None
        self.sampled: SampledLayer | None = None
        self._segments_reused = 0

    def become_sampled(self, layer_index: int) -> None:
        """Learns the layer's place in the model, once it is known that the layer is sampled."""
        self.layer_index = layer_index
        if self.options.has_buckets:
            self.center = KeyCenter(
                self.options.center, self.layer_index, self.first_kv_head, self.num_kv_heads
            )
            self.center.prepare(self.head_size)

    def bind(self, sampled: SampledLayer) -> None:
        """Takes what attends for this layer from now on; before that, and in dummy runs, it is zero."""
        self.sampled = sampled

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output: [num_tokens, num_heads, head_size]; key, value: [num_tokens, num_kv_heads,
        head_size]; rows past the step's num_tokens are padding and left alone."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "magicpig writes unquantised output; disable fused quantisation."
            )
        if key is None or value is None:
            raise NotImplementedError(
                "magicpig stores a step's keys and values itself, and this model gives none; choose "
                "another --attention-backend for it."
            )
        if attn_metadata is None or self.sampled is None:
            return output.zero_()
        if self.observes_keys:
            assert self.center is not None
            self.center.observe(key[: attn_metadata.num_tokens])
        self.sampled.forward(query, key, value, output, attn_metadata)
        return output

    def forget(self) -> None:
        """Pages, index and counters are as after `bind`; the key centre stays."""
        self._segments_reused = 0
        if self.sampled is not None:
            self.sampled.forget()

    @property
    def needs_center(self) -> bool:
        """Whether keys must be observed before the layer can sample."""
        return self.center is not None and self.center.value is None

    @property
    def is_centred(self) -> bool:
        """Whether keys are hashed around a centre other than zero."""
        return self.center is not None and self.center.is_nonzero

    def fix_center(self) -> bool:
        """Takes the mean of what was observed; False where that is not finite, and zeros are taken."""
        assert self.center is not None
        assert self.sampled is not None
        self.observes_keys = False
        is_finite = self.center.fix(self.head_size)
        self.sampled.take_center()
        return is_finite

    def stats(self) -> LayerStats:
        """Counters since the start; zeros before `bind`."""
        if self.sampled is None:
            return LayerStats()
        stats = self.sampled.stats()
        stats.segments_reused = self._segments_reused
        stats.layer_index = self.layer_index
        return stats

    def page_use(self) -> PageUse:
        """What the layer holds; zeros before `bind`."""
        if self.sampled is None:
            return PageUse(0, 0)
        pages = self.sampled.pages
        tokens = pages.native.num_tokens
        page_bytes = pages.native.num_used_blocks * pages.block_bytes
        if self.sampled.signatures is not None:
            return PageUse(tokens, page_bytes, index_bytes=self.sampled.signatures.used_bytes)
        if self.sampled.index is None:
            return PageUse(tokens, page_bytes)
        native = self.sampled.index.native
        return PageUse(
            tokens,
            page_bytes,
            index_bytes=native.num_bytes,
            segments=native.num_segments,
            segments_built=native.segments_built,
            builds_refused=native.builds_refused,
        )

    def count_reuse(self, block_ids: list[int], num_cached_tokens: int) -> None:
        """Counts the segments that a new or resumed request finds for its cached prefix."""
        index = None if self.sampled is None else self.sampled.index
        if index is not None:
            table = np.array(block_ids, dtype=np.int32)
            self._segments_reused += len(index.native.find(table, num_cached_tokens))


def _first_kv_head(config: VllmConfig, num_kv_heads: int) -> int:
    """Index of this rank's first kv head among the model's, for calibration files."""
    parallel = config.parallel_config
    total: int = config.model_config.get_total_num_kv_heads()
    tensor_rank: int = parallel.rank % parallel.tensor_parallel_size
    ranks_per_head = max(1, parallel.tensor_parallel_size // total)  # heads are replicated past it
    first: int = tensor_rank // ranks_per_head * num_kv_heads
    return first
