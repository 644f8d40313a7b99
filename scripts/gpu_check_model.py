"""The cost model's view of what was measured: a report for examples/cost_model.py, and its errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_check_figures import Measured, Side
from gpu_check_jobs import EXAMPLES
from gpu_check_report import MAX_MODEL_ERROR, Row, measured

sys.path.append(str(EXAMPLES))
from cost_model import read_report


def fit_report(
    facts: Mapping[str, Any], ours: Side, dense: Side, model: str, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What `examples/cost_model.py --fit` reads; None where too little was measured.

    facts: of the hardware part; model: a preset of the cost model, all layers; options: magicpig's.
    """
    cases = [
        one
        for one in (*dense.cases.values(), *ours.cases.values())
        if one.decode_step_us is not None
    ]
    if not cases or "host" not in facts or "device_bandwidth" not in facts:
        return None
    host, device = facts["host"], facts["device_bandwidth"]
    threads = {one.host.threads for one in cases if one.host is not None}
    return {
        "gpu": {
            "name": facts["device"],
            "memory_gib": facts["gpu_memory_gib"],
            "hbm_gbs": device["hbm_gbs"],
            "pcie_gbs": min(device["h2d_gbs"], device["d2h_gbs"]),
        },
        "host": {
            "sequential_gbs": host["sequential_gbs"],
            "row_gather_gbs": host["row_gather_gbs"],
            "line_gather_gbs": host["line_gather_gbs"],
            "threads": max(threads, default=host["threads"]),
            "memory_gib": facts["memory_gib"],
        },
        "constants": {
            "hbm_efficiency": 1.0,  # the bandwidths above are measured, not those of a data sheet
            "pcie_efficiency": 1.0,
            "copy_us": device["copy_us"],
            "callback_us": device["callback_us"],
        },
        "runs": [_run(one, model, options, ours.segment_tokens) for one in cases],
    }


def _run(
    one: Measured, model: str, options: Mapping[str, Any], segment_tokens: int | None
) -> dict[str, Any]:
    run: dict[str, Any] = {
        "backend": "dense" if one.host is None else "magicpig",
        "model": model,
        "batch": one.case.num_requests,
        "context": one.case.length,
        "measured_us": {"total": one.decode_step_us},
    }
    if one.host is None:
        return run
    if one.case.num_requests == 1:  # else its steps held fewer requests while others prefilled
        times = {
            "host": one.host.callback_us,
            "lookup": one.host.lookup_us,
            "rows": one.host.attend_us,
        }
        run["measured_us"] |= {name: us for name, us in times.items() if us > 0}
    return run | {
        "sampled_fraction": one.host.sampled_fraction,
        "options": dict(options),
        "segment_tokens": segment_tokens,
    }


def model_rows(report: Mapping[str, Any], scratch: Path) -> Iterable[Row]:
    """Predicted against measured time per output token."""
    path = scratch / "cost_model.json"
    path.write_text(json.dumps(report), "utf-8")
    for run in read_report(path):
        errors = run.errors()
        terms = ", ".join(
            f"{term} {error:+.0%}" for term, error in errors.items() if term != "total"
        )
        yield measured(
            f"cost model: {run.name}",
            f"predicted {run.predicted.total / 1e3:.1f} ms a token, measured "
            f"{run.measured_us['total'] / 1e3:.1f}, {errors['total']:+.0%}"
            + (f" ({terms})" if terms else ""),
            f"within {MAX_MODEL_ERROR:.0%}",
            abs(errors["total"]) <= MAX_MODEL_ERROR,
        )
