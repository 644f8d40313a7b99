"""Which attention layers of a model are sampled, which the platform's own backend keeps, and which
end the start.

vLLM puts classes of its own before a backend, whose metadata builders do what a kind of attention
is about (model_executor/layers/attention/*.py): a layer is sampled only where its class and its
backend are plainly what vLLM makes of an ordinary decoder layer. docs/models.md lists the kinds.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import (
    ChunkedLocalAttention,
    create_chunked_local_attention_backend,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_magicpig.backend import MagicPigBackend, MagicPigImpl
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.support import ANOTHER_BACKEND, nothing_sampled, refusal

# vLLM configures its own loggers only, by this prefix.
logger = init_logger("vllm.magicpig.layers")


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """This rank's layers that take part in attention or its caches, by name."""
    layers = vllm_config.compilation_config.static_forward_context
    return {name: each for name, each in layers.items() if isinstance(each, AttentionLayerBase)}


def select_layers(
    vllm_config: Any, options: MagicPigOptions, sampled_backend: type[MagicPigBackend]
) -> None:
    """Gives each layer of a loaded model its backend and impl, before vLLM asks for KV cache specs.

    Local attention (sliding windows, chunks) and `dense_layers` go to the platform's own backend,
    the others take `sampled_backend`. Raises ValueError for a kind of layer that magicpig does not
    know, for one that the platform's backend cannot run, and where no layer is left to sample.
    """
    model_dtype = vllm_config.model_config.dtype
    layers = attention_layers(vllm_config)
    for name, layer in layers.items():
        _check_kind(name, layer, model_dtype)
    num_sampled = 0
    for name, layer in layers.items():
        index = extract_layer_index(name)
        if _is_local(layer) or options.is_dense(index):
            _make_dense(index, layer, model_dtype)
        else:
            impl: MagicPigImpl = layer.impl
            impl.become_sampled(index)
            layer.attn_backend = sampled_backend
            num_sampled += 1
    if num_sampled == 0 and vllm_config.parallel_config.pipeline_parallel_size > 1:
        logger.warning("magicpig: this pipeline rank samples none of its %d layers", len(layers))
    elif num_sampled == 0:
        raise nothing_sampled(len(layers), sum(map(_is_local, layers.values())))


def _is_local(layer: Any) -> bool:
    """Whether a token sees a bounded number of others, so that sampling them would gain nothing."""
    return isinstance(layer, ChunkedLocalAttention) or layer.sliding_window is not None


def _chunked_backend(
    backend: type[AttentionBackend], chunked: ChunkedLocalAttention
) -> type[AttentionBackend]:
    """vLLM's wrapper for the layer's chunks around a backend: the same class at every call."""
    wrapper: type[AttentionBackend] = create_chunked_local_attention_backend(
        backend, chunked.attention_chunk_size
    )
    return wrapper


def _check_kind(name: str, layer: Any, model_dtype: torch.dtype) -> None:
    """Raises ValueError unless vLLM put nothing but what we know between a layer and our impl."""
    backend = getattr(layer, "attn_backend", None)
    expected: type[AttentionBackend] = MagicPigBackend
    if type(layer) is ChunkedLocalAttention:
        expected = _chunked_backend(expected, layer)
    known = type(layer) in (Attention, ChunkedLocalAttention) and backend is expected
    if not known or type(layer.impl) is not MagicPigImpl:
        over = "" if backend is None else f" over {backend.__name__}"
        raise refusal(
            f"attention layer {name} of the kind {type(layer).__name__}{over}",
            "Attention and ChunkedLocalAttention over its own backend",
            ANOTHER_BACKEND,
        )
    if layer.use_mm_prefix:
        raise refusal("bidirectional attention to images", "causal attention", ANOTHER_BACKEND)
    if layer.head_size_v != layer.head_size:
        raise refusal(
            f"values of head size {layer.head_size_v} beside keys of {layer.head_size}",
            "one head size for both",
            ANOTHER_BACKEND,
        )
    if layer.kv_cache_torch_dtype != model_dtype:
        raise refusal(
            f"KV cache dtype {layer.kv_cache_dtype} for a model in {model_dtype}",
            "the model's own dtype",
            "choose a checkpoint without a scheme for its KV cache",
        )


def _make_dense(index: int, layer: Any, model_dtype: torch.dtype) -> None:
    """Gives a layer the platform's ordinary backend, in vLLM's wrapper, as if none had been named."""
    selector = AttentionSelectorConfig(
        head_size=layer.head_size,
        dtype=layer.dtype,
        kv_cache_dtype="auto",  # by this every backend knows the model's own dtype
        block_size=None,
        has_sliding_window=layer.sliding_window is not None,
    )
    path = current_platform.get_attn_backend_cls(None, selector, layer.num_heads)
    backend = resolve_obj_by_qualname(path)
    _check_dense(index, layer, backend, selector)
    layer.backend = AttentionBackendEnum[backend.get_name()]
    if isinstance(layer, ChunkedLocalAttention):
        backend = _chunked_backend(backend, layer)
    ours: MagicPigImpl = layer.impl
    layer.impl = backend.get_impl_cls()(*ours.impl_args)
    layer.attn_backend = backend
    layer.impl.process_weights_after_loading(model_dtype)


def _check_dense(
    index: int, layer: Any, backend: type[AttentionBackend], selector: AttentionSelectorConfig
) -> None:
    """Raises ValueError for a layer that the platform's backend would fail on at the first request:
    the CPU platform names its backend without asking it."""
    device_capability = current_platform.get_device_capability()
    reasons = backend.validate_configuration(
        **selector._asdict(), device_capability=device_capability
    )
    if not reasons:
        return
    if _is_local(layer):
        which, remedy = (
            "local",
            "choose a model or a platform that fits, such layers are never sampled",
        )
    else:
        which, remedy = "dense", 'pass "dense_layers": [] in --additional-config'
    value, allowed = "; ".join(reasons), f"what {backend.get_name()} does"
    if not backend.supports_head_size(layer.head_size):
        sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
        value, allowed = f"head size {layer.head_size}", f"what {backend.get_name()} does ({sizes})"
    raise refusal(f"{value} in layer {index}, which is {which}", f"there {allowed}", remedy)
