"""Our subclasses of vLLM's classes: nothing abstract is left, what overrides still does, and takes what
its parent takes."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import test_device_worker
import vllm
from our_code import ROOT, sources
from packaging.version import Version

OURS = ("_", "magicpig_")
"""How methods begin that are for this package, or for collective_rpc."""
NEWER = {"get_kv_connector_output": (0, 33)}
"""Overrides that an earlier vLLM has no use for."""


def our_classes() -> Iterator[type[Any]]:
    """Every class of the package (and of the test doubles) that has one of vLLM's among its parents."""
    modules = [
        f"vllm_magicpig.{path.stem}"
        for path in sorted((ROOT / "vllm_magicpig").glob("*.py"))
        if path.stem != "__init__"
    ]
    for module in [*map(importlib.import_module, modules), test_device_worker]:
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and any(map(of_vllm, cls.__mro__)):
                yield cls


def of_vllm(cls: type[Any]) -> bool:
    return cls.__module__.split(".")[0] == "vllm"


CLASSES = list(our_classes())


def test_the_classes_are_found() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert names >= {
        "MagicPigBackend", "MagicPigImpl", "MagicPigMetadataBuilder", "DevicePageBackend", "Step",
        "DeviceStep", "DeviceMetadataBuilder", "MagicPigCPUWorker", "MagicPigCudaWorker",
        "MagicPigCpuPlatform", "MagicPigCudaPlatform", "_CheckedOutput", "Output",
    }  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_nothing_abstract_is_left(cls: type[Any]) -> None:
    assert getattr(cls, "__abstractmethods__", frozenset()) == frozenset()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_overrides_take_what_vllm_passes(cls: type[Any]) -> None:
    problems = [
        f"{owner.__name__}.{name}: {problem}"
        for owner, name, ours, theirs in overrides(cls)
        for problem in misfits(ours, theirs)
    ]
    assert problems == []


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_public_methods_override_or_are_called_by_us(cls: type[Any]) -> None:
    """Where vLLM has renamed the one that ours overrides, ours would never be called."""
    overriding = {(owner, name) for owner, name, _, _ in overrides(cls)}
    release = Version(vllm.__version__).release
    newer = {name for name, since in NEWER.items() if release < since}
    dead = [
        f"{owner.__name__}.{name}"
        for owner in ours_of(cls)
        for name in methods(owner)
        if not name.startswith(OURS)
        and (owner, name) not in overriding
        and name not in called_by_us() | newer
    ]
    assert dead == []


def test_overrides_are_not_taken_for_ours() -> None:
    called = called_by_us()
    assert {"bind", "count_reuse"} <= called
    assert not {
        "customize_spec", "determine_available_memory", "initialize_from_config", "sample_tokens",
        "process_weights_after_loading", "check_and_update_config", "update_block_size_for_backend",
        "supported_kv_cache_layouts", "get_builder_cls", "build", "load_model",
    } & called  # fmt: skip


@cache
def called_by_us() -> frozenset[str]:
    """Names that the package asks objects for, other than of super(), of what it stands before, and of
    a `worker` as the engine core knows it."""
    names = set()
    for source in sources(("vllm_magicpig",)):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                vllms = owner.startswith("super()") or owner == "worker"
                if not vllms and not owner.endswith((".impl", "._output")):
                    names.add(node.attr)
    return frozenset(names)


def ours_of(cls: type[Any]) -> list[type[Any]]:
    """Ours among a class's parents whose methods come before vLLM's; test doubles of vLLM's not."""
    first = next(i for i, parent in enumerate(cls.__mro__) if of_vllm(parent))
    return [
        parent
        for parent in cls.__mro__[:first]
        if parent.__module__.startswith(("vllm_magicpig", "test_device_worker"))
    ]


def methods(cls: type[Any]) -> dict[str, Any]:
    kinds = (FunctionType, classmethod, staticmethod, property)
    generated = {"__eq__", "__repr__", "__hash__", "__setattr__", "__delattr__", "__replace__"}
    if hasattr(cls, "__dataclass_fields__"):
        generated.add("__init__")
    return {
        name: value
        for name, value in vars(cls).items()
        if isinstance(value, kinds) and name not in generated
    }


def overrides(cls: type[Any]) -> Iterator[tuple[type[Any], str, Any, Any]]:
    """(our class, name, our method, vLLM's) for each of our methods that has a name of vLLM's."""
    for owner in ours_of(cls):
        for name, ours in methods(owner).items():
            for parent in filter(of_vllm, cls.__mro__):
                if name in vars(parent):
                    yield owner, name, ours, vars(parent)[name]
                    break


def misfits(ours: Any, theirs: Any) -> Iterator[str]:
    """What a caller of vLLM's method could pass that ours does not take."""
    if type(ours) is not type(theirs) and {type(ours), type(theirs)} != {FunctionType}:
        yield f"is a {type(ours).__name__}, vLLM's is a {type(theirs).__name__}"
        return
    if isinstance(ours, property):
        return
    mine, parents = parameters(ours), parameters(theirs)
    star = any(p.kind is p.VAR_POSITIONAL for p in mine)
    names = any(p.kind is p.VAR_KEYWORD for p in mine)
    taken = {p.name: (i, p) for i, p in enumerate(mine)}
    for i, parent in enumerate(parents):
        if parent.kind is parent.VAR_POSITIONAL:
            if not star:
                yield f"takes no *{parent.name}"
        elif parent.kind is parent.VAR_KEYWORD:
            if not names:
                yield f"takes no **{parent.name}"
        elif parent.name in taken:
            j, parameter = taken[parent.name]
            if parent.kind is parent.POSITIONAL_OR_KEYWORD and (
                i != j or parameter.kind is parameter.KEYWORD_ONLY
            ):
                yield f"{parent.name} is in another place"
            if parent.default is not parent.empty and parameter.default is parameter.empty:
                yield f"{parent.name} has no default"
        elif not names or (
            parent.kind is not parent.KEYWORD_ONLY and not star and i < len(mine) - 1
        ):
            yield f"takes no {parent.name}"
    theirs_by_name = {p.name for p in parents}
    for parameter in mine:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in theirs_by_name and parameter.default is parameter.empty:
            yield f"asks for {parameter.name}, which vLLM does not pass"


def parameters(method: Any) -> list[inspect.Parameter]:
    """Without self or cls."""
    function = getattr(method, "__func__", method)
    found = list(inspect.signature(function).parameters.values())
    return found if isinstance(method, staticmethod) else found[1:]


def test_misfits_are_found_out() -> None:
    class Theirs:
        def renamed(self, a: int, b: int = 0) -> None: ...
        def grown(self, a: int, b: int = 0) -> None: ...
        def shrunk(self, a: int) -> None: ...
        def swapped(self, a: int, b: int) -> None: ...
        @classmethod
        def kind(cls) -> None: ...
        def fits(self, a: int, b: int = 0) -> None: ...

    class Ours:
        def renamed(self, a: int, c: int = 0) -> None: ...
        def grown(self, a: int) -> None: ...
        def shrunk(self, a: int, b: int) -> None: ...
        def swapped(self, b: int, a: int) -> None: ...
        def kind(self) -> None: ...
        def fits(self, a: int, b: int = 0, c: int = 0) -> None: ...

    found = {
        name: bool(list(misfits(vars(Ours)[name], vars(Theirs)[name]))) for name in methods(Ours)
    }
    assert found == dict.fromkeys(found, True) | {"fits": False}


def test_the_package_is_that_of_this_repository() -> None:
    import vllm_magicpig

    assert Path(vllm_magicpig.__file__).parents[1] == ROOT
