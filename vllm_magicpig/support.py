"""What magicpig refuses at start-up, each in one sentence: value, what is allowed, remedy."""

from __future__ import annotations

from typing import Any

HEAD_SIZE_MULTIPLE, MIN_HEAD_SIZE, MAX_HEAD_SIZE = 8, 16, 256
BLOCK_SIZE_MULTIPLE = 32
"""Codes lie in groups of 32 tokens in a page, and so do vLLM's own CPU pages of dense layers."""

_ALTERNATIVE = "choose another --attention-backend for it"


def check_config(vllm_config: Any) -> None:
    """Raises ValueError for a feature of the whole configuration that magicpig cannot serve."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise _refusal(
            f"speculative decoding ({vllm_config.speculative_config.method})",
            "one token per decode step",
            "drop --speculative-config",
        )
    if vllm_config.kv_transfer_config is not None:
        raise _refusal(
            f"the KV connector {vllm_config.kv_transfer_config.kv_connector}",
            "KV pages that stay in this process",
            "drop --kv-transfer-config and --kv-offloading-size",
        )
    if str(cache.cache_dtype) not in ("auto", "float16", "bfloat16", "float32"):
        raise _refusal(
            f"KV cache dtype {cache.cache_dtype}",
            "auto, float16, bfloat16 and float32",
            "drop --kv-cache-dtype",
        )
    if model is not None and str(cache.cache_dtype) not in ("auto", _name(model.dtype)):
        # Pages hold rows as the model makes them.
        raise _refusal(
            f"KV cache dtype {cache.cache_dtype} for a model in {_name(model.dtype)}",
            "the model's own dtype",
            "drop --kv-cache-dtype",
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise _refusal(
            "context parallelism (decode "
            f"{parallel.decode_context_parallel_size}, prefill "
            f"{parallel.prefill_context_parallel_size})",
            "a size of 1 for both",
            "use --tensor-parallel-size instead",
        )
    if cache.block_size is not None and cache.block_size % BLOCK_SIZE_MULTIPLE:
        raise _refusal(
            f"block size {cache.block_size}",
            f"multiples of {BLOCK_SIZE_MULTIPLE}",
            "pass --block-size 128",
        )
    if model is None:
        return
    if model.use_mla:
        raise _refusal("MLA attention", "multi-head and grouped-query attention", _ALTERNATIVE)
    if model.is_hybrid or model.is_attention_free:
        raise _refusal(
            "a model with Mamba or linear-attention layers", "attention layers only", _ALTERNATIVE
        )
    if model.is_encoder_decoder:
        raise _refusal("an encoder-decoder model", "decoder-only models", _ALTERNATIVE)


def check_device_config(vllm_config: Any) -> None:
    """Raises ValueError for what cannot go together with pages in a pinned host pool."""
    if vllm_config.model_config is not None and vllm_config.model_config.enable_sleep_mode:
        raise _refusal(
            "sleep mode", "an engine that keeps its host pool", "drop --enable-sleep-mode"
        )
    if vllm_config.parallel_config.use_ubatching:
        raise _refusal(
            "dual batch overlap", "one batch per step", "drop --enable-dbo and --ubatch-size"
        )


def check_layer(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    alibi_slopes: Any,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    extra: dict[str, Any],
) -> None:
    """Raises ValueError for a feature of one attention layer that magicpig cannot serve."""
    if alibi_slopes is not None:
        raise _refusal("ALiBi position biases", "rotary or no position encoding", _ALTERNATIVE)
    if logits_soft_cap:
        raise _refusal(f"a logits soft cap of {logits_soft_cap}", "no soft cap", _ALTERNATIVE)
    if attn_type != "decoder":
        raise _refusal(f"attention type {attn_type}", "decoder", _ALTERNATIVE)
    if kv_sharing_target_layer_name is not None:
        raise _refusal(
            f"KV sharing with layer {kv_sharing_target_layer_name}",
            "layers with their own KV cache",
            _ALTERNATIVE,
        )
    if extra.get("sinks") is not None:
        raise _refusal("learnt attention sinks", "plain softmax attention", _ALTERNATIVE)
    unknown = sorted(name for name, value in extra.items() if value is not None)
    if unknown:
        raise _refusal(f"the attention argument {unknown[0]}", "plain attention", _ALTERNATIVE)
    if not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE or head_size % HEAD_SIZE_MULTIPLE:
        raise _refusal(
            f"head size {head_size}",
            f"multiples of {HEAD_SIZE_MULTIPLE} from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}",
            _ALTERNATIVE,
        )
    if num_heads % num_kv_heads or num_heads // num_kv_heads > 64:
        raise _refusal(
            f"{num_heads} query heads over {num_kv_heads} kv heads",
            "groups of 1 to 64 query heads",
            _ALTERNATIVE,
        )


def _name(dtype: Any) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _refusal(value: str, allowed: str, remedy: str) -> ValueError:
    return ValueError(f"magicpig does not support {value}, it supports {allowed}; {remedy}.")
