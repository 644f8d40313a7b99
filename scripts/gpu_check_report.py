"""What gpu-check found: rows of checks, gpu_check.md and gpu_check.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 16 << 20  # of each file, so that it can be carried away from any machine

PASSED, FAILED, MEASURED, NOT_RUN = "passed", "failed", "measured", "not run"

# The project's bars for the Llama-3.1-8B shape on a GPU machine.
MAX_TPOT_MS = 45.0
MIN_GATHER_SHARE = 0.60
MAX_ELSE_US = 80.0
MAX_TTFT_RATIO = 1.15
MAX_MODEL_ERROR = 0.20


@dataclass(frozen=True)
class Row:
    """A check. result: one of the four words above; met: whether the bar is kept, None without
    one; log: the end of a failed process's log."""

    check: str
    result: str
    figure: str = ""
    bar: str = ""
    met: bool | None = None
    log: str = ""


def checked(check: str, is_right: bool, figure: str, bar: str) -> Row:
    """Of correctness: it passes or it fails."""
    return Row(check, PASSED if is_right else FAILED, figure, bar, met=is_right)


def measured(check: str, figure: str, bar: str = "", met: bool | None = None) -> Row:
    return Row(check, MEASURED, figure, bar, met)


@dataclass
class Part:
    """limit_s: seconds it may take; state: "not run", "running" and "over"; raw: what its processes
    reported, for the JSON file."""

    name: str
    title: str
    limit_s: float
    state: str = "not run"
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """command: as typed; parts: all that the stages have, from the start; facts: of the machine;
    cost_model: a report for examples/cost_model.py."""

    command: list[str]
    is_rehearsal: bool
    started: str
    facts: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    cost_model: dict[str, Any] | None = None

    @property
    def rows(self) -> list[Row]:
        return [row for part in self.parts for row in part.rows]

    @property
    def failed(self) -> list[str]:
        """A crash or a wrong answer; a missed bar of speed is none."""
        return [row.check for row in self.rows if row.result == FAILED]

    @property
    def not_run(self) -> list[str]:
        parts = [part.title for part in self.parts if part.state != "over"]
        return [*(row.check for row in self.rows if row.result == NOT_RUN), *parts]

    @property
    def verdict(self) -> str:
        missing = f"not run: {'; '.join(self.not_run)}" if self.not_run else ""
        if self.failed:
            return f"FAILED: {'; '.join(self.failed)}" + (f". {missing}" if missing else "")
        if missing:
            return f"INCOMPLETE, nothing failed; {missing}"
        if not any(row.result == PASSED for row in self.rows):
            return "NOTHING PROVED: no check of correctness ran"
        return "PASSED"

    @property
    def exit_code(self) -> int:
        """0: all that was asked for ran and passed; 1: something failed; 3: something did not run."""
        return 1 if self.failed else 3 if self.not_run else 0

    def write(self, folder: Path) -> None:
        """gpu_check.md and .json, and cost_model.json once there is one; never half a file."""
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "gpu_check.md", _fitting(self.markdown()))
        _replace(folder / "gpu_check.json", self.json())
        if self.cost_model is not None:
            _replace(folder / "cost_model.json", json.dumps(self.cost_model, indent=1) + "\n")

    def json(self) -> str:
        """Without the raw reports where they do not fit."""
        content = asdict(self) | {"verdict": self.verdict}
        text = json.dumps(content, indent=1, default=str) + "\n"
        if len(text.encode()) > MAX_FILE_BYTES:
            for part in content["parts"]:
                part["raw"] = {"left_out": f"more than {MAX_FILE_BYTES >> 20} MiB"}
            text = json.dumps(content, indent=1, default=str) + "\n"
        return text

    def markdown(self) -> str:
        lines = ["# gpu-check", ""]
        if self.is_rehearsal:
            lines += [
                "**A REHEARSAL ON A CPU, at toy size: it exercises this script and proves nothing "
                "about a GPU.**",
                "",
            ]
        lines += [f"{self.started}, `{' '.join(self.command)}`", "", f"**{self.verdict}**", ""]
        missed = [row for row in self.rows if row.met is False and row.result == MEASURED]
        if missed:
            lines += ["Bars of speed that were missed:", ""]
            lines += [f"- {row.check}: {row.figure} (bar: {row.bar})" for row in missed]
            lines.append("")
        for part in self.parts:
            lines += [
                f"## {part.title}",
                "",
                {
                    "over": f"{part.seconds:.0f} s of {part.limit_s:.0f} s.",
                    "running": f"Running, or killed with this check; at most {part.limit_s:.0f} s.",
                    "not run": "Not run.",
                }[part.state],
                "",
                *(f"{note}\n" for note in part.notes),
            ]
            if part.rows:
                lines += [*table(part.rows), ""]
        logs = [row for row in self.rows if row.log]
        if logs:
            lines += ["## Ends of logs", ""]
            for row in logs:
                lines += [
                    f"{row.check}:",
                    "",
                    *(f"    {line}" for line in row.log.splitlines()),
                    "",
                ]
        return "\n".join(lines)


def table(rows: Iterable[Row]) -> list[str]:
    lines = ["| check | result | figure | bar | met |", "|---|---|---|---|---|"]
    for row in rows:
        met = {True: "yes", False: "NO", None: "-"}[row.met]
        result = row.result.upper() if row.result == FAILED else row.result
        cells = (row.check, result, row.figure, row.bar or "-", met)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _fitting(text: str) -> str:
    content = text.encode()
    if len(content) <= MAX_FILE_BYTES:
        return text
    note = "\n\n(cut here: the file would be too large)\n"
    return content[: MAX_FILE_BYTES - len(note)].decode(errors="ignore") + note


def _replace(path: Path, content: str) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(content, "utf-8")
    os.replace(scratch, path)
