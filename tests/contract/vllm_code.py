"""The names of vLLM's modules, read from the sources of the release that this process would import.

Reading tells of modules too that a machine without their compiled parts cannot import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def root() -> Path:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def file_of(module: str) -> Path | None:
    path = root().joinpath(*module.split(".")[1:])
    if (path / "__init__.py").exists():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


@cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """Statement that gives each top-level name of a module its value, {} where there is none."""
    path = file_of(module)
    if path is None:
        return {}
    found: dict[str, ast.stmt] = {}
    for statement in _flat(ast.parse(path.read_text()).body):
        for name in _names(statement):
            found.setdefault(name, statement)
    return found


def has(module: str, name: str | None) -> bool:
    """Whether `from module import name` finds something; name None: `import module`."""
    if name is None:
        return file_of(module) is not None
    if file_of(f"{module}.{name}") is not None:
        return True
    statement = definitions(module).get(name)
    if statement is None:
        return any(has(other, name) for other in _starred(module))
    if isinstance(statement, ast.ImportFrom) and _origin(module, statement).startswith("vllm"):
        original = next(a.name for a in statement.names if (a.asname or a.name) == name)
        return has(_origin(module, statement), original)
    return True


def function(module: str, name: str) -> ast.FunctionDef | None:
    """A module's function, followed through imports."""
    statement = definitions(module).get(name)
    if isinstance(statement, ast.ImportFrom):
        return function(_origin(module, statement), name)
    return statement if isinstance(statement, ast.FunctionDef) else None


def _starred(module: str) -> list[str]:
    """Modules of vLLM from which a module takes all names."""
    statement = definitions(module).get("*")
    path = file_of(module)
    if statement is None or path is None:
        return []
    stars = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    return [origin for node in stars if (origin := _origin(module, node)).startswith("vllm")]


def _origin(module: str, statement: ast.ImportFrom) -> str:
    if statement.level == 0:
        return statement.module or ""
    path = file_of(module)
    package = module.split(".")
    if path is None or path.name != "__init__.py":
        package.pop()
    package = package[: len(package) - (statement.level - 1)]
    return ".".join([*package, *([statement.module] if statement.module else [])])


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if`, `try` and `with` among them."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try, ast.With)):
                yield from _flat(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _flat(handler.body)


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    if isinstance(statement, ast.Assign):
        return [n.id for t in statement.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []
