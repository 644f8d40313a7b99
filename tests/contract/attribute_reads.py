"""Attributes that our code reads from vLLM's objects, with the class that each is read from.

The types are followed through a function: from annotations and from what a parameter of a name always
is here, along attributes whose types vLLM declares, through assignments and loops.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from our_code import Place, Source

ALWAYS = {
    "vllm_config": "vllm.config.VllmConfig",
    "cache_config": "vllm.config.CacheConfig",
    "parallel_config": "vllm.config.ParallelConfig",
    "scheduler_output": "vllm.v1.core.sched.output.SchedulerOutput",
    "kv_cache_config": "vllm.v1.kv_cache_interface.KVCacheConfig",
    "kv_cache_spec": "vllm.v1.kv_cache_interface.FullAttentionSpec",
    "spec": "vllm.v1.kv_cache_interface.FullAttentionSpec",
    "common_attn_metadata": "vllm.v1.attention.backend.CommonAttentionMetadata",
    "attn_selector_config": "vllm.v1.attention.selector.AttentionSelectorConfig",
}
"""Class of a parameter or of an attribute of self by its name."""
IN_FILE = {
    ("vllm_magicpig/layer_selection.py", "layer"): "vllm.model_executor.layers.attention.Attention",
}


@dataclass(frozen=True)
class Read:
    cls: type[Any]
    name: str
    place: Place


def reads(source: Source) -> list[Read]:
    reader = _Reader(source)
    reader.visit(source.tree)
    return reader.found


class _Reader(ast.NodeVisitor):
    def __init__(self, source: Source) -> None:
        self.source, self.found = source, list[Read]()
        self.bound = source.bound_names()
        self.types: dict[str, Any] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.types
        self.types = dict(outer)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            self.types[argument.arg] = self._of_parameter(argument)
        for statement in node.body:
            self.visit(statement)
        self.types = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._assign(target, node.value)
            self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._assign_element(node.target, node.iter)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def _visit_comprehension(self, node: Any) -> None:
        for generator in node.generators:
            self.visit(generator.iter)
            self._assign_element(generator.target, generator.iter)
            for condition in generator.ifs:
                self.visit(condition)
        for part in ("elt", "key", "value"):
            if hasattr(node, part):
                self.visit(getattr(node, part))

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehension

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        cls = class_of(self._type(node.value))
        if cls is not None:
            self.found.append(Read(cls, node.attr, self.source.place(node)))

    def _of_parameter(self, argument: ast.arg) -> Any:
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id in self.bound:
            module, name = self.bound[argument.annotation.id]
            return resolve(f"{module}.{name}")
        return self._always(argument.arg)

    def _always(self, name: str) -> Any:
        path = IN_FILE.get((self.source.file, name), ALWAYS.get(name))
        return None if path is None else resolve(path)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.types[target.id] = self._type(value)
        elif isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
            for name, each in zip(target.elts, values, strict=False):
                if isinstance(name, ast.Name):
                    self.types[name.id] = None if each is None else self._type(each)

    def _assign_element(self, target: ast.expr, iterable: ast.expr) -> None:
        names = [target] if isinstance(target, ast.Name) else getattr(target, "elts", [])
        arguments = typing.get_args(self._type(iterable))
        single = isinstance(target, ast.Name) and len(arguments) == 1
        for name in names:
            if isinstance(name, ast.Name):
                known = arguments[0] if single else self._always(name.id)
                self.types[name.id] = known

    def _type(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self._always(node.attr)
            cls = class_of(self._type(node.value))
            return None if cls is None else hints(cls).get(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "get_current_vllm_config":
                return resolve("vllm.config.VllmConfig")
            if node.func.id == "replace" and node.args:
                return self._type(node.args[0])
        return None


@cache
def resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def class_of(hint: Any) -> type[Any] | None:
    """vLLM's class in a hint, None inside `X | None` left out."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [each for each in typing.get_args(hint) if each is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else None
    if inspect.isclass(hint) and hint.__module__.split(".")[0] == "vllm":
        return hint
    return None


@cache
def hints(cls: type[Any]) -> dict[str, Any]:
    """Types of a class's attributes as far as they can be told; properties by what they return."""
    found: dict[str, Any] = {}
    for parent in reversed(cls.__mro__):
        for name, hint in vars(parent).get("__annotations__", {}).items():
            found[name] = _evaluated(hint, parent)
        for name, value in vars(parent).items():
            if isinstance(value, property) and value.fget is not None:
                found[name] = _evaluated(value.fget.__annotations__.get("return"), parent)
    return found


def _evaluated(hint: Any, owner: type[Any]) -> Any:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, vars(importlib.import_module(owner.__module__)))
    except NameError:  # imported for type checkers only
        return None


@cache
def has_attribute(cls: type[Any], name: str) -> bool:
    """Whether objects of a class have an attribute: declared, in the class, or assigned to self."""
    if hasattr(cls, name) or name in hints(cls):
        return True
    if is_dataclass(cls) and name in {field.name for field in fields(cls)}:
        return True
    pattern = re.compile(rf"\bself\.{name}\b\s*(:[^=]*)?(,[^=\n]*)?=[^=]")
    return any(pattern.search(_text(parent)) for parent in cls.__mro__)


@cache
def _text(cls: type[Any]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
