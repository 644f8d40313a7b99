"""Answers as JSON lines, so that a run that was ended goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ruler_sample import MATCHES
from ruler_score import score

Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class Record:
    """One answer. first, rest: text of the first generated token and of the others; rows_fraction:
    share of the middle's rows that decode read, None where it is not known; settings: digest of what
    shaped the answer (`settings_digest`); method and protocol: as the table names them."""

    task: str
    length: int
    index: int
    settings: str
    method: str
    protocol: str
    prompt_tokens: int
    first: str
    rest: str
    references: list[str]
    match: str
    rows_fraction: float | None
    seconds: float

    @property
    def key(self) -> Key:
        return self.task, self.length, self.index, self.settings

    def score(self, score_from: int) -> float | None:
        """In [0, 1], or None; see ruler_score.score."""
        return score(self.first, self.rest, self.references, self.match, score_from)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits that change with any value of `settings`, whatever their order."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RecordFile:
    """Append-only JSON lines. A last line that a killed run left unfinished is cut off on opening."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError in one sentence where a finished line is no record."""
        self._path = path
        self.records: dict[Key, Record] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        content = path.read_bytes()
        finished = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(finished.splitlines(), 1):
            record = _parse(line)
            if record is None:
                raise ValueError(
                    f"line {number} of {path} is no record of a RULER run; remove the line, or name "
                    "another folder with --output."
                )
            self.records[record.key] = record
        if len(finished) < len(content):
            os.truncate(path, len(finished))

    def append(self, record: Record) -> None:
        """On disk when it returns, so that a killed run loses at most the answer it waited for."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record.key] = record


def _parse(line: bytes) -> Record | None:
    try:
        values = json.loads(line)
        record = Record(**{field.name: values[field.name] for field in fields(Record)})
    except (ValueError, TypeError, KeyError):
        return None
    return record if record.match in MATCHES and record.references else None
