"""Files that a command writes at its end: checked before the work, and replaced as a whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(name: str, path: Path) -> None:
    """Raises ValueError, in one sentence, where a file cannot be written at `path`.

    name: of the argument, such as --output. What happens later, as on a full disk, shows when it is
    written.
    """
    if path.is_dir():
        raise ValueError(f"{name} is {path}, which is a folder; name a file in it.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{name} is {path}, whose folder does not exist; make it or name another.")
    try:
        if path.exists():
            with path.open("r+b"):
                pass
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} is {path}, which cannot be written ({error.strerror}); name another."
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields where to write; what is there takes the place of `path` if nothing went wrong."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
