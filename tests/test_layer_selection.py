"""Every kind of attention layer that vLLM 0.32 and 0.33 know, one test for each row of docs/models.md:
sampled, left to the platform's backend in vLLM's wrapper, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import (
    Attention,
    ChunkedLocalAttention,
    CrossAttention,
    EncoderOnlyAttention,
    StaticSinkAttention,
)
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import (
    PrefillPrefixLMAttention,
)
from vllm.model_executor.layers.attention.rswa_attention import RSWAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_magicpig.backend import MagicPigBackend, MagicPigImpl, with_options
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.layer_selection import select_layers

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="about vLLM's CPU build, and this is a CUDA build"
)

SAMPLE_ALL = MagicPigOptions(dense_layers=())
SAMPLED_BACKEND = with_options(MagicPigBackend, SAMPLE_ALL)


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tiny")
    LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, attention_backend="magicpig", block_size=128
    )
    return arguments.create_engine_config()


@pytest.fixture
def config(engine_config: VllmConfig) -> Iterator[VllmConfig]:
    """As while vLLM makes a model: current, without layers yet, in the model's dtype."""
    engine_config.compilation_config.static_forward_context.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(engine_config):
            yield engine_config
    finally:
        torch.set_default_dtype(torch.float32)


def make(kind: Callable[..., Any], config: VllmConfig, index: int = 0, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {
        "num_heads": 4,
        "head_size": 64,
        "scale": 0.125,
        "num_kv_heads": 2,
        "cache_config": config.cache_config,
        "prefix": f"model.layers.{index}.attn",
    }
    return kind(**defaults | arguments)


def select(config: VllmConfig, options: MagicPigOptions = SAMPLE_ALL) -> None:
    select_layers(config, options, SAMPLED_BACKEND)


def is_sampled(layer: Any) -> bool:
    is_ours = type(layer.impl) is MagicPigImpl
    assert (layer.attn_backend is SAMPLED_BACKEND) == is_ours
    assert layer.backend.name == ("MAGICPIG" if is_ours else "CPU_ATTN")
    return is_ours


def test_ordinary_layers_are_sampled_but_those_of_dense_layers(config: VllmConfig) -> None:
    layers = [make(Attention, config, index) for index in range(3)]
    select(config, MagicPigOptions(dense_layers=(1,)))
    assert [is_sampled(layer) for layer in layers] == [True, False, True]
    assert [layers[0].impl.layer_index, layers[2].impl.layer_index] == [0, 2]
    assert layers[1].attn_backend.__name__ == "CPUAttentionBackend"


def test_sliding_windows_stay_with_the_platforms_backend(config: VllmConfig) -> None:
    window = make(Attention, config, 0, per_layer_sliding_window=128)
    plain = make(Attention, config, 1)
    select(config)
    assert [is_sampled(window), is_sampled(plain)] == [False, True]
    assert window.impl.sliding_window == 128


def test_local_chunks_stay_with_the_platforms_backend_in_their_wrapper(config: VllmConfig) -> None:
    chunks = make(ChunkedLocalAttention, config, 0, attention_chunk_size=64)
    plain = make(Attention, config, 1)
    select(config)
    assert [is_sampled(chunks), is_sampled(plain)] == [False, True]
    (cpu_backend,) = chunks.attn_backend.__bases__
    assert cpu_backend.__name__ == "CPUAttentionBackend"
    assert chunks.attn_backend is create_chunked_local_attention_backend(cpu_backend, 64)
    assert isinstance(chunks.impl, cpu_backend.get_impl_cls())


def test_a_wrapper_that_nobody_knows_is_refused(config: VllmConfig) -> None:
    """Also around an ordinary layer: its metadata builder may do anything."""
    layer = make(Attention, config)
    layer.attn_backend = type("Reversed", (layer.attn_backend,), {})
    with pytest.raises(ValueError) as caught:
        select(config, MagicPigOptions(dense_layers=(0,)))
    assert str(caught.value) == (
        "magicpig does not support attention layer model.layers.0.attn of the kind Attention over "
        "Reversed, it supports Attention and ChunkedLocalAttention over its own backend; choose "
        "another --attention-backend for it."
    )


class NewKind(torch.nn.Module, AttentionLayerBase):
    """As models bring their own: lightning attention, sparse indexers, compressors."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__()
        config.compilation_config.static_forward_context["model.layers.3.indexer"] = self

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> None:
        return None


def test_a_layer_of_a_models_own_is_refused(config: VllmConfig) -> None:
    make(Attention, config)
    NewKind(config)
    with pytest.raises(ValueError, match=r"model\.layers\.3\.indexer of the kind NewKind,"):
        select(config)


def test_a_layer_with_a_backend_of_its_models_choice_is_refused(config: VllmConfig) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    make(Attention, config, 0)
    make(Attention, config, 1, attn_backend=CPUAttentionBackend)
    with pytest.raises(
        ValueError, match=r"layers\.1\.attn of the kind Attention over CPUAttention"
    ):
        select(config)


@pytest.mark.parametrize(
    ("kind", "arguments", "over"),
    [
        (PrefillPrefixLMAttention, {}, "EncoderOnlyAttention_MagicPigBackend"),
        (StaticSinkAttention, {"sink_len": 32}, "StaticSink_MagicPigBackend"),
        (RSWAAttention, {"rswa_window": 128}, "MagicPigBackend"),
    ],
)
def test_kinds_that_load_are_refused_before_the_first_request(
    config: VllmConfig, kind: type[Any], arguments: dict[str, Any], over: str
) -> None:
    make(kind, config, **arguments)
    with pytest.raises(ValueError, match=rf"of the kind {kind.__name__} over {over}, it supports"):
        select(config, MagicPigOptions(dense_layers=(0,)))


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        (
            EncoderOnlyAttention,
            {},
            "cannot run this model (attention type AttentionType.ENCODER_ONLY not",
        ),
        (
            CrossAttention,
            {},
            "cannot run this model (attention type AttentionType.ENCODER_DECODER not",
        ),
        (Attention, {"attn_type": "encoder"}, "cannot run this model (attention type encoder not"),
        (Attention, {"sinks": torch.zeros(4)}, "cannot run this model (attention sinks not"),
        (Attention, {"alibi_slopes": [0.5] * 4}, "does not support ALiBi position biases"),
        (Attention, {"logits_soft_cap": 30.0}, "does not support a logits soft cap of 30.0"),
        (
            Attention,
            {"use_alibi_sqrt": True},
            "use_alibi_sqrt is not supported by backend MAGICPIG",
        ),
        (
            Attention,
            {"kv_sharing_target_layer_name": "model.layers.9.attn"},
            "does not support KV sharing with layer model.layers.9.attn",
        ),
        (
            Attention,
            {"layer_idx": 0, "dual_chunk_attention_config": {"chunk_size": 64}},
            "does not support the attention argument dual_chunk_attention_config",
        ),
        (Attention, {"head_size": 36}, "does not support head size 36"),
    ],
)
def test_kinds_that_are_refused_as_they_are_made(
    config: VllmConfig, kind: type[Any], arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        make(kind, config, **arguments)
    assert sentence in str(caught.value)


def test_chunks_with_lookback_are_refused_by_vllm(config: VllmConfig) -> None:
    with pytest.raises(AssertionError, match="requires the Triton backend, but got MAGICPIG"):
        make(Attention, config, chunk_lookback=1)


def test_block_pooling_is_refused_by_vllm(config: VllmConfig) -> None:
    from vllm.model_executor.models.whisper_causal import WhisperCausalAttentionWithBlockPooling

    with pytest.raises(NotImplementedError, match=r"MagicPigBackend'> is not yet supported"):
        make(WhisperCausalAttentionWithBlockPooling, config, block_pool_size=2)


def test_bidirectional_attention_to_images_is_refused(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(Attention, config)
    layer.use_mm_prefix = True
    with pytest.raises(ValueError, match="does not support bidirectional attention to images"):
        select(config)
    config.compilation_config.static_forward_context.clear()
    assert config.model_config is not None
    monkeypatch.setattr(config.model_config, "is_mm_prefix_lm", True)
    with pytest.raises(ValueError, match="partial multimodal token full attention not supported"):
        make(Attention, config)


def test_values_of_another_head_size_are_refused(config: VllmConfig) -> None:
    make(Attention, config, head_size_v=32)
    with pytest.raises(ValueError, match="values of head size 32 beside keys of 64"):
        select(config)


def test_a_checkpoints_own_kv_cache_dtype_is_refused(config: VllmConfig) -> None:
    layer = make(Attention, config)
    layer.kv_cache_dtype, layer.kv_cache_torch_dtype = "fp8", torch.uint8
    with pytest.raises(ValueError, match=r"KV cache dtype fp8 for a model in torch\.bfloat16"):
        select(config)


@pytest.mark.parametrize("head_size", [16, 72, 120])
def test_a_head_size_that_the_dense_layers_lack_is_refused_with_the_remedy(
    config: VllmConfig, head_size: int
) -> None:
    layers = [make(Attention, config, index, head_size=head_size) for index in range(2)]
    with pytest.raises(ValueError) as caught:
        select(config, MagicPigOptions(dense_layers=(1,)))
    assert str(caught.value) == (
        f"magicpig does not support head size {head_size} in layer 1, which is dense, it supports "
        "there what CPU_ATTN does (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512); pass "
        '"dense_layers": [] in --additional-config.'
    )
    config.compilation_config.static_forward_context.clear()
    layers = [make(Attention, config, index, head_size=head_size) for index in range(2)]
    select(config)
    assert all(is_sampled(layer) for layer in layers)


def test_a_head_size_that_sliding_windows_lack_has_no_remedy_here(config: VllmConfig) -> None:
    make(Attention, config, 0, head_size=72)
    make(Attention, config, 1, head_size=72, per_layer_sliding_window=64)
    with pytest.raises(ValueError, match=r"72 in layer 1, which is local, .* never sampled"):
        select(config)


def test_a_model_without_a_layer_to_sample_is_refused(config: VllmConfig) -> None:
    for index in range(2):
        make(Attention, config, index, per_layer_sliding_window=128)
    with pytest.raises(ValueError, match=r"whose 2 attention layers are all dense \(2 of them"):
        select(config)
