"""From measured candidates to a choice: (K, L, min_matches), dense layers, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_magicpig.accuracy.tune_measure import LayerMeasure
from vllm_magicpig.capacity import MAX_SEGMENT_TOKENS, segment_bytes
from vllm_magicpig.config import DENSE_LAYER_STRIDE, MagicPigOptions

PERCENTILES = (50, 90, 99)
_BLOCK_SIZE = 128  # vLLM's on both platforms, unless set


@dataclass(frozen=True)
class Choice:
    """candidate: index of the one recommended, and why; dense_layers: of each candidate, ascending."""

    candidate: int
    reason: str
    dense_layers: list[list[int]]


def choose(
    measures: Sequence[Sequence[LayerMeasure]], max_sampled: float, num_dense: int
) -> Choice:
    """Each candidate keeps its `num_dense` worst layers dense; by what remains they are compared.

    Layers and candidates alike are judged by the 90th percentile of their errors over the queries.
    The recommended candidate has the smallest among those that sample at most `max_sampled` of the
    middle on average; if none does, it is the one that samples least.
    """
    dense = [sorted(worst_first(layers)[:num_dense]) for layers in measures]
    kept = [without(layers, some) for layers, some in zip(measures, dense, strict=True)]
    fractions = [mean_fraction(layers) for layers in kept]
    errors = [percentile(layers, 90) for layers in kept]
    limit = f"at most {100 * max_sampled:g} % on average"
    allowed = [c for c, fraction in enumerate(fractions) if fraction <= max_sampled]
    if allowed:
        best = min(allowed, key=errors.__getitem__)
        return Choice(best, f"the smallest p90 of those that sample {limit}", dense)
    best = min(range(len(kept)), key=fractions.__getitem__)
    return Choice(best, f"the fewest rows, since none samples {limit}", dense)


def worst_first(layers: Sequence[LayerMeasure]) -> list[int]:
    """Layer indices by the 90th percentile of their errors."""
    ranked = sorted(layers, key=lambda layer: percentile([layer], 90), reverse=True)
    return [layer.layer_index for layer in ranked]


def default_dense(num_layers: int) -> list[int]:
    return list(range(0, num_layers, DENSE_LAYER_STRIDE))


def mean_fraction(layers: Sequence[LayerMeasure]) -> float:
    """Rows sampled / rows of the middle; 0 where no layer is sampled."""
    if not layers:
        return 0.0
    return float(np.mean(np.concatenate([layer.fractions.ravel() for layer in layers])))


def percentile(layers: Sequence[LayerMeasure], percent: float) -> float:
    """Of the layers' errors over their queries; 0 where no layer is sampled."""
    if not layers:
        return 0.0
    return float(np.percentile(np.concatenate([layer.errors.ravel() for layer in layers]), percent))


def without(layers: Sequence[LayerMeasure], dense: Sequence[int]) -> list[LayerMeasure]:
    return [layer for layer in layers if layer.layer_index not in dense]


def bytes_per_token(options: MagicPigOptions) -> int:
    """Codes and the largest segments, of one token and kv head. Short contexts take a little more."""
    codes = 2 * options.L
    segment = segment_bytes(1, options.K, options.L, _BLOCK_SIZE, MAX_SEGMENT_TOKENS)
    return codes + round(segment / MAX_SEGMENT_TOKENS)


def name(options: MagicPigOptions) -> str:
    rows = "" if options.rows is None else f" rows={options.rows:g}"
    return f"K={options.K} L={options.L} min_matches={options.min_matches}{rows}"


def candidate_table(
    candidates: Sequence[MagicPigOptions],
    measures: Sequence[Sequence[LayerMeasure]],
    choice: Choice,
) -> str:
    """Of each candidate over the layers that it does not keep dense."""
    rows = []
    for c, (options, layers) in enumerate(zip(candidates, measures, strict=True)):
        mark = "* " if c == choice.candidate else "  "
        dense = choice.dense_layers[c]
        figures_of = _row(without(layers, dense))
        rows.append([mark + name(options), *figures_of, f"{bytes_per_token(options)}", f"{dense}"])
    heads = ["  candidate", *_ROW, "bytes/token/kv head", "dense"]
    return table(heads, rows)


