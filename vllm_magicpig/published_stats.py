"""How a worker's figures reach the API server, another process: one small JSON file per rank.

Files lie in a folder of this user and are named after vLLM's instance id, which both sides know. A
file is replaced as a whole, so a reader never sees half of one, and no step waits for a reader.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RankStats:
    """engine: index of the data-parallel engine; rank: of the worker in it; stats: the fields of
    MagicPigStats by name."""

    engine: int
    rank: int
    stats: Mapping[str, Any]


class StatsFile:
    """The file of one worker, written by it alone."""

    def __init__(self, instance_id: str, engine: int, rank: int) -> None:
        self._path = _folder(instance_id) / f"{engine}-{rank}.json"

    def write(self, stats: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(dict(stats)))
        new.replace(self._path)

    def remove(self) -> None:
        """Also the folder, once the last rank has left."""
        self._path.unlink(missing_ok=True)
        try:
            self._path.parent.rmdir()
        except OSError:
            return  # other ranks' files are in it, or nothing was ever written


def read_ranks(instance_id: str) -> list[RankStats]:
    """What the ranks of an engine on this machine wrote last, by engine and rank."""
    ranks = []
    for path in _folder(instance_id).glob("*.json"):
        engine, rank = path.stem.split("-")
        try:
            ranks.append(RankStats(int(engine), int(rank), json.loads(path.read_text())))
        except FileNotFoundError:
            continue  # that worker has just ended
    return sorted(ranks, key=lambda each: (each.engine, each.rank))


def _folder(instance_id: str) -> Path:
    return Path(tempfile.gettempdir()) / f"vllm-magicpig-{os.getuid()}" / instance_id
