"""What this repository takes from vLLM: names, strings that are names, and calls, read from its own
sources, so that a new import is checked without an edit here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("vllm_magicpig", "triton_kernels", "scripts", "examples", "tests")
# Names of loggers and of entry point groups, which only look like modules.
NOT_A_NAME = re.compile(r"vllm\.magicpig(\..*)?|vllm\.\w+_plugins")


@dataclass(frozen=True)
class Place:
    file: str  # relative to the repository
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Use:
    """A name that is taken from a module of vLLM; name None: the module itself."""

    module: str
    name: str | None
    place: Place


@dataclass(frozen=True)
class Call:
    """A call of such a name, or of an attribute of it (`path` is what follows the module)."""

    module: str
    path: tuple[str, ...]
    node: ast.Call
    place: Place


@dataclass(frozen=True)
class Source:
    file: str
    tree: ast.Module

    def place(self, node: ast.AST) -> Place:
        return Place(self.file, getattr(node, "lineno", 0))

    def bound_names(self) -> dict[str, tuple[str, str | None]]:
        """Local name -> (module, name) of every import from vLLM, wherever in the file it is."""
        bound: dict[str, tuple[str, str | None]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and is_vllm(node.module or ""):
                for alias in node.names:
                    bound[alias.asname or alias.name] = (str(node.module), alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if is_vllm(alias.name) and alias.asname:
                        bound[alias.asname] = (alias.name, None)
        return bound


def is_vllm(module: str) -> bool:
    return module == "vllm" or module.startswith("vllm.")


@cache
def sources(folders: tuple[str, ...] = FOLDERS) -> tuple[Source, ...]:
    return tuple(
        Source(str(path.relative_to(ROOT)), ast.parse(path.read_text(), str(path)))
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    )


def imports(source: Source) -> Iterator[Use]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and is_vllm(node.module or ""):
            for alias in node.names:
                yield Use(str(node.module), alias.name, source.place(node))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if is_vllm(alias.name):
                    yield Use(alias.name, None, source.place(node))


def names_in_strings(source: Source) -> Iterator[Use]:
    """Qualified names that vLLM resolves, such as "vllm.v1.worker.gpu_worker.Worker"."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if re.fullmatch(r"vllm(\.\w+)+", text) and not NOT_A_NAME.fullmatch(text):
                module, _, name = text.rpartition(".")
                yield Use(module, name, source.place(node))


def calls(source: Source) -> Iterator[Call]:
    bound = source.bound_names()
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        function, attributes = node.func, []
        while isinstance(function, ast.Attribute):
            attributes.insert(0, function.attr)
            function = function.value
        if isinstance(function, ast.Name) and function.id in bound:
            module, name = bound[function.id]
            path = (*([] if name is None else [name]), *attributes)
            yield Call(module, path, node, source.place(node))
