"""Every name that we take from vLLM is there."""

from __future__ import annotations

import our_code
import pytest
import vllm_code
from our_code import Place, Source, Use, imports, names_in_strings, sources

from vllm_magicpig.vllm_versions import kv_cache_planner


@pytest.mark.parametrize("source", [s for s in sources() if any(imports(s))], ids=lambda s: s.file)
def test_what_a_file_imports_is_there(source: Source) -> None:
    assert missing(list(imports(source))) == []


@pytest.mark.parametrize("source", sources(("vllm_magicpig", "scripts")), ids=lambda s: s.file)
def test_what_a_string_names_is_there(source: Source) -> None:
    assert missing(list(names_in_strings(source))) == []


def test_modules_are_asked_for_names_that_they_have() -> None:
    """`from vllm import envs` and then envs.NAME."""
    uses = []
    for source in sources():
        bound = source.bound_names()
        for node in our_code.ast.walk(source.tree):
            if not isinstance(node, our_code.ast.Attribute):
                continue
            if not isinstance(node.value, our_code.ast.Name) or node.value.id not in bound:
                continue
            module, name = bound[node.value.id]
            whole = module if name is None else f"{module}.{name}"
            if vllm_code.file_of(whole) is not None:
                uses.append(Use(whole, node.attr, source.place(node)))
    assert uses, "examples/bench_layer.py uses vllm._custom_ops"
    assert missing(uses) == []


def test_the_planner_has_moved_with_its_names() -> None:
    module = kv_cache_planner().__name__
    uses = [
        Use(module, name, Place("scripts/kv_capacity.py", 0))
        for name in ("get_kv_cache_groups", "get_kv_cache_config_from_groups")
    ]
    assert missing(uses) == []


def test_a_name_that_is_not_there_is_found_out() -> None:
    place = Place("here", 1)
    wrong = [
        Use("vllm.v1.outputs", "NoSuchOutput", place),
        Use("vllm.no_such_module", "name", place),
        Use("vllm.no_such_module", None, place),
        Use("vllm", "NoSuchName", place),
    ]
    right = [Use("vllm.v1.outputs", "ModelRunnerOutput", place), Use("vllm", "LLM", place)]
    assert len(missing(wrong + right)) == len(wrong)


def missing(uses: list[Use]) -> list[str]:
    return [
        f"{use.place}: {use.module} has no {use.name}"
        for use in uses
        if not vllm_code.has(use.module, use.name)
    ]
