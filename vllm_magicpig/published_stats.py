"""How a worker's figures reach the API server, another process: one small JSON file per rank.

Files lie in a folder of this user and are named after vLLM's instance id, which both sides know. A
file is replaced as a whole, so a reader never sees half of one, and no step waits for a reader. It
names the process that wrote it: a worker that was killed leaves its file behind, which nobody reads
and the next worker sweeps.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_magicpig.process_identity import is_running, own_identity


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
        self._path = _root() / instance_id / f"{engine}-{rank}.json"
        sweep()

    def write(self, stats: Mapping[str, Any]) -> None:
        """Raises OSError where the folder cannot be written, or is somebody else's."""
        _root().mkdir(mode=0o700, exist_ok=True)
        _check_owner(_root())
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        new = self._path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"process": own_identity(), "stats": dict(stats)}))
        new.replace(self._path)

    def remove(self) -> None:
        """Also the folder, once the last rank has left."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # other ranks' files are in it, or nothing was ever written
            self._path.parent.rmdir()


def read_ranks(instance_id: str) -> list[RankStats]:
    """What the running ranks of an engine on this machine wrote last, by engine and rank."""
    ranks = []
    for path in (_root() / instance_id).glob("*.json"):
        content = _content(path)
        if content is not None and is_running(content["process"]):
            engine, rank = path.stem.split("-")
            ranks.append(RankStats(int(engine), int(rank), content["stats"]))
    return sorted(ranks, key=lambda each: (each.engine, each.rank))


def sweep() -> None:
    """Removes what workers of this user left that no longer run."""
    try:
        _check_owner(_root())
        folders = [folder for folder in _root().iterdir() if not folder.is_symlink()]
    except OSError:
        return  # there is none, or it is not ours to sweep
    for folder in folders:
        for path in folder.glob("*-*.*"):
            if not _has_writer(path):
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):
            folder.rmdir()


def _has_writer(path: Path) -> bool:
    """path: a file of `StatsFile`, whole (.json) or just being written (.PID)."""
    pid = path.suffix.removeprefix(".")
    if pid.isdecimal():
        return Path(f"/proc/{pid}").exists()
    content = _content(path)
    return content is not None and is_running(content["process"])


def _content(path: Path) -> dict[str, Any] | None:
    """None where the file is gone, or no worker of this version wrote it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not {"process", "stats"} <= content.keys():
        return None
    return content


def _check_owner(folder: Path) -> None:
    """The temporary folder is everybody's: another user may have made this one, or a link."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise OSError(f"{folder} is not a folder of this user; remove it")


def _root() -> Path:
    return Path(tempfile.gettempdir()) / f"vllm-magicpig-{os.getuid()}"
