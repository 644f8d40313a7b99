"""What candidates for the options cost on captured q, k and v: rows read and output error, per head."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vllm_magicpig.accuracy.methods import MethodSettings, make_method
from vllm_magicpig.accuracy.transformers_attention import CapturedLayer
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.key_center import save_centers

Capture = Callable[[Sequence[int]], list[list[CapturedLayer]]]
"""Layer indices -> for each prompt its captured layers."""


@dataclass(frozen=True)
class LayerMeasure:
    """One candidate in one layer, over the queries of all prompts; float64.

    fractions: [num_queries, num_q_heads], rows sampled / rows of the middle; head_errors: the same
    shape, of `relative_error`; errors: [num_queries], the same of the outputs of all heads as one
    vector, in which a head weighs as much as its output does.
    """

    layer_index: int
    fractions: npt.NDArray[np.float64]
    head_errors: npt.NDArray[np.float64]
    errors: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModelMeasure:
    """centers: layer index -> float32 [num_kv_heads, head_size]; measures: for each candidate its
    layers, ascending."""

    centers: dict[int, torch.Tensor]
    measures: list[list[LayerMeasure]]


def groups_of_layers(
    layers: Sequence[int], bytes_per_layer: int, memory_bytes: int
) -> list[list[int]]:
    """Layers whose keys and values are held at the same time; one at least."""
    size = max(1, memory_bytes // max(bytes_per_layer, 1))
    return [list(layers[start : start + size]) for start in range(0, len(layers), size)]


def measure_layers(
    capture: Capture,
    groups: Sequence[Sequence[int]],
    candidates: Sequence[MagicPigOptions],
    measured: Callable[[], object],
) -> ModelMeasure:
    """Captures one group of layers after another and measures each candidate in each layer.

    The centre of a layer is the mean key of all prompts together, those that are measured.
    `measured` is called once for each prompt and layer.
    """
    centers: dict[int, torch.Tensor] = {}
    measures: list[list[LayerMeasure]] = [[] for _ in candidates]
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            by_prompt = capture(group)
            for same_layer in zip(*by_prompt, strict=True):
                index = same_layer[0].layer_index
                centers[index] = mean_key(same_layer)
                file = Path(folder) / f"{index}.safetensors"
                save_centers(file, {index: centers[index]})
                parts: list[list[LayerMeasure]] = [[] for _ in candidates]
                for captured in same_layer:
                    found = measure(captured, [replace(c, center=str(file)) for c in candidates])
                    for part, one in zip(parts, found, strict=True):
                        part.append(one)
                    measured()
                for layers, part in zip(measures, parts, strict=True):
                    layers.append(
                        LayerMeasure(
                            index,
                            np.concatenate([one.fractions for one in part]),
                            np.concatenate([one.head_errors for one in part]),
                            np.concatenate([one.errors for one in part]),
                        )
                    )
    return ModelMeasure(centers, measures)


def mean_key(captured: Sequence[CapturedLayer]) -> torch.Tensor:
    """Mean over the tokens of all prompts: float32 [num_kv_heads, head_size]."""
    total = sum(layer.keys.double().sum(dim=1) for layer in captured)
    assert isinstance(total, torch.Tensor)
    return (total / sum(layer.keys.shape[1] for layer in captured)).float()


def measure(captured: CapturedLayer, candidates: Sequence[MagicPigOptions]) -> list[LayerMeasure]:
    """Each candidate's estimate against exact attention for every captured query.

    A middle shorter than `exact_below` is sampled too: it stands for a longer one.
    """
    exact_method = make_method(MethodSettings("exact"), captured.layer_index, captured.scale)
    exact = [exact_method.attend(*step)[0] for step in _steps(captured)]
    # One after another: the codes of a long prompt take as much as its keys.
    return [_measure_one(captured, options, exact) for options in candidates]


def _measure_one(
    captured: CapturedLayer, options: MagicPigOptions, exact: Sequence[torch.Tensor]
) -> LayerMeasure:
    """exact: [num_q_heads, head_size] of each captured query."""
    settings = MethodSettings(
        "magicpig", rows=options.rows or 0.0, options=replace(options, exact_below=0)
    )
    method = make_method(settings, captured.layer_index, captured.scale)
    method.observe(captured.keys)  # hashes all keys at once
    num_queries, num_heads, _ = captured.queries.shape
    fractions = np.empty((num_queries, num_heads))
    head_errors, errors = np.empty_like(fractions), np.empty(num_queries)
    for q, (step, truth) in enumerate(zip(_steps(captured), exact, strict=True)):
        out, rows = method.attend(*step)
        middle = step[1].shape[1] - options.sink_tokens - options.window_tokens
        fractions[q] = rows.numpy() / middle
        head_errors[q] = relative_error(out, truth).numpy()
        errors[q] = relative_error(out.flatten(), truth.flatten()).numpy()
    return LayerMeasure(captured.layer_index, fractions, head_errors, errors)


def _steps(captured: CapturedLayer) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k and v of one decode step after another: a query sees keys up to its own position."""
    for query, position in zip(captured.queries, captured.query_positions.tolist(), strict=True):
        yield query, captured.keys[:, : position + 1], captured.values[:, : position + 1]


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|out - exact| / |exact| over the last dimension; 0 where both are zero, as of an unused head."""
    difference = (out - exact).norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / exact.norm(dim=-1))
