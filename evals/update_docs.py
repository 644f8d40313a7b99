"""Writes the tables of evals/reports/*.json into docs/evaluation.md, between their two marks.

python evals/update_docs.py
"""

from __future__ import annotations

import json
from pathlib import Path

from forced_report import section

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evaluation.md"
REPORTS = ROOT / "evals" / "reports"
START = "<!-- forced decoding: written by evals/update_docs.py -->"
END = "<!-- end of forced decoding -->"


def updated(page: str, reports: list[str]) -> str:
    """page: Markdown with both marks; reports: JSON of forced_decoding.py, in the order to show."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    sections = "\n".join(section(json.loads(report)) for report in reports)
    return f"{before}{START}\n\n{sections}\n{END}{after}"


def read_reports() -> list[str]:
    return [path.read_text("utf-8") for path in sorted(REPORTS.glob("*.json"))]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8"), read_reports()), "utf-8")
