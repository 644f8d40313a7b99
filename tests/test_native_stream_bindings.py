"""Bad input of the stream classes is refused at the door, in a sentence that names the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_helpers import MISSING_ISAS, Rule, pool
from stream_helpers import CPUS

from vllm_magicpig import _C

ISA = _C.Isa.portable


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def make_pages(row_dtype: str = "float32", num_tables: int = 4) -> _C.Pages:
    chunk = _C.Pages.chunk_bytes(row_dtype, 32, 16, num_tables)
    return _C.Pages(zeros(6, 2, chunk, dtype=np.uint8), row_dtype, 32, 16, num_tables)


PAGES = make_pages()
INDEX = _C.LshIndex(PAGES, 3, [32])


def metadata(**changes: Any) -> _C.StreamMetadata:
    arguments: dict[str, Any] = {
        "block_tables": zeros(5, 3, dtype=np.int32),
        "seq_lens": zeros(5, dtype=np.int32),
        "slots": zeros(20, dtype=np.int64),
    }
    return _C.StreamMetadata(**{**arguments, **changes})


def step(**changes: Any) -> _C.StreamStep:
    arguments: dict[str, Any] = {
        "metadata": metadata(),
        "num_reqs": 4,
        "num_tokens": 12,
        "decode_rows": np.array([3, 0], np.int32),
        "decode_tokens": np.array([11, 0]),
        "chunk_rows": np.array([1], np.int32),
        "chunk_starts": np.array([1]),
        "chunk_stops": np.array([12]),
    }
    return _C.StreamStep(**{**arguments, **changes})


def exchange(**changes: Any) -> _C.DecodeExchange:
    arguments: dict[str, Any] = {
        "query": zeros(3, 4, 16),
        "key": zeros(3, 2, 16),
        "value": zeros(3, 2, 16),
        "query_codes": zeros(3, 4, 4, dtype=np.uint16),
        "key_codes": zeros(3, 2, 4, dtype=np.uint16),
        "out": zeros(3, 4, 16),
    }
    return _C.DecodeExchange(**{**arguments, **changes})


def layer(**changes: Any) -> _C.StreamLayer:
    arguments: dict[str, Any] = {
        "pages": PAGES,
        "rule": Rule().native(3, 4),
        "index": INDEX,
        "exchange": exchange(),
        "callbacks": _C.HostCallbacks(1),
        "builder": None,
        "scale": 0.25,
        "exact_below": 0,
        "isa": ISA,
        "pool": pool(),
    }
    return _C.StreamLayer(**{**arguments, **changes})


def exact_layer(**changes: Any) -> _C.StreamLayer:
    return layer(**{"rule": None, "index": None, **changes})


HALVES = {"key": zeros(3, 2, 16, dtype=np.uint16), "value": zeros(3, 2, 16, dtype=np.uint16)}
NO_CODES = {"query_codes": None, "key_codes": None}


def test_the_good_calls_that_the_bad_ones_vary() -> None:
    metadata()
    step()
    assert exchange().max_decodes == 3
    exchange(**HALVES, **NO_CODES)
    layer().set_center(zeros(2, 16))
    exact_layer(exchange=exchange(**NO_CODES))
    exact_layer(pages=make_pages(num_tables=0), exchange=exchange(**NO_CODES))
    exact_layer(pages=make_pages("bfloat16"), exchange=exchange(**HALVES))


def test_zero_of_everything() -> None:
    nothing = metadata(
        block_tables=zeros(0, 0, dtype=np.int32),
        seq_lens=zeros(0, dtype=np.int32),
        slots=zeros(0, dtype=np.int64),
    )
    rows, tokens = zeros(0, dtype=np.int32), zeros(0, dtype=np.int64)
    empty = step(
        metadata=nothing,
        num_reqs=0,
        num_tokens=0,
        decode_rows=rows,
        decode_tokens=tokens,
        chunk_rows=rows,
        chunk_starts=tokens,
        chunk_stops=tokens,
    )
    layer().launch_stored(0, empty)  # launches nothing: there is no function at address 1
    layer().launch_decode(0, empty)


STEPS = [
    ({"num_reqs": 6}, r"num_reqs is 6, .*0\.\.5"),
    ({"num_reqs": -1}, "num_reqs is -1"),
    ({"num_tokens": 21}, r"num_tokens is 21, .*0\.\.20"),
    ({"decode_rows": np.array([3, 4], np.int32)}, r"decode_rows\[1\] is 4, .*0\.\.3"),
    ({"decode_rows": np.array([-1, 3], np.int32)}, r"decode_rows\[0\] is -1"),
    ({"decode_rows": np.array([3, 0])}, "decode_rows is int64"),
    ({"decode_rows": np.array([3, 3], np.int32)}, "Row 3 is named twice"),
    ({"chunk_rows": np.array([3], np.int32)}, "Row 3 is named twice"),
    ({"decode_tokens": np.array([11, 12])}, r"decode_tokens\[1\] is 12, .*0\.\.11"),
    ({"decode_tokens": np.array([1])}, r"decode_tokens has shape \(1\), .*num_decodes = 2"),
    ({"decode_tokens": np.array([1, 2], np.int32)}, "decode_tokens is int32"),
    ({"chunk_rows": np.array([4], np.int32)}, r"chunk_rows\[0\] is 4"),
    ({"chunk_rows": zeros(1, 1, dtype=np.int32)}, r"chunk_rows has shape \(1, 1\)"),
    ({"chunk_starts": np.array([-1])}, r"chunk_starts\[0\] is -1"),
    ({"chunk_stops": np.array([13])}, r"chunk_stops\[0\] is 13, .*0\.\.12"),
    ({"chunk_stops": np.array([1])}, r"chunk_starts\[0\] is 1, but chunk_stops\[0\] is 1"),
    ({"chunk_stops": np.array([1, 2])}, r"chunk_stops has shape \(2\), .*num_chunks = 1"),
]
METADATA = [
    ({"block_tables": zeros(5, dtype=np.int32)}, r"block_tables has shape \(5\)"),
    ({"block_tables": zeros(5, 3, dtype=np.int64)}, "block_tables is int64"),
    ({"block_tables": zeros(5, 6, dtype=np.int32)[:, ::2]}, "block_tables .*not C-contiguous"),
    ({"seq_lens": zeros(4, dtype=np.int32)}, r"seq_lens has shape \(4\), .*max_reqs = 5"),
    ({"slots": zeros(20, dtype=np.int32)}, "slots is int32"),
]
EXCHANGES = [
    ({"query": zeros(3, 4)}, r"query has shape \(3, 4\)"),
    ({"query": zeros(0, 4, 16)}, "max_decodes is 0"),
    ({"query": zeros(2, 4, 16)}, r"has shape \(3, .*max_decodes = 2"),
    ({"out": read_only(zeros(3, 4, 16))}, "out .*read-only"),
    ({"out": zeros(3, 5, 16)}, r"out has shape \(3, 5, 16\)"),
    ({"key": zeros(3, 2, 24)}, r"key has shape \(3, 2, 24\)"),
    ({"key": zeros(3, 2, 16, dtype=np.float64)}, "key is float64, but uint16"),
    ({"value": HALVES["value"]}, "value is uint16, but float32"),
    ({"value": zeros(3, 4, 16)[:, ::2]}, "value .*not C-contiguous"),
    ({"query_codes": None}, "Of query_codes and key_codes one is None"),
    ({"key_codes": None}, "Of query_codes and key_codes one is None"),
    ({"query_codes": zeros(3, 4, 4, dtype=np.int32)}, "query_codes is int32"),
    ({"key_codes": zeros(3, 2, 5, dtype=np.uint16)}, r"key_codes has shape .*L = 4"),
]
OUT = zeros(3, 4, 16)
SHARED = [
    ({"out": OUT, name: OUT.reshape(-1).view(dtype)[: np.prod(shape)].reshape(shape)}, name)
    for name, shape, dtype in (
        ("query", (3, 4, 16), np.float32),
        ("key", (3, 2, 16), np.float32),
        ("value", (3, 2, 16), np.float32),
        ("query_codes", (3, 4, 4), np.uint16),
        ("key_codes", (3, 2, 4), np.uint16),
    )
]


def layer_whose_exchange_is_in_the_pages() -> None:
    memory = zeros(6, 2, _C.Pages.chunk_bytes("float32", 32, 16, 4), dtype=np.uint8)
    out = memory.reshape(-1)[: OUT.nbytes].view(np.float32).reshape(OUT.shape)
    exact_layer(
        pages=_C.Pages(memory, "float32", 32, 16, 4), exchange=exchange(out=out, **NO_CODES)
    )


LAYERS = [
    ({"rule": None}, "index is given without a rule"),
    ({"index": None, "builder": _C.SegmentBuilder(CPUS[:1])}, "builder is given without an index"),
    ({"index": _C.LshIndex(make_pages(), 3, [32])}, "index belongs to other pages"),
    ({"rule": Rule().native(3, 5)}, "rule is for L = 5, but the pages hold codes of 4 tables"),
    ({"rule": Rule().native(4, 4)}, "rule is for K = 4, but the index for K = 3"),
    ({"exact_below": -1}, "exact_below is -1"),
    ({"scale": float("inf")}, "scale is inf"),
    *(({"isa": getattr(_C.Isa, name)}, f"isa is {name}, ") for name in MISSING_ISAS),
    ({"exchange": exchange(query=zeros(3, 3, 16), out=zeros(3, 3, 16), **NO_CODES)}, "is 3"),
    ({"exchange": exchange(**NO_CODES)}, "codes of 0 tables, but the pages of 4"),
    ({"exchange": exchange(**HALVES)}, "2-byte elements, but the pages of 4"),
]
EXACT_LAYERS = [
    ({"builder": _C.SegmentBuilder(CPUS[:1])}, "builder is given without an index"),
    (
        {"exchange": exchange(**{k: zeros(3, 1, 16) for k in ("key", "value")}, **NO_CODES)},
        "exchange has 1 kv heads of size 16, but the pages have 2 of 16",
    ),
]
OTHERS = [
    (layer_whose_exchange_is_in_the_pages, {}, "exchange shares memory with the memory of the"),
    (lambda: _C.HostCallbacks(0), {}, "launch_host_func is 0"),
    (lambda: layer().set_center(zeros(1, 16)), {}, r"center has shape \(1, 16\)"),
    (lambda: layer().set_center(zeros(2, 16, dtype=np.float64)), {}, "center is float64"),
    (lambda: exact_layer().set_center(zeros(2, 16)), {}, "has no rule"),
    (lambda: PAGES.note_writes(np.array([3, 192])), {}, r"slots\[1\] is 192"),
    (lambda: PAGES.note_writes(np.array([-2])), {}, r"slots\[0\] is -2"),
    (lambda: PAGES.note_writes(zeros(2, 2, dtype=np.int64)), {}, r"slots has shape \(2, 2\)"),
]
BAD = [
    *((step, change, text) for change, text in STEPS),
    *((metadata, change, text) for change, text in METADATA),
    *((exchange, change, text) for change, text in EXCHANGES),
    *((exchange, change, f"{name} shares memory with out") for change, name in SHARED),
    *((layer, change, text) for change, text in LAYERS),
    *((exact_layer, change, text) for change, text in EXACT_LAYERS),
    *OTHERS,
]


@pytest.mark.parametrize(
    ("call", "change", "text"), BAD, ids=[f"{i}-{text}" for i, (_, _, text) in enumerate(BAD)]
)
def test_bad_input_is_named(call: Callable[..., Any], change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as refusal:
        call(**change)
    sentence = str(refusal.value)
    assert sentence[0].isalpha()
    assert sentence.endswith(".")
    assert ";" in sentence, "what to do follows what is wrong"


def test_lists_are_not_taken_for_arrays() -> None:
    with pytest.raises(TypeError):
        metadata(slots=[1, 2, 3])
    with pytest.raises(TypeError):
        exchange(out=zeros(3, 4, 16).tolist())


def test_a_stream_is_a_handle() -> None:
    with pytest.raises(TypeError):
        layer().launch_decode(-1, step())


def test_none_is_not_taken_for_self() -> None:
    """pybind11 would pass a null pointer to a member function."""
    for function in (
        _C.HostCallbacks.raise_error,
        _C.HostCallbacks.pending.fget,  # type: ignore[attr-defined]
        _C.SegmentBuilder.drain,
        _C.SegmentBuilder.raise_error,
        _C.SegmentBuilder.pending.fget,  # type: ignore[attr-defined]
        _C.DecodeExchange.max_decodes.fget,  # type: ignore[attr-defined]
        _C.DecodeCounters.step_ns.fget,  # type: ignore[attr-defined]
        _C.StreamLayer.recent_rows,
    ):
        with pytest.raises(TypeError):
            function(None)
