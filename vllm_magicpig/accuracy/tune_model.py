"""The model that is tuned: loaded with transformers, or refused where magicpig cannot serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ALTERNATIVE = "tune a model with ordinary attention layers"
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class ModelShape:
    """full_layers: indices of the layers without a sliding window, those that can be sampled;
    max_tokens: that the model takes."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_tokens: int
    full_layers: tuple[int, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one captured layer, float32."""
        return 2 * 4 * self.num_kv_heads * self.head_size


def load(name: str, device: str) -> tuple[Any, Any, ModelShape]:
    """(model in its own dtype, tokenizer, shape). Raises ValueError in one sentence."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        # First the small files: a model that is refused is not downloaded.
        shape = model_shape(AutoConfig.from_pretrained(name).get_text_config())
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        model.to(device).eval()
    except UnsupportedModel:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"model {name!r} cannot be loaded ({reason}); give a folder with its config, weights and "
            "tokenizer, or its name on the Hugging Face hub."
        ) from error
    return model, tokenizer, shape


class UnsupportedModel(ValueError):
    """The engine would refuse it, or sample none of its layers."""


def model_shape(config: Any) -> ModelShape:
    """config: of transformers, the text part. Raises UnsupportedModel for what magicpig cannot serve.

    Fields as in transformers 5.19.
    """
    if getattr(config, "kv_lora_rank", None):
        raise _refusal("MLA attention", "multi-head and grouped-query attention")
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal("an encoder-decoder model", "decoder-only models")
    if getattr(config, "attn_logit_softcapping", None):
        raise _refusal(f"a logits soft cap of {config.attn_logit_softcapping}", "no soft cap")
    if getattr(config, "alibi", False):
        raise _refusal("ALiBi position biases", "rotary or no position encoding")
    num_layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = getattr(config, "sliding_window", None) is not None and getattr(
            config, "use_sliding_window", True
        )
        types = [_SLIDING if slides else _FULL] * num_layers
    others = sorted(set(types) - {_SLIDING, _FULL})
    if others:
        raise _refusal(f"layers of type {others[0]}", "attention layers only")
    full = tuple(i for i, kind in enumerate(types) if kind == _FULL)
    if not full:
        raise _refusal("a sliding window in every layer", "layers that see the whole context")
    num_heads = config.num_attention_heads
    return ModelShape(
        num_layers,
        num_heads,
        getattr(config, "num_key_value_heads", None) or num_heads,
        getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        getattr(config, "max_position_embeddings", None) or 1 << 40,
        full,
    )


def _refusal(value: str, allowed: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"magicpig does not support {value}, it supports {allowed}; {_ALTERNATIVE}."
    )
