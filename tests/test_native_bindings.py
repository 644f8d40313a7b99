"""Bad input is refused at the door, in a sentence that names the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from native_helpers import (
    ISA_NAMES,
    MISSING_ISAS,
    Rule,
    decode_attention,
    inclusion_table,
    pool,
)

from vllm_magicpig import _C

ISA = _C.Isa.portable
CHUNK = _C.Pages.chunk_bytes("float32", 32, 16, 4)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def make_pages(**changes: Any) -> _C.Pages:
    arguments: dict[str, Any] = {
        "memory": zeros(6, 2, CHUNK, dtype=np.uint8),
        "row_dtype": "float32",
        "block_size": 32,
        "head_size": 16,
        "num_tables": 4,
    }
    return _C.Pages(**{**arguments, **changes})


PAGES = make_pages()
INDEX = _C.LshIndex(PAGES, 3, [32])
TABLE = inclusion_table(3, 4)
HASH = _C.SimHash(np.ones((3 + 3, 16), np.int8), 16, 3, 8)  # of 8 tables, where the pages have 4


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    return raw[1:].view(array.dtype).reshape(array.shape)


def store_rows(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "key": zeros(3, 2, 16),
        "value": zeros(3, 2, 16),
        "slots": np.array([5, -1, 191], np.int64),
        "pool": pool(),
    }
    PAGES.store_rows(**{**arguments, **changes})


def store_codes(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "codes": zeros(3, 2, 4, dtype=np.uint16),
        "slots": np.array([5, -1, 191], np.int64),
        "pool": pool(),
    }
    PAGES.store_codes(**{**arguments, **changes})


class OldTensor:
    shape = (2, 4, 16)

    def __dlpack__(self) -> None: ...


TABLES = np.array([[0, 1, 2, 99], [3, 4, -1, 99]], np.int32)
LENS = np.array([96, 40], np.int32)


def seal(**changes: Any) -> int:
    arguments: dict[str, Any] = {"block_tables": TABLES, "seq_lens": LENS, "pool": pool()}
    return _C.LshIndex(PAGES, 3, [32]).seal(**{**arguments, **changes})


def sample(**changes: Any) -> list[list[np.ndarray]]:
    arguments: dict[str, Any] = {
        "pages": PAGES,
        "rule": Rule().native(3, 4),
        "index": INDEX,
        "query_codes": zeros(2, 4, 4, dtype=np.uint16),
        "block_tables": TABLES,
        "seq_lens": LENS,
        "isa": ISA,
        "pool": pool(),
    }
    return _C.sample(**{**arguments, **changes})


def decode(**changes: Any) -> tuple[np.ndarray, _C.DecodeCounters]:
    arguments: dict[str, Any] = {
        "pages": PAGES,
        "rule": Rule().native(3, 4),
        "index": INDEX,
        "query": zeros(2, 4, 16),
        "query_codes": zeros(2, 4, 4, dtype=np.uint16),
        "center": zeros(2, 16),
        "block_tables": TABLES,
        "seq_lens": LENS,
        "out": zeros(2, 4, 16),
        "lse": zeros(2, 4),
        "scale": 0.25,
        "exact_below": 0,
        "isa": ISA,
        "pool": pool(),
    }
    return decode_attention(**{**arguments, **changes})


def test_the_good_calls_that_the_bad_ones_vary() -> None:
    store_rows()
    store_codes()
    assert seal() == 4
    assert [len(heads) for heads in sample()] == [4, 4]
    assert decode()[0].shape == (2, 4)
    nothing = {"rule": None, "index": None, "query_codes": None, "center": None}
    assert decode(**nothing)[0].tolist() == [[-1] * 4] * 2
    # Only whole rows of block tables need to be contiguous.
    assert seal(block_tables=np.repeat(TABLES, 2, axis=0)[::2]) == 4
    assert seal(block_tables=np.tile(TABLES, 2)[:, :4]) == 4


def test_zero_of_everything() -> None:
    none = {"block_tables": np.zeros((0, 4), np.int32), "seq_lens": np.zeros(0, np.int32)}
    assert seal(**none) == 0
    assert sample(**none, query_codes=zeros(0, 4, 4, dtype=np.uint16)) == []
    empty = {"query": zeros(0, 4, 16), "out": zeros(0, 4, 16), "lse": zeros(0, 4)}
    codes = zeros(0, 4, 4, dtype=np.uint16)
    assert decode(**none, **empty, query_codes=codes)[0].shape == (0, 4)
    no_tokens = {"block_tables": np.zeros((2, 0), np.int32), "seq_lens": np.zeros(2, np.int32)}
    assert seal(**no_tokens) == 0
    assert [[ids.size for ids, _, _ in heads] for heads in sample(**no_tokens)] == [[0] * 4] * 2
    out, lse = np.ones((2, 4, 16), np.float32), zeros(2, 4)
    decode(**no_tokens, out=out, lse=lse)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert _C.pack_codes(zeros(0, 8), 4, ISA, pool()).shape == (0, 2)
    pages = make_pages(memory=zeros(0, 2, CHUNK, dtype=np.uint8))
    assert _C.LshIndex(pages, 3, [32]).seal(**no_tokens, pool=pool()) == 0


ROWS = [
    (store_rows, {"slots": np.array([0, 1, 192], np.int64)}, r"slots\[2\] is 192"),
    (store_rows, {"slots": np.array([0, -2, 3], np.int64)}, r"slots\[1\] is -2"),
    (store_rows, {"slots": np.array([0, 1, 2], np.int32)}, "slots is int32"),
    (store_rows, {"slots": np.arange(6)[::2]}, "slots .*not C-contiguous"),
    (store_rows, {"slots": np.zeros((3, 1), np.int64)}, r"slots has shape \(3, 1\)"),
    (store_rows, {"slots": np.arange(4)}, r"key has shape \(3, 2, 16\).* = 4"),
    (store_rows, {"key": zeros(3, 2, 16, dtype=np.uint16)}, "key is uint16"),
    (store_rows, {"key": zeros(3, 2, 16, dtype=np.float64)}, "key is float64"),
    (store_rows, {"key": zeros(3, 2, 24)}, r"key has shape \(3, 2, 24\)"),
    (store_rows, {"key": zeros(3, 2, 32)[:, :, ::2]}, "key has a stride of 8"),
    (store_rows, {"value": zeros(3, 1, 16)}, r"value has shape \(3, 1, 16\)"),
    (store_rows, {"value": zeros(2, 2, 16)}, r"value has shape \(2, 2, 16\)"),
    (store_codes, {"codes": zeros(3, 2, 5, dtype=np.uint16)}, r"codes has shape \(3, 2, 5\)"),
    (store_codes, {"codes": zeros(3, 2, 4, dtype=np.int16)}, "codes is int16"),
    (store_codes, {"codes": zeros(3, 2, 8, dtype=np.uint16)[:, :, ::2]}, "not C-contiguous"),
    (store_codes, {"slots": np.array([0, 1, 500], np.int64)}, r"slots\[2\] is 500"),
]
LAYOUTS = [
    (make_pages, {"row_dtype": "float64"}, "float64"),
    (make_pages, {"block_size": 48}, "48"),
    (make_pages, {"block_size": 0}, "block_size is 0"),
    (make_pages, {"head_size": 12}, "12"),
    (make_pages, {"head_size": 264}, "264"),
    (make_pages, {"num_tables": 256}, "256"),
    (make_pages, {"num_tables": -1}, "-1"),
    (make_pages, {"num_tables": 5}, f"{CHUNK} bytes.*{CHUNK + 64}"),
    (make_pages, {"memory": zeros(6, 2, CHUNK)}, "memory is float32"),
    (make_pages, {"memory": zeros(6, CHUNK, dtype=np.uint8)}, r"memory has shape \(6,"),
    (make_pages, {"memory": zeros(6, 0, CHUNK, dtype=np.uint8)}, "num_kv_heads is 0"),
    (make_pages, {"memory": zeros(6, 2, CHUNK + 1, dtype=np.uint8)}, f"{CHUNK + 1} bytes"),
    (make_pages, {"memory": zeros(12, 2, CHUNK, dtype=np.uint8)[::2]}, "not C-contiguous"),
    (make_pages, {"memory": read_only(zeros(6, 2, CHUNK, dtype=np.uint8))}, "read-only"),
    (make_pages, {"memory": misaligned(zeros(6, 2, CHUNK, dtype=np.uint8))}, "odd address"),
]
BATCHES = [
    ({"seq_lens": np.array([96, -1], np.int32)}, r"seq_lens\[1\] is -1"),
    ({"seq_lens": np.array([129, 40], np.int32)}, r"seq_lens\[0\] is 129"),
    ({"seq_lens": np.array([97, 40], np.int32)}, r"block_tables\[0, 3\] is 99"),
    ({"seq_lens": np.array([96, 65], np.int32)}, r"block_tables\[1, 2\] is -1"),
    ({"seq_lens": np.array([96], np.int32)}, r"seq_lens has shape \(1\)"),
    ({"seq_lens": np.array([96, 40])}, "seq_lens is int64"),
    ({"block_tables": TABLES[0]}, r"block_tables has shape \(4\)"),
    ({"block_tables": TABLES.astype(np.int64)}, "block_tables is int64"),
    ({"block_tables": np.repeat(TABLES, 2, axis=1)[:, ::2]}, "block_tables has strides"),
    ({"block_tables": misaligned(TABLES)}, "block_tables is not aligned"),
]
RULES = [
    ({"query_codes": np.full((2, 4, 4), 8, np.uint16)}, "query_codes holds 8"),
    ({"query_codes": zeros(2, 4, 5, dtype=np.uint16)}, r"query_codes has shape \(2, 4, 5\)"),
    ({"query_codes": zeros(2, 4, 4, dtype=np.int32)}, "query_codes is int32"),
    ({"rule": Rule().native(3, 5)}, "rule is for L = 5, but the pages hold codes of 4 tables"),
    ({"rule": Rule().native(4, 4)}, "rule is for K = 4, but the index for K = 3"),
    ({"index": _C.LshIndex(make_pages(), 3, [32])}, "index belongs to other pages"),
]
DECODES = [
    ({"query": zeros(2, 4, 24)}, r"query has shape \(2, 4, 24\)"),
    ({"query": zeros(1, 4, 16)}, "query has 1 rows, but the batch needs 2"),
    ({"query": zeros(2, 4, 16, 1)}, "query has 4 dimensions"),
    ({"query": zeros(2, 3, 16)}, "num_q_heads is 3"),
    ({"query": zeros(2, 0, 16)}, "num_q_heads is 0"),
    ({"query": zeros(2, 130, 16)}, "num_q_heads is 130"),
    ({"query": zeros(2, 4, 16, dtype=np.float64)}, "query is float64"),
    ({"query": zeros(2, 4, 32)[..., ::2]}, "query has a stride of 8 bytes in its last dimension"),
    (
        {"query": torch.zeros(2, 4, 16, dtype=torch.bfloat16)},
        "query is bfloat16, but must be float32 or what the pages hold, float32",
    ),
    (
        {"query": torch.zeros(2, 4, 16, device="meta")},
        "query is a tensor that is not in the CPU's memory .*meta",
    ),
    ({"query": torch.zeros(2, 64)}, r"query has shape \(2, 64\)"),
    ({"query": [[[0.0]]]}, "query is a list, but must be an array or a tensor"),
    ({"query": OldTensor()}, "query is a OldTensor, whose library has no DLPack C exchange table"),
    ({"query_codes": HASH}, "hasher is for vectors of 16 elements and 8 tables"),
    ({"query": misaligned(zeros(2, 4, 16))}, "query is not aligned"),
    ({"query_codes": zeros(2, 2, 4, dtype=np.uint16)}, r"query_codes has shape \(2, 2, 4\)"),
    ({"center": zeros(1, 16)}, r"center has shape \(1, 16\)"),
    ({"out": zeros(2, 4, 8)}, r"out has shape \(2, 4, 8\)"),
    ({"out": read_only(zeros(2, 4, 16))}, "out .*read-only"),
    ({"out": torch.zeros(2, 8, 16)[:, ::2]}, "out has strides of 512 and 128 bytes"),
    ({"out": torch.zeros(1, 4, 16).expand(2, 4, 16)}, "out has strides of 0 and 64 bytes"),
    ({"lse": zeros(2, 4, 1)}, r"lse has shape \(2, 4, 1\)"),
    ({"lse": zeros(2, 8)[:, ::2]}, "lse .*not C-contiguous"),
    ({"exact_below": -1}, "exact_below is -1"),
    ({"rule": None}, "index is given without a rule"),
    ({"rule": None, "index": None}, "This layer has no rule, but a center is for codes"),
    ({"rule": None, "index": None, "query_codes": HASH}, "hasher is given without a rule"),
    ({"center": None}, "query_codes are given, but this layer attends exactly; pass None"),
    ({"query_codes": None}, "query_codes are None, but this layer has no hasher; pass them"),
    ({"tokens": np.array([0, 2])}, "query has 2 rows, but the batch needs 3"),
    ({"tokens": np.array([1, 1])}, r"tokens\[1\] is 1, .*ascending"),
    ({"tokens": np.array([-1, 1])}, r"tokens\[0\] is -1"),
    ({"tokens": np.array([0])}, r"tokens has shape \(1\)"),
    ({"scale": float("nan")}, "scale is nan"),
    ({"scale": 1e300}, r"scale is 1e\+300"),
]


def view(memory: np.ndarray, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An array in memory that is another's, too."""
    return memory.reshape(-1).view(dtype)[: int(np.prod(shape))].reshape(shape)


