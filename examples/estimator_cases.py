"""What methods are measured on: decode steps over keys and values that were made up or captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_geometries import GEOMETRIES, generate

from vllm_magicpig.accuracy.methods import softmax_attention
from vllm_magicpig.accuracy.transformers_attention import CapturedLayer, capture

SYNTHETIC_KV_HEADS = 2
SYNTHETIC_HEAD_DIM = 128


@dataclass(frozen=True)
class Case:
    """Decode steps of one layer; step i attends to the first lengths[i] tokens, in ascending order.

    source: a geometry, or the model that the rows are from; name: of the case within it; queries:
    float32 [steps, num_q_heads, head_dim]; keys, values: float32 [num_kv_heads, n, head_dim]; scale:
    of the logits; exact: float64 [steps, num_q_heads, head_dim].
    """

    source: str
    name: str
    layer_index: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: Sequence[int]
    scale: float
    exact: torch.Tensor


def exact_steps(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Dense attention of each step in float64; shapes as in Case."""
    k, v = keys.double(), values.double()
    outs = []
    for query, n in zip(queries.double(), lengths, strict=True):
        grouped = query.reshape(len(k), -1, query.shape[1])
        logits = scale * torch.bmm(grouped, k[:, :n].transpose(1, 2)).flatten(0, 1)
        outs.append(softmax_attention(logits, v[:, :n]))
    return torch.stack(outs)


def synthetic_cases(
    names: Sequence[str], num_tokens: int, seeds: Sequence[int], steps: int
) -> Iterator[Case]:
    """One case per geometry and seed; made when asked for, since each takes tens of megabytes."""
    for name in names:
        for seed in seeds:
            layer = generate(name, num_tokens, num_kv_heads=SYNTHETIC_KV_HEADS, seed=seed)
            queries = layer.queries(steps, seed=seed + 1)
            lengths = [num_tokens] * steps
            scale = SYNTHETIC_HEAD_DIM**-0.5
            exact = exact_steps(queries, layer.keys, layer.values, lengths, scale)
            keys, values = layer.keys, layer.values
            yield Case(name, f"seed {seed}", seed, queries, keys, values, lengths, scale, exact)


def captured_case(source: str, name: str, layer: CapturedLayer) -> Case:
    lengths = [position + 1 for position in layer.query_positions.tolist()]
    exact = exact_steps(layer.queries, layer.keys, layer.values, lengths, layer.scale)
    return Case(
        source,
        name,
        layer.layer_index,
        layer.queries,
        layer.keys,
        layer.values,
        lengths,
        layer.scale,
        exact,
    )


def captured_cases(
    source: str,
    model: Any,
    texts: Sequence[torch.Tensor],
    steps: int,
    layers: Sequence[int] | None,
    by_layer: bool,
) -> Iterator[Case]:
    """One case per text and layer of `model`; texts: token ids, int64 [n] each; by_layer: each layer is
    a source of its own."""
    for number, text in enumerate(texts):
        for layer in capture(model, text, steps, layers):
            of_layer = f"{source}, layer {layer.layer_index}"
            name = f"layer {layer.layer_index}, text {number}"
            yield captured_case(of_layer if by_layer else source, name, layer)


def load_model(path: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face model by path or name; one sentence for what is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"model {path!r} cannot be loaded ({reason}); give the folder or the hub's name of a "
            "causal language model."
        ) from error
    return model.eval(), tokenizer


def text_tokens(tokenizer: Any, path: Path, num_tokens: int, num_texts: int) -> list[torch.Tensor]:
    """`num_texts` pieces of `num_tokens` token ids from a text file, one after another."""
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise SystemExit(
            f"text {str(path)!r} cannot be read ({error.strerror}); give a plain text file."
        ) from error
    ids = tokenizer(content, return_tensors="pt").input_ids[0]
    if len(ids) < num_tokens * num_texts:
        raise SystemExit(
            f"text {str(path)!r} has {len(ids)} tokens, but {num_texts} of {num_tokens} are asked for; "
            "give a longer text or a smaller --tokens."
        )
    return list(ids[: num_tokens * num_texts].split(num_tokens))


def check_length(model: Any, num_tokens: int) -> None:
    """Raises SystemExit where the model's positions end earlier."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and num_tokens > most:
        raise SystemExit(
            f"--tokens is {num_tokens}, but the model knows {most} positions; give at most that."
        )


def check_geometries(text: str) -> list[str]:
    """A comma-separated list of geometries; raises ValueError for an unknown one."""
    names = text.split(",")
    for name in names:
        if name not in GEOMETRIES:
            raise ValueError(f"geometry {name!r} is none of {', '.join(GEOMETRIES)}.")
    return names
