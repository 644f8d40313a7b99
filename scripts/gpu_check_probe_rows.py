"""The part that asks single questions of driver and host, and what it says of them."""

from __future__ import annotations

from typing import Any

from gpu_check_children import DONE
from gpu_check_jobs import OFFLINE, script_task
from gpu_check_parts import Context, ask, ended_row
from gpu_check_report import FAILED, NOT_RUN, Part, Row, measured


def run_probes(part: Part, budget_s: float, context: Context) -> None:
    from gpu_check_probes import asked

    job = context.scale.probes
    task = script_task(
        "probes", "gpu_check_probes.py", job, OFFLINE, context.scratch, context.results
    )
    answered = ask(part, context, [task], budget_s)["probes"]
    said = {event["name"]: event for event in answered.all("probe")}
    part.raw["probes"]["answers"] = list(said.values())
    for probe in asked(not context.scale.is_rehearsal):
        event = said.get(probe.name)
        if event is None:
            part.rows.append(Row(probe.question, NOT_RUN, answered.ended.reason))
        else:
            part.rows.append(probe_row(probe.question, event))
    if answered.ended.state not in (DONE, NOT_RUN):
        part.rows.append(ended_row("probes", answered.ended))
    if context.scale.is_rehearsal:
        part.notes.append("Probes that need a GPU are left out of a rehearsal.")


def probe_row(question: str, event: dict[str, Any]) -> Row:
    if "error" in event:
        return Row(question, FAILED, event["error"])
    figures = "; ".join(f"{name} {value:.3g}" for name, value in event["figures"].items())
    return measured(question, figures)
