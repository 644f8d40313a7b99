"""What magicpig refuses at start-up, each in one sentence: value, what is allowed, remedy."""

from __future__ import annotations

from typing import Any

from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.signature_reference import BLOCK_TOKENS

HEAD_SIZE_MULTIPLE, MIN_HEAD_SIZE, MAX_HEAD_SIZE = 8, 16, 256
TILE_TOKENS = 32
"""Codes lie in groups of 32 tokens in a page, and so do vLLM's own CPU pages of dense layers."""

ANOTHER_BACKEND = "choose another --attention-backend for it"


def block_size_multiple(options: MagicPigOptions) -> int:
    """Tokens of which a KV block is a multiple: a signature is relative to the mean of 128 keys."""
    return BLOCK_TOKENS if options.has_signatures else TILE_TOKENS


def check_config(vllm_config: Any, options: MagicPigOptions) -> None:
    """Raises ValueError for a feature of the whole configuration that magicpig cannot serve."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise refusal(
            f"speculative decoding ({vllm_config.speculative_config.method})",
            "one token per decode step",
            "drop --speculative-config",
        )
    if cache.kv_offloading_size is not None:  # of which vLLM makes a KV connector
        raise refusal(
            f"KV offloading (--kv-offloading-size {cache.kv_offloading_size})",
            "KV pages that it keeps in host memory by itself",
            "drop --kv-offloading-size",
        )
    if vllm_config.kv_transfer_config is not None:
        raise refusal(
            f"the KV connector {vllm_config.kv_transfer_config.kv_connector}",
            "KV pages that stay in this process",
            "drop --kv-transfer-config",
        )
    if str(cache.cache_dtype) not in ("auto", "float16", "bfloat16", "float32"):
        raise refusal(
            f"KV cache dtype {cache.cache_dtype}",
            "auto, float16, bfloat16 and float32",
            "drop --kv-cache-dtype",
        )
    if model is not None and str(cache.cache_dtype) not in ("auto", _name(model.dtype)):
        # Pages hold rows as the model makes them.
        raise refusal(
            f"KV cache dtype {cache.cache_dtype} for a model in {_name(model.dtype)}",
            "the model's own dtype",
            "drop --kv-cache-dtype",
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise refusal(
            "context parallelism (decode "
            f"{parallel.decode_context_parallel_size}, prefill "
            f"{parallel.prefill_context_parallel_size})",
            "a size of 1 for both",
            "use --tensor-parallel-size instead",
        )
    multiple = block_size_multiple(options)
    if cache.block_size is not None and cache.block_size % multiple:
        with_index = ' with index "signatures"' if options.has_signatures else ""
        raise refusal(
            f"block size {cache.block_size}{with_index}",
            f"multiples of {multiple}{with_index and ' there'}",
            "pass --block-size 128",
        )
    if model is None:
        return
    if model.use_mla:
        raise refusal("MLA attention", "multi-head and grouped-query attention", ANOTHER_BACKEND)
    if model.is_hybrid or model.is_attention_free:
        raise refusal(
            "a model with Mamba or linear-attention layers",
            "attention layers only",
            ANOTHER_BACKEND,
        )
    if model.is_encoder_decoder:
        raise refusal("an encoder-decoder model", "decoder-only models", ANOTHER_BACKEND)
    if model.is_diffusion:
        raise refusal(
            "a diffusion model, whose blocks attend in both directions",
            "causal attention",
            ANOTHER_BACKEND,
        )
    if model.runner_type != "generate":
        raise refusal(
            f"a {model.runner_type} model, which never decodes",
            "models that generate text",
            ANOTHER_BACKEND,
        )
    chunk_size = model.attention_chunk_size
    if chunk_size is not None and cache.block_size is not None and chunk_size % cache.block_size:
        fits = [n for n in (128, 96, 64, 32) if chunk_size % n == 0 and n % multiple == 0]
        raise refusal(
            f"attention chunks of {chunk_size} tokens with block size {cache.block_size}",
            "blocks that divide the chunks",
            f"pass --block-size {fits[0]}" if fits else ANOTHER_BACKEND,
        )


def check_device_config(vllm_config: Any) -> None:
    """Raises ValueError for what cannot go together with pages in a pinned host pool."""
    if vllm_config.model_config is not None and vllm_config.model_config.enable_sleep_mode:
        raise refusal(
            "sleep mode", "an engine that keeps its host pool", "drop --enable-sleep-mode"
        )
    if vllm_config.parallel_config.use_ubatching:
        raise refusal(
            "dual batch overlap", "one batch per step", "drop --enable-dbo and --ubatch-size"
        )


def check_dense_layers(options: MagicPigOptions, num_layers: int) -> None:
    """Raises ValueError for dense_layers that the model lacks, and where they leave none to sample.

    An error, not a warning: whoever names this backend would get another one under its name.
    """
    beyond = [index for index in options.dense_layers or () if index >= num_layers]
    if beyond:
        raise refusal(
            f"dense_layers {beyond} of a model of {num_layers} layers",
            f"indices from 0 to {num_layers - 1}",
            "correct it in --additional-config",
        )
    if all(options.is_dense(index) for index in range(num_layers)):
        raise nothing_sampled(num_layers, num_local=0)


def nothing_sampled(num_layers: int, num_local: int) -> ValueError:
    """The error for a model without a layer to sample; num_local: how many of its attention layers have
    a sliding window or chunks."""
    if num_local == num_layers:
        remedy = ANOTHER_BACKEND
    else:
        remedy = 'pass "dense_layers": [] in --additional-config'
    return refusal(
        f"a model whose {num_layers} attention layers are all dense ({num_local} of them because their "
        "attention is local)",
        "models with at least one layer to sample",
        remedy,
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
        raise refusal("ALiBi position biases", "rotary or no position encoding", ANOTHER_BACKEND)
    if logits_soft_cap:
        raise refusal(f"a logits soft cap of {logits_soft_cap}", "no soft cap", ANOTHER_BACKEND)
    if attn_type != "decoder":
        raise refusal(f"attention type {attn_type}", "decoder", ANOTHER_BACKEND)
    if kv_sharing_target_layer_name is not None:
        raise refusal(
            f"KV sharing with layer {kv_sharing_target_layer_name}",
            "layers with their own KV cache",
            ANOTHER_BACKEND,
        )
    if extra.get("sinks") is not None:
        raise refusal("learnt attention sinks", "plain softmax attention", ANOTHER_BACKEND)
    unknown = sorted(name for name, value in extra.items() if value is not None)
    if unknown:
        raise refusal(f"the attention argument {unknown[0]}", "plain attention", ANOTHER_BACKEND)
    if not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE or head_size % HEAD_SIZE_MULTIPLE:
        raise refusal(
            f"head size {head_size}",
            f"multiples of {HEAD_SIZE_MULTIPLE} from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}",
            ANOTHER_BACKEND,
        )
    if num_heads % num_kv_heads or num_heads // num_kv_heads > 64:
        raise refusal(
            f"{num_heads} query heads over {num_kv_heads} kv heads",
            "groups of 1 to 64 query heads",
            ANOTHER_BACKEND,
        )


def _name(dtype: Any) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def refusal(value: str, allowed: str, remedy: str) -> ValueError:
    return ValueError(f"magicpig does not support {value}, it supports {allowed}; {remedy}.")
