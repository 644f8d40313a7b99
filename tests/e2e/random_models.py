"""Small randomly initialised checkpoints of the architectures that magicpig has to serve.

Weights are drawn large enough that attention is far from uniform and greedy outputs vary, and are
rounded to bfloat16, so that float32 and bfloat16 engines load the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 512
MAX_LEN = 6400

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "max_position_embeddings": MAX_LEN,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

# Few heads: dense prefill of 6,000 tokens is what these tests spend their time on.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    "qwen2": Qwen2Config(**_COMMON, num_attention_heads=2, num_key_value_heads=1),
    "qwen3": Qwen3Config(**_COMMON, num_attention_heads=3, num_key_value_heads=1, head_dim=128),
    "mistral": MistralConfig(
        **_COMMON, num_attention_heads=2, num_key_value_heads=2, head_dim=80, sliding_window=None
    ),
    "gemma3": Gemma3TextConfig(
        **_COMMON | {"num_hidden_layers": 4},
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    # Phi-3's head size: 192 / 2 = 96.
    "phi3": Phi3Config(
        **_COMMON | {"hidden_size": 192}, num_attention_heads=2, num_key_value_heads=2
    ),
}

# Chunks of local attention in layers 0 to 2, a global layer without positions, dense MLPs.
CHUNKED_CONFIGS: dict[str, PretrainedConfig] = {
    "llama4": Llama4TextConfig(
        **_COMMON | {"num_hidden_layers": 4},
        architectures=["Llama4ForCausalLM"],
        intermediate_size_mlp=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_chunk_size=64,
        num_local_experts=2,
        moe_layers=[],
        interleave_moe_layer_step=5,
    ),
}


def write_random_model(name: str, folder: Path) -> Path:
    """Writes config.json and weights of that model to `folder`, without a tokenizer."""
    torch.manual_seed([*sorted(CONFIGS), *sorted(CHUNKED_CONFIGS)].index(name))
    config = (CONFIGS | CHUNKED_CONFIGS)[name]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            # Unit-variance activations, and logits spread enough for a clear first choice.
            gain = 3.0 if "lm_head" in parameter_name else 1.5
            if "embed_tokens" in parameter_name:
                parameter.normal_(std=1.0)
            else:
                parameter.normal_(std=gain / parameter.shape[1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
