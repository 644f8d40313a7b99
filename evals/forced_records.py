"""Runs on disk, one file each, so that a command that was ended goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_magicpig.output_files import replaced


@dataclass(frozen=True)
class Position:
    """What the model said where the document has `token`: its log-probability, and the most likely
    tokens with theirs, most likely first."""

    token: int
    logprob: float
    top_tokens: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class ForcedRun:
    """positions: one per decode step, in the document's order. rows_fraction: share of the middle's
    rows that a query head of a sampled layer used, None for another backend. seconds: of prefill and
    decode."""

    positions: list[Position]
    rows_fraction: float | None
    seconds: float


def digest(*values: Any) -> str:
    """16 hex digits that change with any value and with the version of the plugin."""
    text = json.dumps([version("vllm-magicpig"), *values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RecordFolder:
    """ForcedRuns by digest."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def __setitem__(self, key: str, run: ForcedRun) -> None:
        with replaced(self._path(key)) as path:
            path.write_text(json.dumps(asdict(run)), "utf-8")

    def __getitem__(self, key: str) -> ForcedRun:
        """Raises ValueError in one sentence where the file holds no run."""
        path = self._path(key)
        try:
            values = json.loads(path.read_text("utf-8"))
            positions = [
                Position(p["token"], p["logprob"], tuple(p["top_tokens"]), tuple(p["top_logprobs"]))
                for p in values["positions"]
            ]
            return ForcedRun(positions, values["rows_fraction"], values["seconds"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no record of a forced run; remove the file.") from None

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"
