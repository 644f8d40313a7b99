"""What is refused at start-up: one sentence with value, what is allowed and a remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.support import check_config, check_layer


def config(**changes: Any) -> SimpleNamespace:
    """A vLLM configuration that is fine but for `changes`; `a__b` changes b of a."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            is_encoder_decoder=False,
            is_diffusion=False,
            runner_type="generate",
            attention_chunk_size=None,
            dtype="torch.float16",
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=128, kv_offloading_size=None),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        target = made
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return made


BUCKETS, SIGNATURES = MagicPigOptions(index="buckets"), MagicPigOptions(index="signatures")

LAYER: dict[str, Any] = {
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_size": 128,
    "alibi_slopes": None,
    "logits_soft_cap": None,
    "attn_type": "decoder",
    "kv_sharing_target_layer_name": None,
    "extra": {},
}


def test_ordinary_models_pass() -> None:
    check_config(config(), BUCKETS)
    check_config(config(cache_config__cache_dtype="float16"), BUCKETS)
    check_config(config(model_config=None), BUCKETS)
    check_config(config(model_config__attention_chunk_size=8192), BUCKETS)
    check_layer(**LAYER)
    check_layer(**LAYER | {"extra": {"sinks": None}})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__is_hybrid": True}, "Mamba"),
        ({"model_config__is_attention_free": True}, "Mamba"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_config__is_diffusion": True}, "diffusion"),
        ({"model_config__runner_type": "pooling"}, "a pooling model, which never decodes"),
        ({"model_config__attention_chunk_size": 64}, "chunks of 64 tokens with block size 128"),
        ({"cache_config__kv_offloading_size": 4.0}, "(--kv-offloading-size 4.0)"),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "fp8_e4m3"),
        ({"cache_config__cache_dtype": "bfloat16"}, "bfloat16 for a model in float16"),
        ({"cache_config__block_size": 16}, "block size 16"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode 2"),
        ({"parallel_config__prefill_context_parallel_size": 4}, "prefill 4"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, "ngram"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="NixlConnector")}, "NixlConnector"),
    ],
)
def test_refused_configurations(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_config(config(**change), BUCKETS)
    assert_sentence(str(caught.value), named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "30.0"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target_layer_name": "model.layers.3"}, "model.layers.3"),
        ({"extra": {"sinks": object()}}, "sinks"),
        ({"extra": {"chunk_lookback": 3}}, "chunk_lookback"),
        ({"head_size": 36}, "head size 36"),
        ({"head_size": 512}, "head size 512"),
        ({"num_heads": 130, "num_kv_heads": 2}, "130 query heads"),
    ],
)
def test_refused_layers(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_layer(**LAYER | change)
    assert_sentence(str(caught.value), named)


@pytest.mark.parametrize(
    ("chunk_size", "remedy"),
    [
        (64, "pass --block-size 64"),
        (96, "pass --block-size 96"),
        (160, "pass --block-size 32"),
        (48, "choose another --attention-backend for it"),
    ],
)
def test_a_block_size_that_divides_the_chunks_is_named(chunk_size: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"blocks that divide the chunks; {remedy}\.$"):
        check_config(config(model_config__attention_chunk_size=chunk_size), BUCKETS)


@pytest.mark.parametrize("block_size", [32, 64, 96, 192])
def test_signatures_take_blocks_of_128_tokens(block_size: int) -> None:
    """A signature is relative to the mean of its own 128 keys."""
    for whole in (128, 256):
        check_config(config(cache_config__block_size=whole), SIGNATURES)
    smaller = config(cache_config__block_size=block_size)
    check_config(smaller, BUCKETS)
    check_config(smaller, MagicPigOptions(index="signatures", K=0))
    with pytest.raises(ValueError) as caught:
        check_config(smaller, SIGNATURES)
    assert str(caught.value) == (
        f'magicpig does not support block size {block_size} with index "signatures", it supports '
        "multiples of 128 there; pass --block-size 128."
    )


def test_no_block_size_is_named_that_the_index_lacks() -> None:
    chunked = config(model_config__attention_chunk_size=192)
    with pytest.raises(ValueError, match=r"chunks; pass --block-size 96\.$"):
        check_config(chunked, BUCKETS)
    with pytest.raises(ValueError, match=r"chunks; choose another --attention-backend for it\.$"):
        check_config(chunked, SIGNATURES)


def test_the_flag_that_was_set_is_the_flag_to_drop() -> None:
    """vLLM makes a connector of --kv-offloading-size, after the first check and before the second."""
    connector = SimpleNamespace(kv_connector="OffloadingConnector")
    with pytest.raises(ValueError, match=r"drop --kv-offloading-size\.$"):
        check_config(
            config(cache_config__kv_offloading_size=4.0, kv_transfer_config=connector), BUCKETS
        )
    with pytest.raises(ValueError, match=r"drop --kv-transfer-config\.$"):
        check_config(config(kv_transfer_config=connector), BUCKETS)


def assert_sentence(text: str, named: str) -> None:
    assert named in text
    assert text.startswith("magicpig does not support ")
    assert ", it supports " in text
    assert "; " in text
    assert text.endswith(".")
    assert "\n" not in text