def store_from_the_pages(name: str) -> None:
    memory = zeros(6, 2, CHUNK, dtype=np.uint8)
    views = {
        "slots": view(memory, (3,), np.int64),
        "codes": view(memory, (3, 2, 4), np.uint16),
        "key": view(memory, (17, 2, 16))[16:13:-1],  # any strides: backwards, too
        "value": view(memory, (17, 2, 16))[::8],
    }
    pages, change = make_pages(memory=memory), {name: views[name]}
    if name == "codes":
        pages.store_codes(**change, slots=np.arange(3), pool=pool())
    else:
        rows = {"key": zeros(3, 2, 16), "value": zeros(3, 2, 16), "slots": np.arange(3)}
        pages.store_rows(**{**rows, **change}, pool=pool())


def decode_into_the_pages() -> None:
    memory = zeros(6, 2, CHUNK, dtype=np.uint8)
    nothing = {"rule": None, "index": None, "query_codes": None, "center": None}
    decode(pages=make_pages(memory=memory), out=view(memory, (2, 4, 16)), **nothing)


SHARED = zeros(2, 4, 16)
# Block numbers, lengths, codes and slots index memory: nothing may change them once they are checked.
OVERLAPS = [
    *(
        (decode, {written: view(SHARED, shape), name: view(SHARED, *other)}, f"{name} shares")
        for written, shape in (("out", (2, 4, 16)), ("lse", (2, 4)))
        for name, other in {
            "query": ((2, 4, 16),),
            "query_codes": ((2, 4, 4), np.uint16),
        }.items()
    ),
    (decode, {"out": SHARED, "lse": view(SHARED, (2, 4))}, "lse shares memory with out"),
    (decode_into_the_pages, {}, "the memory of the pages shares memory with out"),
    *(
        (store_from_the_pages, {"name": n}, f"{n} shares")
        for n in ("key", "value", "slots", "codes")
    ),
]
LONG_BLOCK = make_pages(
    memory=zeros(1, 1, _C.Pages.chunk_bytes("float32", 65536, 16, 4), dtype=np.uint8),
    block_size=65536,
)
LONG = _C.LshIndex(LONG_BLOCK, 3, [65536])
LONG_TABLE = zeros(1, 65536, dtype=np.int32)
OTHERS = [
    (lambda: _C.resolve_isa("avx1024"), {}, '"avx1024".*auto, portable'),
    (lambda: _C.LshIndex(PAGES, 1, [32]), {}, "num_bits is 1"),
    (lambda: _C.LshIndex(PAGES, 16, [32]), {}, "num_bits is 16"),
    (lambda: _C.LshIndex(PAGES, 3, []), {}, "levels is empty"),
    (lambda: _C.LshIndex(PAGES, 3, [48]), {}, r"levels\[0\] is 48, .* the block size 32 up to"),
    (lambda: _C.LshIndex(PAGES, 3, [0]), {}, r"levels\[0\] is 0"),
    (lambda: _C.LshIndex(PAGES, 3, [32, 65_568]), {}, r"levels\[1\] is 65568"),
    (lambda: _C.LshIndex(PAGES, 3, [64, 96]), {}, r"levels\[1\] is 96, .* before it, 64"),
    (lambda: _C.LshIndex(PAGES, 3, [64, 64]), {}, r"levels\[1\] is 64"),
    (lambda: _C.LshIndex(PAGES, 3, [32], -1), {}, "max_bytes is -1"),
    (lambda: _C.LshIndex(make_pages(num_tables=0), 3, [32]), {}, "num_tables = 0"),
    (lambda: make_pages(num_tables=0).load_codes(zeros(1, dtype=np.int64)), {}, "num_tables = 0"),
    (lambda: PAGES.load_codes(np.array([3, -1], np.int64)), {}, r"slots\[1\] is -1"),
    (lambda: PAGES.load_codes(np.array([192], np.int64)), {}, r"slots\[0\] is 192"),
    (lambda: PAGES.epoch(6), {}, "block is 6"),
    (lambda: PAGES.epoch(-1), {}, "block is -1"),
    (lambda: len(INDEX.find(TABLES[0], 97)), {}, r"block_table\[3\] is 99"),
    (lambda: len(INDEX.find(TABLES[0], 129)), {}, "num_tokens is 129"),
    (lambda: len(INDEX.find(TABLES[0], -1)), {}, "num_tokens is -1"),
    (lambda: len(INDEX.find(TABLES, 1)), {}, "block_table has shape"),
    (lambda: _C.InclusionTable(0, 4), {}, "num_bits is 0"),
    (lambda: _C.InclusionTable(3, 256), {}, "num_tables is 256"),
    (lambda: _C.InclusionTable(1, 4), {}, "num_bits is 1"),
    (lambda: TABLE.log_u(zeros(2, 2), 1, 1.0, ISA), {}, r"cosine has shape \(2, 2\)"),
    (lambda: TABLE.log_u(zeros(2), 5, 1.0, ISA), {}, "min_matches is 5"),
    (lambda: TABLE.log_u(zeros(2), 1, 0.0, ISA), {}, "fraction is 0"),
    (lambda: TABLE.log_u(zeros(2), 1, float("nan"), ISA), {}, "fraction is nan"),
    (lambda: Rule(min_matches=0).native(3, 4), {}, "min_matches is 0"),
    (lambda: Rule(min_matches=5).native(3, 4), {}, "min_matches is 5"),
    (lambda: Rule(sink_tokens=-1).native(3, 4), {}, "sink_tokens is -1"),
    (lambda: Rule(window_tokens=-1).native(3, 4), {}, "window_tokens is -1"),
    (lambda: Rule(row_budget=1.01).native(3, 4), {}, "row_budget is 1.01"),
    (lambda: Rule(row_budget=float("nan")).native(3, 4), {}, "row_budget is nan"),
    (lambda: len(LONG.find(LONG_TABLE[0], 1 << 31)), {}, "num_tokens is 2147483648"),
    (
        lambda: LONG.seal(LONG_TABLE, np.array([2**31 - 1], np.int32), pool()),
        {},
        r"seq_lens\[0\] is 2147483647, .*0\.\.1073741824",
    ),
    (lambda: _C.pack_codes(zeros(2, 8), 4, _C.Isa(99), pool()), {}, "isa is unknown"),
    (lambda: _C.pack_codes(zeros(2, 9), 4, ISA, pool()), {}, "projections has 9 columns"),
    (lambda: _C.pack_codes(zeros(2, 0), 4, ISA, pool()), {}, "num_tables is 0"),
    (lambda: _C.pack_codes(zeros(2, 256), 1, ISA, pool()), {}, "num_tables is 256"),
    (lambda: _C.pack_codes(zeros(2, 17), 17, ISA, pool()), {}, "num_bits is 17"),
    (lambda: _C.pack_codes(zeros(8), 4, ISA, pool()), {}, r"projections has shape \(8\)"),
]
BAD = [
    *LAYOUTS,
    *ROWS,
    *((call, change, text) for call in (seal, sample, decode) for change, text in BATCHES),
    *((call, change, text) for call in (sample, decode) for change, text in RULES),
    *((decode, change, text) for change, text in DECODES),
    *OVERLAPS,
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


@pytest.mark.skipif(not MISSING_ISAS, reason="this CPU has every instruction set")
def test_a_missing_isa_is_named() -> None:
    ones = np.ones((2, 64), np.int8)
    calls: list[Callable[[_C.Isa], object]] = [
        lambda isa: sample(isa=isa),
        lambda isa: decode(isa=isa),
        lambda isa: _C.InclusionTable(3, 4).log_u(zeros(2), 1, 1.0, isa),
        lambda isa: _C.pack_codes(zeros(2, 8), 4, isa, pool()),
        lambda isa: _C.encode_signatures(zeros(128, 64), "float32", ones, 2, isa, pool()),
    ]
    for name in MISSING_ISAS:
        for call in calls:
            with pytest.raises(ValueError, match=f"isa is {name}, .*; "):
                call(getattr(_C.Isa, name))
        with pytest.raises(ValueError, match=f'isa is "{name}", .*auto, portable'):
            _C.resolve_isa(name)


def make_layer(**changes: Any) -> _C.DecodeLayer:
    arguments = {"pages": PAGES, "rule": Rule().native(3, 4), "index": INDEX, "hasher": None}
    settings = {"scale": 0.25, "exact_below": 0, "isa": ISA, "pool": pool()}
    return _C.DecodeLayer(**{**arguments, **settings, **changes})


def test_a_layer_has_one_centre() -> None:
    layer = make_layer()
    layer.set_center(zeros(2, 16))
    with pytest.raises(ValueError, match=r"has its center, .*; make a new layer"):
        layer.set_center(zeros(2, 16))


def test_a_batch_is_for_pages_of_as_many_blocks() -> None:
    other = _C.DecodeBatch(
        make_pages(memory=zeros(7, 2, CHUNK, dtype=np.uint8)), TABLES, LENS, None
    )
    with pytest.raises(ValueError, match=r"made for 7 blocks of 32 tokens, .* has 6 of 32; make"):
        make_layer().attend(zeros(2, 4, 16), other, zeros(2, 4, 16))


def test_sampling_works_after_all_of_that() -> None:
    assert [len(heads) for heads in sample()] == [4, 4]


def test_lists_are_not_taken_for_arrays() -> None:
    """They would be copied, and what is written into a copy is lost."""
    with pytest.raises(TypeError):
        decode(lse=zeros(2, 4).tolist())
    with pytest.raises(ValueError, match="out is a list"):
        decode(out=zeros(2, 4, 16).tolist())


NONES = [
    lambda: _C.LshIndex(None, 3, [32]),  # type: ignore[arg-type]
    lambda: _C.ThreadPool.num_threads.fget(None),  # type: ignore[attr-defined]
    lambda: _C.Pages.written_blocks(None),  # type: ignore[arg-type]
    (lambda: decode(pages=None)),
    (lambda: sample(pool=None)),
    (lambda: sample(isa=None)),
]


@pytest.mark.parametrize("call", NONES)
def test_none_is_not_taken_for_an_object(call: Callable[[], Any]) -> None:
    """pybind11 would pass a null pointer."""
    with pytest.raises(TypeError):
        call()


def test_the_isa_has_its_names() -> None:
    assert _C.resolve_isa("portable") is not None
    assert _C.resolve_isa("portable").name == "portable"
    available = [name for name in ISA_NAMES if name not in MISSING_ISAS]
    assert [_C.resolve_isa(name).name for name in available] == available
    assert _C.resolve_isa("auto").name == available[-1]
    assert list(_C.Isa.__members__) == list(ISA_NAMES)
