"""Objects of vLLM have the attributes that our code reads."""

from __future__ import annotations

import ast
from typing import Any

import attribute_reads
import pytest
import test_classes
from attribute_reads import Read, has_attribute, reads, resolve
from our_code import Source, sources

FOUND: dict[str, list[Read]] = {
    source.file: found
    for source in sources(("vllm_magicpig", "scripts"))
    if (found := reads(source))
}


@pytest.mark.parametrize("file", sorted(FOUND))
def test_what_a_file_reads_is_there(file: str) -> None:
    assert missing(FOUND[file]) == []


def test_reads_of_each_of_vllms_classes_are_found() -> None:
    pairs = {(read.cls.__name__, read.name) for found in FOUND.values() for read in found}
    assert pairs >= {
        ("CommonAttentionMetadata", "seq_lens_cpu_upper_bound"),
        ("CommonAttentionMetadata", "block_table_tensor"),
        ("SchedulerOutput", "scheduled_cached_reqs"),
        ("NewRequestData", "block_ids"),
        ("CachedRequestData", "resumed_req_ids"),
        ("FullAttentionSpec", "head_size"),
        ("KVCacheConfig", "num_blocks"),
        ("VllmConfig", "additional_config"),
        ("AttentionConfig", "backend_per_kind"),
        ("CacheConfig", "user_specified_block_size"),
        ("ModelConfig", "original_max_model_len"),
        ("ParallelConfig", "local_world_size"),
        ("SchedulerConfig", "disable_hybrid_kv_cache_manager"),
        ("CompilationConfig", "static_forward_context"),
        ("Attention", "sliding_window"),
        ("Attention", "head_size_v"),
        ("Attention", "use_mm_prefix"),
    }


@pytest.mark.parametrize(
    "cls",
    [cls for cls in test_classes.CLASSES if "Worker" in cls.__name__ or "Impl" in cls.__name__],
    ids=lambda cls: cls.__name__,
)
def test_what_our_workers_read_of_themselves_is_there(cls: type[Any]) -> None:
    """An attribute of self that no class of ours sets has to be one of vLLM's."""
    ours = test_classes.ours_of(cls)
    text = [ast.parse(attribute_reads._text(parent)) for parent in ours]
    nodes = [n for tree in text for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    of_self = [n for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "self"]
    set_by_us = {n.attr for n in of_self if isinstance(n.ctx, ast.Store)}
    set_by_us |= {name for parent in ours for name in (*vars(parent), *hints_of(parent))}
    read = {n.attr for n in of_self if isinstance(n.ctx, ast.Load)} - set_by_us
    theirs = [parent for parent in cls.__mro__ if test_classes.of_vllm(parent)]
    assert [name for name in sorted(read) if not has_attribute(theirs[0], name)] == []


def hints_of(cls: type[Any]) -> dict[str, Any]:
    found: dict[str, Any] = vars(cls).get("__annotations__", {})
    return found


def test_the_fields_that_a_spec_is_replaced_by_are_there() -> None:
    """`replace(spec, ...)` of backend.py and device_backend.py."""
    spec = resolve("vllm.v1.kv_cache_interface.FullAttentionSpec")
    names = {
        keyword.arg
        for source in sources(("vllm_magicpig",))
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("replace(spec, ")
        for keyword in node.keywords
    }
    assert names == {"num_head_slots", "state_content_bytes"}
    assert names <= set(spec.__dataclass_fields__)


def test_an_attribute_that_is_not_there_is_found_out() -> None:
    code = """
def count(scheduler_output, vllm_config):
    for request in scheduler_output.scheduled_new_reqs:
        request.block_ids, request.no_such_ids
    parallel = vllm_config.parallel_config
    parallel.world_size, parallel.no_such_size
    [request.no_such_tokens for request in scheduler_output.scheduled_new_reqs]
"""
    found = missing(reads(Source("vllm_magicpig/some.py", ast.parse(code))))
    assert [line.split()[-1] for line in found] == ["no_such_ids", "no_such_size", "no_such_tokens"]


def missing(found: list[Read]) -> list[str]:
    return [
        f"{read.place}: {read.cls.__name__} has no {read.name}"
        for read in found
        if not has_attribute(read.cls, read.name)
    ]