def layer_table(layers: Sequence[LayerMeasure], dense: Sequence[int]) -> str:
    """Worst layer first; with its worst head, by the same percentile."""
    by_index = {layer.layer_index: layer for layer in layers}
    rows = []
    for index in worst_first(layers):
        by_head = np.percentile(by_index[index].head_errors, 90, axis=0)
        worst = int(by_head.argmax())
        mark = "dense" if index in dense else ""
        row = _row([by_index[index]])
        rows.append([f"{index}", *row, f"{worst} ({by_head[worst]:.3f})", mark])
    return table(["layer", *_ROW, "worst head (p90)", ""], rows)


_ROW = ("sampled %", "p99 %", "error p50", "p90", "p99")


def _row(layers: Sequence[LayerMeasure]) -> list[str]:
    if not layers:
        return ["-"] * len(_ROW)
    fractions = np.concatenate([layer.fractions.ravel() for layer in layers])
    return [
        f"{100 * fractions.mean():.2f}",
        f"{100 * np.percentile(fractions, 99):.2f}",
        *(f"{percentile(layers, percent):.3f}" for percent in PERCENTILES),
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for cells in (heads, *rows):
        first = cells[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def summary(
    candidates: Sequence[MagicPigOptions],
    measures: Sequence[Sequence[LayerMeasure]],
    choice: Choice,
    default_dense: Sequence[int],
) -> str:
    """What the terminal shows: candidates, layers of the recommended one, sets of dense layers."""
    layers = measures[choice.candidate]
    dense = choice.dense_layers[choice.candidate]
    others = {
        f"{dense} (the largest p90)": percentile(without(layers, dense), 90),
        f"{list(default_dense)} (the backend's own)": percentile(
            without(layers, default_dense), 90
        ),
        "none": percentile(layers, 90),
    }
    return "\n".join(
        [
            "",
            "Over the layers that are not kept dense; error = |sampled - exact| / |exact| of the "
            "output of all heads to one query:",
            candidate_table(candidates, measures, choice),
            f"* recommended: {choice.reason}",
            "",
            f"Layers with {name(candidates[choice.candidate])}, worst first:",
            layer_table(layers, dense),
            "",
            "Layers kept dense, and the p90 of the others:",
            *(f"  {error:.3f}  {kept}" for kept, error in others.items()),
        ]
    )


def figures(
    candidates: Sequence[MagicPigOptions], measures: Sequence[Sequence[LayerMeasure]]
) -> list[dict[str, Any]]:
    """For the JSON: of each candidate, per layer, and per head of it."""
    return [
        {
            "K": options.K,
            "L": options.L,
            "min_matches": options.min_matches,
            "rows": options.rows,
            "bytes_per_token_and_kv_head": bytes_per_token(options),
            "layers": [_layer_figures(layer) for layer in layers],
        }
        for options, layers in zip(candidates, measures, strict=True)
    ]


def _layer_figures(layer: LayerMeasure) -> dict[str, Any]:
    return {
        "layer": layer.layer_index,
        **_summary(layer.fractions, layer.errors),
        "heads": [
            {"head": head, **_summary(layer.fractions[:, head], layer.head_errors[:, head])}
            for head in range(layer.head_errors.shape[1])
        ],
    }


def _summary(
    fractions: npt.NDArray[np.float64], errors: npt.NDArray[np.float64]
) -> dict[str, dict[str, float]]:
    return {
        key: {"mean": float(values.mean())}
        | {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
        for key, values in (("sampled_fraction", fractions), ("error", errors))
    }
