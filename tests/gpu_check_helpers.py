"""What tests of several parts of gpu-check share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_check_parts import Context
from gpu_check_report import Report


def context(tmp_path: Path, scale: Any, facts: dict[str, Any] | None = None) -> Context:
    report = Report([], scale.is_rehearsal, "now", facts=facts or {})
    return Context(scale, report, tmp_path, tmp_path / "logs", tmp_path / "results.jsonl")
