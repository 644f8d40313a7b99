"""Every call of something imported from vLLM passes arguments that it takes."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

import our_code
import pytest
import vllm_code
from our_code import Call, Place, calls, sources

CALLS = [call for source in sources() for call in calls(source)]


@pytest.mark.parametrize("file", sorted({call.place.file for call in CALLS}))
def test_vllm_takes_what_a_file_passes(file: str) -> None:
    problems = [problem(call) for call in CALLS if call.place.file == file]
    assert [p for p in problems if p is not None] == []


def problem(call: Call) -> str | None:
    """What is wrong with a call; None too for what has no signature of its own."""
    signature = signature_of(call)
    if signature is None:
        return None
    positional = [None for a in call.node.args if not isinstance(a, ast.Starred)]
    keywords = {k.arg: None for k in call.node.keywords if k.arg is not None}
    starred = len(positional) < len(call.node.args) or len(keywords) < len(call.node.keywords)
    try:
        (signature.bind_partial if starred else signature.bind)(*positional, **keywords)
    except TypeError as error:
        return f"{call.place}: {'.'.join((call.module, *call.path))}: {error}"
    return None


def signature_of(call: Call) -> inspect.Signature | None:
    try:
        found: Any = importlib.import_module(call.module)
        for name in call.path:
            found = getattr(found, name)
    except ImportError:  # of compiled parts that this machine lacks
        node = vllm_code.function(call.module, call.path[-1])
        return None if node is None else read_signature(node)
    except AttributeError:
        return None  # tests/contract/test_names.py; or an attribute of an object
    try:
        return inspect.signature(found)
    except (ValueError, TypeError):
        return None


def read_signature(node: ast.FunctionDef) -> inspect.Signature:
    """As inspect.signature, of a definition that cannot be imported."""
    stub = ast.FunctionDef(
        name=node.name,
        args=ast.arguments(
            posonlyargs=[ast.arg(a.arg) for a in node.args.posonlyargs],
            args=[ast.arg(a.arg) for a in node.args.args],
            vararg=node.args.vararg and ast.arg(node.args.vararg.arg),
            kwonlyargs=[ast.arg(a.arg) for a in node.args.kwonlyargs],
            kw_defaults=[default and ast.Constant(None) for default in node.args.kw_defaults],
            kwarg=node.args.kwarg and ast.arg(node.args.kwarg.arg),
            defaults=[ast.Constant(None) for _ in node.args.defaults],
        ),
        body=[ast.Pass()],
        decorator_list=[],
    )
    module = ast.fix_missing_locations(ast.Module(body=[stub], type_ignores=[]))
    names: dict[str, Any] = {}
    exec(compile(module, node.name, "exec"), names)
    return inspect.signature(names[node.name])


def test_most_calls_have_a_signature() -> None:
    known = [call for call in CALLS if signature_of(call) is not None]
    assert len(known) > 0.8 * len(CALLS)
    assert {"register_backend", "FullAttentionSpec", "AttentionSelectorConfig"} <= {
        call.path[0] for call in known if call.path
    }


def test_flash_attention_takes_our_keywords() -> None:
    """flash.py imports it where a GPU is, by way of a module that chooses among versions."""
    node = vllm_code.function("vllm.vllm_flash_attn.flash_attn_interface", "flash_attn_varlen_func")
    assert node is not None
    taken = read_signature(node).parameters
    passed = {
        keyword.arg
        for source in sources(("vllm_magicpig",))
        for call in ast.walk(source.tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self._varlen"
        for keyword in call.keywords
    }
    assert passed
    assert passed <= set(taken)


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("extract_layer_index('model.layers.0')", False),
        ("extract_layer_index()", True),
        ("extract_layer_index('model.layers.0', no_such_argument=1)", True),
        ("extract_layer_index(*arguments, no_such_argument=1)", True),
        ("extract_layer_index(*arguments)", False),
    ],
)
def test_a_wrong_call_is_found_out(code: str, wrong: bool) -> None:
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.Call)
    path = ("extract_layer_index",)
    call = Call("vllm.model_executor.models.utils", path, node, Place("here", 1))
    assert (problem(call) is not None) == wrong
    assert our_code.is_vllm(call.module)
