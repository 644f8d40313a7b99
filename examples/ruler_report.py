"""Tables (text and JSON) and a plot of the records of one or more methods."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from compare_report import table
from ruler_record import Record

AVERAGE = "average"


@dataclass(frozen=True)
class Cell:
    """score: mean over the scored samples, in [0, 1], None where none could be scored; rows_fraction:
    mean share of the middle's rows that decode read, None where it is not known."""

    method: str
    protocol: str
    task: str
    length: int
    samples: int
    scored: int
    score: float | None
    rows_fraction: float | None


@dataclass(frozen=True)
class Agreement:
    """Of two methods: how many of the samples that both answered have the same answer, to the letter
    and first token aside."""

    methods: tuple[str, str]
    equal: int
    samples: int


def cells(records: Iterable[Record], score_from: int) -> list[Cell]:
    """One per (method, protocol, task, length), in the order of their first record."""
    grouped: dict[tuple[str, str, str, int], list[Record]] = {}
    for record in records:
        key = record.method, record.protocol, record.task, record.length
        grouped.setdefault(key, []).append(record)
    found = []
    for (method, protocol, task, length), group in grouped.items():
        scores = [s for record in group if (s := record.score(score_from)) is not None]
        rows = [r.rows_fraction for r in group if r.rows_fraction is not None]
        found.append(
            Cell(
                method=method,
                protocol=protocol,
                task=task,
                length=length,
                samples=len(group),
                scored=len(scores),
                score=fmean(scores) if scores else None,
                rows_fraction=fmean(rows) if rows else None,
            )
        )
    return found


def agreements(records: Sequence[Record]) -> list[Agreement]:
    """For every two methods of one protocol that share samples."""
    said: dict[tuple[str, str], dict[tuple[str, int, int], str]] = {}
    for record in records:
        answers = said.setdefault((record.method, record.protocol), {})
        answers[record.task, record.length, record.index] = record.rest
    found = []
    for a, b in combinations(said, 2):
        shared = said[a].keys() & said[b].keys()
        if a[1] == b[1] and shared:
            equal = sum(said[a][key] == said[b][key] for key in shared)
            found.append(Agreement((a[0], b[0]), equal, len(shared)))
    return found


def text_report(found: Sequence[Cell], agreed: Sequence[Agreement], score_from: int) -> str:
    """A table per protocol and length: tasks down, methods across, scores in percent."""
    parts = []
    for protocol in dict.fromkeys(cell.protocol for cell in found):
        for length in sorted({cell.length for cell in found if cell.protocol == protocol}):
            here = [c for c in found if c.protocol == protocol and c.length == length]
            parts.append(f"{protocol}, {length} tokens, {_what_is_scored(score_from)}\n")
            parts.append(_length_table(here) + "\n")
    if agreed:
        parts.append("Answers that are equal, first token aside:\n")
        parts += [f"- {' and '.join(a.methods)}: {a.equal} of {a.samples}" for a in agreed]
    return "\n".join(parts)


def _what_is_scored(score_from: int) -> str:
    return "score in % of the whole answer" if score_from == 1 else (
        "score in % of the answer from its second token on"
    )  # fmt: skip


def _length_table(here: Sequence[Cell]) -> str:
    methods = list(dict.fromkeys(cell.method for cell in here))
    tasks = list(dict.fromkeys(cell.task for cell in here))
    at = {(cell.task, cell.method): cell for cell in here}
    rows = [[task, *(_percent(_score(at.get((task, m)))) for m in methods)] for task in tasks]
    scores = [[_score(at.get((task, m))) for task in tasks] for m in methods]
    rows.append([AVERAGE, *(_percent(average(column)) for column in scores)])
    fractions = [
        [c.rows_fraction for c in here if c.method == m and c.rows_fraction is not None]
        for m in methods
    ]
    rows.append(["rows read, %", *(_percent(fmean(f) if f else None, 2) for f in fractions)])
    counts = [[c.samples for c in here if c.method == m] for m in methods]
    rows.append(["samples", *(str(sum(column)) for column in counts)])
    return table(["task", *methods], rows)


def _score(cell: Cell | None) -> float | None:
    return None if cell is None else cell.score


def average(scores: Sequence[float | None]) -> float | None:
    """Of all tasks, or None as long as one of them is missing: half an average misleads."""
    return None if None in scores or not scores else fmean(s for s in scores if s is not None)


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def json_report(
    found: Sequence[Cell], agreed: Sequence[Agreement], score_from: int, settings: Any
) -> str:
    content = {
        "settings": settings,
        "score_from": score_from,
        "cells": [asdict(cell) for cell in found],
        "agreements": [asdict(agreement) for agreement in agreed],
    }
    return json.dumps(content, indent=2) + "\n"


def plot(found: Sequence[Cell], path: Path) -> None:
    """Score against length, a panel per task and one of their average; raises ImportError without
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(cell.task for cell in found))
    lengths = sorted({cell.length for cell in found})
    lines = list(dict.fromkeys((cell.method, cell.protocol) for cell in found))
    panels = [*tasks, AVERAGE] if len(tasks) > 1 else tasks
    columns = min(4, len(panels))
    num_rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        num_rows,
        columns,
        figsize=(3.6 * columns, 2.8 * num_rows + 0.5 + 0.2 * len(lines)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    at = {(c.method, c.protocol, c.task, c.length): c.score for c in found}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, (method, protocol) in enumerate(lines):
            shown = tasks if panel == AVERAGE else [panel]
            points = [
                (n, 100 * value)
                for n in lengths
                if (value := average([at.get((method, protocol, task, n)) for task in shown]))
                is not None
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker="os^Dv*"[number % 6],
                    label=f"{method}, {protocol}",
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n / 1024:g}K" for n in lengths])
        axis.minorticks_off()
        axis.set(title=panel, ylim=(-3, 103))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", fontsize="small")
    figure.supylabel("score, %")
    figure.supxlabel("prompt and answer, tokens")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
