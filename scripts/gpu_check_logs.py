"""The logs of a gpu-check's processes, in one archive that travels."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

MAX_LOG_BYTES = 1 << 20
"""Of each log: its end, so that the archive of all stays small."""


class LogArchive:
    """Logs lie in `folder` while their processes run, and in logs.tgz afterwards.

    A tar file that is compressed cannot be appended to, so that the archive is written anew from all
    logs; a check that is killed leaves those of the running part beside it.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / "logs"
        self._archive = output / "logs.tgz"
        self._kept: dict[str, bytes] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._archive.unlink(missing_ok=True)
        for log in self.folder.glob("*.log"):  # of an earlier run
            log.unlink()

    def put_away(self) -> None:
        """Moves what is in the folder into the archive."""
        found = sorted(self.folder.glob("*.log"))
        for log in found:
            content = log.read_bytes()
            cut = b"" if len(content) <= MAX_LOG_BYTES else b"(only the end is kept)\n"
            self._kept[log.name] = cut + content[-MAX_LOG_BYTES:]
        if not self._kept:
            return
        scratch = self._archive.with_name(".logs.part")
        with tarfile.open(scratch, "w:gz") as archive:
            for name, content in self._kept.items():
                info = tarfile.TarInfo(f"logs/{name}")
                info.size = len(content)
                archive.addfile(info, BytesIO(content))
        scratch.replace(self._archive)
        for log in found:
            log.unlink()
