"""The attention backend that vLLM sees: one impl per layer, dense or sampled.

Hooks and their reasons: vLLM 0.32's v1/attention/backend.py and
model_executor/layers/attention/attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_magicpig import _C, BACKEND_NAME
from vllm_magicpig.config import MagicPigOptions, parse_options
from vllm_magicpig.decode import DecodeKernel
from vllm_magicpig.host_pages import HostPages, content_bytes
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.lsh_index import LshIndex
from vllm_magicpig.prefill import CONTEXT_PIECE_TOKENS, attend_chunk
from vllm_magicpig.projection import Projection
from vllm_magicpig.stats import LayerStats, PageUse
from vllm_magicpig.step import Step, make_step
from vllm_magicpig.support import BLOCK_SIZE_MULTIPLE, check_layer


class MagicPigBackend(AttentionBackend):
    # One opaque op per layer, so that no host work can be baked into a graph.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "float32"]

    num_tables: ClassVar[int] = 0

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
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

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
        size = content_bytes(spec.head_size, spec.dtype.itemsize, cls.num_tables)
        return replace(spec, state_content_bytes=size)


@cache
def backend_with_tables(num_tables: int) -> type[MagicPigBackend]:
    """The backend of sampled layers whose pages hold codes of this many tables.

    customize_spec is a class method without access to options, hence a class per number; it keeps
    the parent's name, by which vLLM groups layers.
    """
    names = {
        "num_tables": num_tables,
        "__module__": MagicPigBackend.__module__,
        "__qualname__": MagicPigBackend.__qualname__,
    }
    return type(MagicPigBackend.__name__, (MagicPigBackend,), names)


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


@dataclass
class _Bound:
    """What exists once vLLM's KV tensor does."""

    pages: HostPages
    index: LshIndex | None
    kernel: DecodeKernel
    page_bytes: int
    filled: npt.NDArray[np.int64]  # tokens stored per block since its last reuse


class MagicPigImpl(AttentionImpl[Step]):
    """Attention of one layer. `process_weights_after_loading` replaces it by the platform's own
    impl in dense layers; `bind` gives the others their pages."""

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
        self._impl_args = (
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
        self._layers = config.compilation_config.static_forward_context
        self._first_kv_head = _first_kv_head(config, self.num_kv_heads)
        self.options: MagicPigOptions = parse_options(config.additional_config)
        self.layer_index = -1
        self.center: KeyCenter | None = None
        self.stats = LayerStats()
        self._bound: _Bound | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Finds this impl's layer and decides: dense (also every sliding window) or sampled.

        This runs before vLLM asks the layer for its KV cache spec, and again on a weight reload.
        """
        name, layer = next(
            (name, layer)
            for name, layer in self._layers.items()
            if getattr(layer, "impl", None) is self
        )
        self.layer_index = extract_layer_index(name)
        if self.sliding_window is not None or self.options.is_dense(self.layer_index):
            _make_dense(layer, self._impl_args)
            layer.impl.process_weights_after_loading(act_dtype)
            return
        layer.attn_backend = backend_with_tables(self.options.num_tables)
        if self.center is None and not self.options.is_exact:
            self.center = KeyCenter(
                self.options.center, self.layer_index, self._first_kv_head, self.num_kv_heads
            )
            self.center.prepare(self.head_size)

    def bind(self, kv_cache: torch.Tensor, isa: _C.Isa, pool: _C.ThreadPool) -> None:
        """Takes the layer's KV tensor, once allocated, for its pages."""
        pages = HostPages(kv_cache, self.head_size, self.options.num_tables)
        index = None
        if self.center is not None:
            projection = Projection(self.options, self.layer_index, self.head_size, isa, pool)
            index = LshIndex(self.options, pages, projection, self.center, pool)
        kernel = DecodeKernel(self.options, pages, index, self.scale, isa, pool, self.stats)
        filled = np.zeros(pages.num_blocks, dtype=np.int64)
        self._bound = _Bound(pages, index, kernel, kv_cache.nbytes, filled)
        self._pool = pool

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
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
        step, bound = attn_metadata, self._bound
        if step is None or bound is None or step.is_dummy:
            return output.zero_()
        key, value = key[: step.num_tokens], value[: step.num_tokens]
        self._store(bound, key, value, step)

        for chunk in step.chunks:
            tokens = slice(chunk.start, chunk.stop)
            context = bound.pages.pieces(
                step.block_tables[chunk.request], chunk.context_len, CONTEXT_PIECE_TOKENS
            )
            output[tokens] = attend_chunk(
                query[tokens], key[tokens], value[tokens], context, self.scale
            )
        if step.decode_rows.size:
            decoding = torch.from_numpy(step.decode_tokens)
            output[decoding] = bound.kernel.attend(query[decoding], step).to(output.dtype)
        return output

    def _store(self, bound: _Bound, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        bound.pages.store_rows(key, value, step.slots, self._pool)
        if bound.index is not None:
            bound.index.add(key, step)
        stored = step.slots[step.slots >= 0]
        # A block fills from its start and tokens come in order, so the last write of each counts.
        bound.filled[stored // bound.pages.block_size] = stored % bound.pages.block_size + 1

    def page_use(self) -> PageUse:
        """What the layer holds; zeros before `bind`."""
        if self._bound is None:
            return PageUse(0, 0, 0, 0, 0)
        tokens = int(self._bound.filled.sum())
        blocks = int((self._bound.filled > 0).sum())
        page_bytes = self._bound.page_bytes // self._bound.pages.num_blocks * blocks
        if self._bound.index is None:
            return PageUse(tokens, page_bytes, 0, 0, 0)
        native = self._bound.index.native
        return PageUse(
            tokens, page_bytes, native.num_bytes, native.num_segments, native.segments_built
        )

    def count_reuse(self, block_ids: list[int], num_cached_tokens: int) -> None:
        """Counts the segments that a new or resumed request finds for its cached prefix."""
        if self._bound is not None and self._bound.index is not None:
            table = np.array(block_ids, dtype=np.int32)
            native = self._bound.index.native
            self.stats.segments_reused += native.count_sealed(table, num_cached_tokens)


def _make_dense(layer: Any, impl_args: tuple[Any, ...]) -> None:
    """Gives a layer the platform's ordinary backend, as if no backend had been named."""
    selector = AttentionSelectorConfig(
        head_size=layer.head_size,
        dtype=layer.dtype,
        kv_cache_dtype=layer.kv_cache_dtype,
        block_size=None,
        has_sliding_window=layer.sliding_window is not None,
    )
    path = current_platform.get_attn_backend_cls(None, selector, layer.num_heads)
    backend = resolve_obj_by_qualname(path)
    layer.attn_backend = backend
    layer.impl = backend.get_impl_cls()(*impl_args)
    layer.backend = AttentionBackendEnum[backend.get_name()]


def _first_kv_head(config: VllmConfig, num_kv_heads: int) -> int:
    """Index of this rank's first kv head among the model's, for calibration files."""
    parallel = config.parallel_config
    total: int = config.model_config.get_total_num_kv_heads()
    tensor_rank: int = parallel.rank % parallel.tensor_parallel_size
    ranks_per_head = max(1, parallel.tensor_parallel_size // total)  # heads are replicated past it
    first: int = tensor_rank // ranks_per_head * num_kv_heads
    return first
