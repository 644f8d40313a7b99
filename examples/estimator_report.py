"""Tables and plots of estimator_error.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bench_report import Report
from estimator_measure import BASELINES, Measured

ALL = "all"


def pooled(measured: Sequence[Measured]) -> list[Measured]:
    """One more per contender: all sources together."""
    found: dict[tuple[str, float], Measured] = {}
    for one in measured:
        of = found.setdefault((one.label, one.budget), Measured(ALL, one.label, one.budget))
        of.errors += one.errors
        of.fractions += one.fractions
    return list(found.values())


def summary(one: Measured) -> dict[str, Any]:
    """What the JSON keeps of it."""
    return {
        "source": one.source,
        "method": one.label,
        "budget": one.budget or None,
        "rows": one.rows,
        "figures": len(one.errors),
        **{f"error_p{percent}": one.error(percent) for percent in (50, 90, 99)},
        **{
            f"rows_p{percent}": float(np.percentile(one.fractions, percent))
            for percent in (1, 50, 90, 99, 100)
        },
    }


def print_errors(report: Report, title: str, measured: Sequence[Measured]) -> None:
    """A line per contender: rows, error over everything, and the median of each source."""
    sources = list(dict.fromkeys(one.source for one in measured))
    by = {(one.label, one.budget, one.source): one for one in measured}
    lines = []
    for one in pooled(measured):
        parts = [by[one.label, one.budget, source] for source in sources]
        lines.append(
            (
                one.label,
                f"{100 * one.budget:g} %" if one.budget else "-",
                f"{100 * one.rows:.2f}",
                " / ".join(f"{one.error(percent):.3f}" for percent in (50, 90, 99)),
                *(f"{part.error(50):.3f}" for part in parts),
            )
        )
    header = ("method", "budget", "rows %", "error p50 / p90 / p99", *sources)
    report.print_table(title, header, lines)


def print_sizes(report: Report, measured: Sequence[Measured]) -> None:
    """How many rows a head takes where nothing bounds them."""
    lines = []
    for one in [*measured, *pooled(measured)]:
        shares = 100 * np.percentile(one.fractions, (1, 50, 90, 99, 100))
        lines.append((one.source, one.label, *(f"{share:.2f}" for share in shares)))
    report.print_table(
        "Sample size without a budget, % of the middle, over queries, heads and seeds",
        ("source", "method", "p1", "p50", "p90", "p99", "max"),
        lines,
    )


def plot_errors(report: Report, name: str, measured: Sequence[Measured]) -> None:
    """Median error against rows, a panel per source; baselines dashed."""
    sources = list(dict.fromkeys(one.source for one in measured))
    labels = list(dict.fromkeys(one.label for one in measured))

    def draw(panels: Any) -> None:
        from matplotlib import colormaps

        for axes, source in zip(np.atleast_1d(panels), sources, strict=True):
            for number, label in enumerate(labels):
                of = [one for one in measured if (one.source, one.label) == (source, label)]
                axes.plot(
                    [100 * one.rows for one in of],
                    [one.error(50) for one in of],
                    linestyle="--" if label in BASELINES else "-",
                    marker="o",
                    markersize=4,
                    color=colormaps["tab20"](number % 20),
                    label=label,
                )
            axes.set(xscale="log", yscale="log", title=source, xlabel="rows gathered, %")
            axes.grid(alpha=0.3)
        np.atleast_1d(panels)[0].set_ylabel("relative output error, median")
        np.atleast_1d(panels)[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))

    report.plot(name, 3.2 * len(sources) + 1.6, draw, panels=len(sources))


def plot_sizes(report: Report, name: str, measured: Sequence[Measured]) -> None:
    """Distribution of the sample size, a step curve per source."""

    def draw(axes: Any) -> None:
        for one in measured:
            shares = 100 * np.sort(one.fractions)
            axes.step(shares, np.arange(1, len(shares) + 1) / len(shares), label=one.source)
        axes.set(xlabel="rows sampled, % of the middle", ylabel="share of queries, heads and seeds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    report.plot(name, 6, draw)
