"""Calls everything in vllm_magicpig._C with random arguments, mostly valid ones with something bent.

    .venv/bin/python scripts/fuzz_bindings.py --seconds 20
    .venv/bin/python scripts/fuzz_bindings.py --seed 7 --case 1234     # one case again

Each call has to return, or to raise one of REFUSALS. Anything else is a failure: another exception,
a crash, a call that never comes back. The case is written down before it runs, so that even a crash
leaves the line that reproduces it. Cases do not depend on each other: case I of seed S makes its own
objects, but for those of SLOW_TO_MAKE. No torch, so that it starts quickly under a sanitizer
(scripts/sanitize.py).

What there is to call, and with which arguments, is read from the module's docstrings. A new argument
needs its line in ARGUMENTS, and is asked for where it has none.
"""

from __future__ import annotations

import argparse
import faulthandler
import inspect
import mmap
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sanitized_extension

sanitized_extension.load()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import numpy as np  # noqa: E402
from argument_types import positive, positive_number, whole  # noqa: E402
from fake_driver import FakeDriver  # noqa: E402

from vllm_magicpig import _C  # noqa: E402
from vllm_magicpig.capacity import signature_block_bytes  # noqa: E402

REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, OverflowError, MemoryError)
CALLS_PER_CASE = 6
HANG_S = 120  # a sanitizer on a busy machine slows a call of milliseconds to seconds, not to this
CPUS = sorted(os.sched_getaffinity(0))


# ------------------------------------------------------------------------------------- a case


@dataclass
class Case:
    """The dimensions that fit each other in one case, and the objects made so far."""

    rng: random.Random
    driver: FakeDriver
    stream: int
    shared: dict[tuple[str, ...], Any]
    objects: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose = self.rng.choice
        self.row_dtype = choose(["float32", "bfloat16", "float16"])
        self.block_size = choose([32, 64, 128, 128])
        self.head_size = choose([16, 24, 64, 72, 256])
        self.num_blocks = choose([1, 4, 9])
        self.num_kv_heads = choose([1, 2, 3])
        self.num_q_heads = self.num_kv_heads * choose([1, 2, 3, 5])
        self.num_bits = choose([2, 3, 8, 15])
        self.num_tables = choose([1, 2, 8, 8, 8, 33, 255])
        self.min_matches = choose([1, 1, 2, self.num_tables // 2, self.num_tables])
        self.min_matches = max(1, min(self.min_matches, self.num_tables))
        self.signature_bits = choose([1, 2, 4])
        self.levels = [self.block_size * n for n in choose([[1], [1], [2], [1, 2], [1, 3, 9]])]
        self.hash_size = choose([128, 256])
        self.num_reqs = choose([0, 1, 2, 5])
        self.max_blocks = choose([1, 4, 9])
        self.num_tokens = choose([0, 1, 7, 300])
        self.max_decodes = choose([1, 3, 8])
        self.sampled = self.rng.random() < 0.8  # else exact attention
        self.hashes = self.head_size <= self.hash_size and self.rng.random() < 0.5
        self.num_rows = self.num_reqs + choose([0, 0, 3])
        rows = sorted(self.rng.sample(range(self.num_rows), self.num_reqs))
        self.tokens = choose([None, np.array(rows, np.int64)])

    def sample_of(self, limit: int, size: int) -> list[int]:
        return [self.rng.randrange(limit) for _ in range(size)] if limit else []


# ----------------------------------------------------------------------------- valid arguments


def floats(case: Case, *shape: int) -> np.ndarray:
    values = case.rng.choice(["normal", "normal", "normal", "zero", "equal", "wild", "tiny"])
    generator = np.random.default_rng(case.rng.getrandbits(32))
    if values == "zero":
        return np.zeros(shape, np.float32)
    if values == "equal":
        return np.full(shape, generator.normal(), np.float32)
    array = generator.normal(size=shape).astype(np.float32)
    if values == "tiny":
        array *= np.float32(1e-40)
    if values == "wild":
        wild = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0], np.float32)
        where = generator.random(shape) < 0.2
        array[where] = generator.choice(wild, int(where.sum()))
    return array


def rows(case: Case, *shape: int) -> np.ndarray:
    if case.row_dtype == "float32":
        return floats(case, *shape)
    bits = np.random.default_rng(case.rng.getrandbits(32)).integers(0, 1 << 16, shape)
    return bits.astype(np.uint16)  # NaN, infinities and denormals among them


def codes(case: Case, *shape: int, bits: int | None = None) -> np.ndarray:
    limit = 1 << (case.num_bits if bits is None else bits)
    generator = np.random.default_rng(case.rng.getrandbits(32))
    if case.rng.random() < 0.2:  # one bucket holds everything
        limit = 1
    return generator.integers(0, limit, shape).astype(np.uint16)


def slots(case: Case, size: int, low: int = -1) -> np.ndarray:
    """Each of them once while they last, then -1: slots of a store must differ."""
    count = case.num_blocks * case.block_size
    if low == 0:
        return np.array(case.sample_of(count, size), np.int64)
    start = case.rng.randrange(count)
    chosen = [(start + i) % count if i < count else -1 for i in range(size)]
    if case.rng.random() < 0.5:
        case.rng.shuffle(chosen)
    if chosen and case.rng.random() < 0.3:
        chosen[case.rng.randrange(size)] = -1
    return np.array(chosen, np.int64)


def block_tables(case: Case, num_reqs: int) -> np.ndarray:
    shape = (num_reqs, case.max_blocks)
    generator = np.random.default_rng(case.rng.getrandbits(32))
    return generator.integers(0, case.num_blocks, shape).astype(np.int32)


def seq_lens(case: Case, num_reqs: int) -> np.ndarray:
    capacity = case.max_blocks * case.block_size
    ends = [0, 1, case.block_size, capacity - 1, capacity]
    lengths = [
        case.rng.choice(ends) if case.rng.random() < 0.3 else case.rng.randrange(capacity + 1)
        for _ in range(num_reqs)
    ]
    return np.array(lengths, np.int32)


def memory(case: Case) -> np.ndarray:
    """Kept among the case's objects, for what overlaps it."""
    chunk = _C.Pages.chunk_bytes(
        case.row_dtype, case.block_size, case.head_size, case.num_tables
    ) + case.rng.choice([0, 0, 2, 64])
    shape = (case.num_blocks, case.num_kv_heads, chunk)
    generator = np.random.default_rng(case.rng.getrandbits(32))
    zeros = case.rng.random() < 0.5
    array = np.zeros(shape, np.uint8) if zeros else generator.integers(0, 256, shape, np.uint8)
    case.objects["memory"] = array
    return array


def signature_memory(case: Case) -> np.ndarray:
    """Zeros, since wrong signatures are as good as others."""
    num_bytes = case.num_blocks * signature_block_bytes(
        1, case.num_kv_heads, case.head_size, case.signature_bits, case.block_size
    )
    array = np.zeros(num_bytes + 64, np.uint8)
    start = -array.ctypes.data % 64
    return array[start : start + num_bytes]


def sometimes_garbage(build: Callable[[Case], np.ndarray]) -> Callable[[Case], np.ndarray]:
    """What a stream fills is looked at by callbacks alone."""

    def get(case: Case) -> np.ndarray:
        array = build(case)
        if case.rng.random() < 0.2:
            bend_values(case.rng, array)
        return array

    return get


def counts(case: Case, *shape: int) -> np.ndarray:
    return np.full(shape, case.rng.randrange(-1, 2), np.int32)


def isa(case: Case) -> Any:
    return _C.resolve_isa(case.rng.choice(["auto", "portable"]))


def tokens(case: Case) -> int:
    return case.rng.choice([0, 1, 4, 16, 31, 64, 1000, 2**31 - 1])


def signs(case: Case) -> np.ndarray:
    blocks = -(-case.num_tables // case.hash_size) * case.num_bits
    generator = np.random.default_rng(case.rng.getrandbits(32))
    return generator.choice(np.array([1, -1], np.int8), (3 + blocks, case.hash_size))


def rotation_signs(case: Case) -> np.ndarray:
    generator = np.random.default_rng(case.rng.getrandbits(32))
    size = 1 << (case.head_size - 1).bit_length()
    return generator.choice(np.array([1, -1], np.int8), (2, size))


def only_sampled(build: Callable[[Case], Any]) -> Callable[[Case], Any]:
    """None in exact mode."""
    return lambda case: build(case) if case.sampled else None


def make(case: Case, name: str) -> Any:
    """With valid arguments. What takes long to make is mostly taken from other cases."""
    what = CALLS[name]
    values = {argument: what.builder(argument)(case) for argument in what.arguments}
    if name not in SLOW_TO_MAKE or case.rng.random() < 0.05:
        return call(case, what, values)
    key = (name, *map(str, values.values()))
    if key not in case.shared:
        case.shared[key] = call(case, what, values)
    return case.shared[key]


def made(name: str) -> Callable[[Case], Any]:
    """The case's object of that class."""

    def get(case: Case) -> Any:
        if name not in case.objects:
            case.objects[name] = make(case, name)
            if name in ("StreamLayer", "DecodeLayer") and case.sampled and case.rng.random() < 0.7:
                call(case, CALLS[f"{name}.set_center"], {})
                case.objects["centred"] = name == "DecodeLayer" or case.objects.get("centred")
        return case.objects[name]

    return get


def decode_rows_of_a_step(case: Case) -> tuple[list[int], list[int]]:
    """Rows that decode and rows that prefill, each row once."""
    if "step rows" not in case.objects:
        order = case.rng.sample(range(case.num_reqs), case.num_reqs)
        size = min(case.num_reqs, case.num_tokens)
        decodes = case.rng.randrange(min(size, case.max_decodes) + 1)
        case.objects["step rows"] = order[:decodes], order[decodes:size]
    return case.objects["step rows"]


def chunk_bounds(case: Case) -> tuple[list[int], list[int]]:
    if "chunk bounds" not in case.objects:
        starts = [case.rng.randrange(case.num_tokens) for _ in decode_rows_of_a_step(case)[1]]
        stops = [case.rng.randint(start + 1, case.num_tokens) for start in starts]
        case.objects["chunk bounds"] = starts, stops
    return case.objects["chunk bounds"]


def cpus(case: Case) -> list[int]:
    return [case.rng.choice(CPUS) for _ in range(case.rng.choice([1, 2, 3]))]


QUERY = ("num_reqs", "num_q_heads")
DECODES = ("max_decodes", "num_q_heads")
DECODED = ("max_decodes", "num_kv_heads")


def sized(build: Callable[..., Any], *dims: str) -> Callable[[Case], Any]:
    return lambda case: build(case, *(getattr(case, dim) for dim in dims))


def in_either_dtype(*dims: str) -> Callable[[Case], Any]:
    """float32, or the pages' row dtype."""
    return lambda case: sized(rows if case.rng.random() < 0.5 else floats, *dims)(case)


def hasher(case: Case) -> Any:
    return made("SimHash")(case) if case.sampled and case.hashes else None


def codes_of_a_call(case: Case) -> Any:
    """Where the layer has its centre, but no hasher."""
    wanted = case.objects.get("centred") and not case.hashes
    return codes(case, case.num_reqs, case.num_q_heads, case.num_tables) if wanted else None


def dim(name: str) -> Callable[[Case], Any]:
    return lambda case: getattr(case, name)


ARGUMENTS: dict[str, Callable[[Case], Any]] = {
    "DecodeCounters.self": lambda case: (
        made(case.rng.choice(["StreamLayer", "DecodeLayer"]))(case).counters
    ),
    "pages": made("Pages"),
    "index": lambda case: (
        made("LshIndex")(case) if case.sampled and case.rng.random() < 0.8 else None
    ),
    "SegmentBuilder.ask.index": made("LshIndex"),
    "rule": only_sampled(made("SampleRule")),
    "sample.rule": made("SampleRule"),
    "table": made("InclusionTable"),
    "signs": signs,
    "vectors": lambda case: floats(case, case.num_reqs, case.num_q_heads, case.head_size),
    "SimHash.hash.center": lambda case: case.rng.choice(
        [None, floats(case, case.num_q_heads, case.head_size)]
    ),
    "encode_signatures.keys": lambda case: rows(
        case, 128 * case.rng.choice([0, 1, 3]), case.head_size
    ),
    "encode_signatures.signs": rotation_signs,
    "SignaturePool.signs": rotation_signs,
    "SignaturePool.bits": dim("signature_bits"),
    "SignaturePool.memory": signature_memory,
    "SignaturePool.lists.rule": made("SignatureRule"),
    "SignaturePool.lists.query": in_either_dtype("num_reqs", "num_q_heads", "head_size"),
    "DecodeLayer.of_signatures.rule": made("SignatureRule"),
    "StreamLayer.of_signatures.rule": made("SignatureRule"),
    "StreamLayer.launch_encode.self": lambda case: make(case, "StreamLayer.of_signatures"),
    "signatures": made("SignaturePool"),
    "SignatureRule.row_budget": lambda case: case.rng.choice([1e-9, 0.01, 0.3, 1.0]),
    "SignatureRule.seed": lambda case: case.rng.getrandbits(63),
    "layer": lambda case: case.rng.choice([0, 1, 31]),
    "first_kv_head": lambda case: case.rng.choice([0, 8]),
    "bits": lambda case: case.rng.choice([1, 2, 4]),
    "SimHash.head_size": lambda case: min(case.head_size, case.hash_size),
    "fraction": lambda case: case.rng.choice([1.0, 0.5, 1e-6]),
    "row_budget": lambda case: case.rng.choice([0.0, 0.0, 1e-9, 0.01, 0.3, 1.0]),
    "seed": lambda case: case.rng.getrandbits(64),
    "max_bytes": lambda case: case.rng.choice([0, 0, 1, 100_000]),
    "pool": made("ThreadPool"),
    "exchange": made("DecodeExchange"),
    "callbacks": made("HostCallbacks"),
    "builder": lambda case: (
        made("SegmentBuilder")(case) if case.sampled and case.rng.random() < 0.6 else None
    ),
    "metadata": made("StreamMetadata"),
    "step": made("StreamStep"),
    "isa": isa,
    "cpus": cpus,
    "spin_us": lambda case: case.rng.choice([0, 40, 500]),
    "gives_way_to": lambda case: made("ThreadPool")(case) if case.rng.random() < 0.5 else None,
    "name": lambda case: case.rng.choice(list(_C.Isa.__members__)),
    "Isa.value": lambda case: case.rng.randrange(4),
    "launch_host_func": lambda case: case.driver.launch_host_func,
    "stream": dim("stream"),
    "row_dtype": dim("row_dtype"),
    "block_size": dim("block_size"),
    "head_size": dim("head_size"),
    "num_tables": dim("num_tables"),
    "num_bits": dim("num_bits"),
    "min_matches": dim("min_matches"),
    "levels": dim("levels"),
    "sink_tokens": tokens,
    "window_tokens": tokens,
    "exact_below": tokens,
    "scale": lambda case: case.rng.choice([0.25, 1.0, 0.0, -1.0, 1e-30, 1e30]),
    "memory": memory,
    "key": sized(rows, "num_tokens", "num_kv_heads", "head_size"),
    "value": sized(rows, "num_tokens", "num_kv_heads", "head_size"),
    "codes": sized(codes, "num_tokens", "num_kv_heads", "num_tables"),
    "slots": sized(slots, "num_tokens"),
    "Pages.load_codes.slots": lambda case: slots(case, case.num_tokens, low=0),
    "block": lambda case: case.rng.randrange(case.num_blocks),
    "projections": lambda case: floats(case, case.num_tokens, case.num_tables * case.num_bits),
    "cosine": lambda case: floats(case, case.rng.choice([0, 1, 7, 8, 100])),
    "block_tables": sized(block_tables, "num_reqs"),
    "seq_lens": sized(seq_lens, "num_reqs"),
    "block_table": lambda case: block_tables(case, 1)[0],
    "LshIndex.find.num_tokens": lambda case: int(seq_lens(case, 1)[0]),
    "batch": made("DecodeBatch"),
    "tokens": lambda case: case.tokens,
    "hasher": hasher,
    "query": in_either_dtype("num_rows", "num_q_heads", "head_size"),
    "query_codes": codes_of_a_call,
    "sample.query_codes": sized(codes, *QUERY, "num_tables"),
    "center": sized(floats, "num_kv_heads", "head_size"),
    "out": in_either_dtype("num_rows", "num_q_heads", "head_size"),
    "rows": lambda case: sized(counts, *QUERY)(case) if case.rng.random() < 0.8 else None,
    "lse": lambda case: sized(floats, *QUERY)(case) if case.rng.random() < 0.8 else None,
    "error_bars": lambda case: sized(floats, *QUERY)(case) if case.rng.random() < 0.8 else None,
    "DecodeExchange.query": sized(floats, *DECODES, "head_size"),
    "DecodeExchange.key": sized(rows, *DECODED, "head_size"),
    "DecodeExchange.value": sized(rows, *DECODED, "head_size"),
    "DecodeExchange.query_codes": only_sampled(sized(codes, *DECODES, "num_tables")),
    "DecodeExchange.key_codes": only_sampled(sized(codes, *DECODED, "num_tables")),
    "DecodeExchange.out": sized(floats, *DECODES, "head_size"),
    "StreamMetadata.block_tables": sometimes_garbage(sized(block_tables, "num_reqs")),
    "StreamMetadata.seq_lens": sometimes_garbage(sized(seq_lens, "num_reqs")),
    "StreamMetadata.slots": sometimes_garbage(sized(slots, "num_tokens")),
    "num_reqs": dim("num_reqs"),
    "StreamStep.num_tokens": dim("num_tokens"),
    "decode_rows": lambda case: np.array(decode_rows_of_a_step(case)[0], np.int32),
    "decode_tokens": lambda case: np.array(
        case.sample_of(case.num_tokens, len(decode_rows_of_a_step(case)[0])), np.int64
    ),
    "chunk_rows": lambda case: np.array(decode_rows_of_a_step(case)[1], np.int32),
    "chunk_starts": lambda case: np.array(chunk_bounds(case)[0], np.int64),
    "chunk_stops": lambda case: np.array(chunk_bounds(case)[1], np.int64),
}
"""Builders of valid arguments, by name; `call.name` goes before `name`, and a `self` that is not here
is the case's object of that class."""

# A driver that is installed would be loaded; and pybind11's own properties of an enum.
# The last: threads of an OpenMP runtime, of which sanitizers see half.
UNTOUCHED = {"find_launch_host_func", "Isa.name", "Isa.value", "ThreadPool.of_openmp"}
SLOW_TO_MAKE = {"ThreadPool", "SegmentBuilder", "InclusionTable"}  # and without a case's state
NO_OTHER_NUMBER = {"launch_host_func"}  # any other address is jumped to


# --------------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class Call:
    name: str
    function: Callable[..., Any]
    positional: list[str]
    by_keyword: list[str]

    @property
    def arguments(self) -> list[str]:
        return self.positional + self.by_keyword

    def builder(self, argument: str) -> Callable[[Case], Any]:
        for key in (f"{self.name}.{argument}", f"{self.name.split('.')[0]}.{argument}", argument):
            if key in ARGUMENTS:
                return ARGUMENTS[key]
        if argument == "self":
            return made(self.name.split(".")[0])
        raise KeyError(f"{self.name} has an argument {argument}; give it a line in ARGUMENTS.")


def signature_of(name: str, function: Callable[..., Any]) -> Call:
    """From pybind11's docstring: name(a: type[b, c], *, d: type) -> type."""
    text = (function.__doc__ or "").split("(", 1)[1].rsplit(") ->", 1)[0]
    while "[" in text:
        text = re.sub(r"\[[^][]*\]", "", text)
    names = [part.split(":")[0].strip() for part in text.split(",")]
    names = [name for name in names if name not in ("", "/")]
    star = names.index("*") if "*" in names else len(names)
    names = ["self" if n == "arg0" else n for n in names]  # of a property
    return Call(name, function, names[:star], names[star + 1 :])


def find_calls() -> dict[str, Call]:
    calls = {}
    for name, thing in vars(_C).items():
        if name.startswith("_") or name in UNTOUCHED:
            continue
        if not inspect.isclass(thing):
            if callable(thing):
                calls[name] = signature_of(name, thing)
            continue
        if "__init__" in vars(thing):
            init = signature_of(name, thing.__init__)
            calls[name] = Call(name, thing, init.positional[1:], init.by_keyword)
        for member, value in vars(thing).items():
            if member.startswith("_") or isinstance(value, thing):  # an enum's value
                continue
            if f"{name}.{member}" in UNTOUCHED:
                continue
            function = value.fget if isinstance(value, property) else getattr(thing, member)
            calls[f"{name}.{member}"] = signature_of(f"{name}.{member}", function)
    return calls


CALLS = find_calls()


def call(case: Case, what: Call, arguments: dict[str, Any]) -> Any:
    """With valid arguments for those that are not given."""
    values = {
        n: what.builder(n)(case) if n not in arguments else arguments[n] for n in what.arguments
    }
    return what.function(
        *(values[n] for n in what.positional), **{n: values[n] for n in what.by_keyword}
    )


# --------------------------------------------------------------------------------------- bends

NOT_AT_ALL = [None, 0, -1, 1.5, "x", b"", [], {}, object(), np.float32, np.zeros(0), Ellipsis]
INTEGERS = [-1, 0, 1, 2**31 - 1, -(2**31), 2**31, 2**32, 2**63 - 1, -(2**63), 2**64, 10**30]


def bend_values(rng: random.Random, array: np.ndarray) -> None:
    """In place: extremes, neighbours and duplicates."""
    if array.size == 0:
        return
    flat = array.reshape(-1)
    for _ in range(rng.choice([1, 1, 3])):
        where = rng.randrange(array.size)
        if array.dtype.kind == "f":
            flat[where] = rng.choice([np.nan, np.inf, -np.inf, 1e-45, 3.4e38])
            continue
        limits = np.iinfo(array.dtype)
        extremes = [limits.min, limits.max, limits.min + 1, limits.max - 1, -1, -2, 0]
        old = int(flat[where])
        value = rng.choice([*extremes, old + 1, old - 1, old * 2, int(rng.choice(flat))])
        flat[where] = min(max(value, limits.min), limits.max)


def with_changed_values(rng: random.Random, array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    bend_values(rng, changed)
    return changed


def with_another_shape(rng: random.Random, array: np.ndarray) -> Any:
    shape = list(array.shape)
    kind = rng.randrange(4)
    if kind == 0:
        shape.insert(rng.randint(0, len(shape)), rng.choice([0, 1, 2]))
    elif kind == 1 and shape:
        shape.pop(rng.randrange(len(shape)))
    elif kind == 2:
        shape.reverse()
    elif shape:
        axis = rng.randrange(len(shape))
        shape[axis] = rng.choice([0, 1, max(0, shape[axis] - 1), shape[axis] + 1, shape[axis] * 2])
    if np.prod(shape) > 1 << 20:
        return array
    return np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)


def in_other_strides(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """The same values, shape and dtype."""
    kind = rng.randrange(6)
    if kind == 0:
        return np.asfortranarray(array)
    if array.ndim == 0:
        return array
    axis = rng.randrange(array.ndim)
    if kind == 1:
        return np.flip(np.flip(array, axis).copy(), axis)
    if kind == 2:
        spread = np.repeat(array, 2, axis)
        return spread[(slice(None),) * axis + (slice(None, None, 2),)]
    if kind == 3 and array.size:
        return np.broadcast_to(np.take(array, [0], axis), array.shape)
    if kind == 4:
        return np.lib.stride_tricks.as_strided(
            array[:0],
            (0, *array.shape[1:]),
            [rng.choice([2**40, -(2**62), 3]) for _ in array.shape],
        )
    raw = np.zeros(array.nbytes + array.itemsize, np.uint8)  # at an address that is not aligned
    view = raw[1 : 1 + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def in_another_dtype(rng: random.Random, array: np.ndarray) -> np.ndarray:
    kind = rng.randrange(3)
    if kind == 0:
        return array.astype(array.dtype.newbyteorder())
    if kind == 1:
        codes = {1: ["b", "?", "V1"], 2: ["h", "e", "S2"], 4: ["f", "i", "I", "U1"]}
        return array.view(rng.choice(codes.get(array.itemsize, ["d", "q", "M8[s]", "F"])))
    with np.errstate(all="ignore"):
        return array.astype(rng.choice(["f8", "f4", "f2", "i8", "i4", "u2", "u1", "?", "O", "c8"]))


def read_only(rng: random.Random, array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def something_like_it(rng: random.Random, array: np.ndarray) -> Any:
    small = array if array.size < 1000 else array[:0]
    return rng.choice([
        small.tolist(), memoryview(array), np.ma.masked_array(array), array.view(np.recarray),
        array.astype(object) if array.size < 1000 else None, small.tobytes(),
    ])  # fmt: skip


def bend_array(rng: random.Random, array: np.ndarray, others: Sequence[np.ndarray]) -> Any:
    def over_another(rng: random.Random, array: np.ndarray) -> np.ndarray:
        """On memory of another argument, or of the pages."""
        fitting = [o for o in others if o.nbytes >= array.nbytes and o.flags.c_contiguous]
        if not fitting or array.size == 0:
            return array
        raw = rng.choice(fitting).reshape(-1).view(np.uint8)
        start = rng.randint(0, raw.size - array.nbytes) // array.itemsize * array.itemsize
        return raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)

    bends = [
        with_changed_values, with_changed_values, with_another_shape, in_other_strides,
        in_another_dtype, read_only, something_like_it, over_another, over_another,
    ]  # fmt: skip
    return rng.choice(bends)(rng, array)


def bend(case: Case, what: Call, argument: str, value: Any, others: Sequence[np.ndarray]) -> Any:
    rng = case.rng
    if argument in NO_OTHER_NUMBER:
        return rng.choice([0, -1, 2**64, None, float(value), str(value)])
    if rng.random() < 0.1:
        return rng.choice(NOT_AT_ALL)
    if isinstance(value, np.ndarray):
        return bend_array(rng, value, others)
    if isinstance(value, (int, float)):
        near = [
            value - 1,
            value + 1,
            value * 2,
            float(value),
            np.int64(min(value, 2**62)),
            bool(value),
        ]
        return rng.choice([*near, *INTEGERS, np.nan, np.inf, -np.inf, 1e300])
    if isinstance(value, str):
        return rng.choice(
            ["", value + " ", value.upper(), "\0", "\udcff", "x" * 1000, value.encode()]
        )
    if isinstance(value, list):
        changes = [
            [],
            [-1],
            [4095],
            [2**31],
            [0.5],
            [None],
            [*value, "0"],
            tuple(value),
            set(value),
        ]
        return rng.choice([*changes, str(value), np.array(value), [*value, -1]])
    # An object: of another layer, or of another class.
    other = Case(rng, case.driver, case.stream, case.shared)
    if argument in ("self", *map(str.lower, KINDS)) and rng.random() < 0.3:
        return made(rng.choice(KINDS))(other)
    return what.builder(argument)(other)


KINDS = [name for name in CALLS if inspect.isclass(getattr(_C, name, None)) and name != "Isa"]

# --------------------------------------------------------------------------------------- running


class Unexpected(Exception):
    """A call that neither returned nor refused."""


class Fuzz:
    def __init__(self, seed: int, driver: FakeDriver) -> None:
        self.seed, self.driver = seed, driver
        self.streams = [driver.new_stream(), driver.new_stream()]
        self.shared: dict[tuple[str, ...], Any] = {}
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        # A call of no arguments but its object has few ways to go wrong.
        self.names = list(CALLS)
        self.weights = [len(CALLS[name].arguments) for name in self.names]

    def run_case(self, number: int, verbose: bool = False) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        case = Case(rng, self.driver, rng.choice(self.streams), self.shared)
        names: list[str] = []
        if rng.random() < 0.6:  # on pages that hold something, some of it indexed
            names += ["Pages.store_rows", "Pages.store_codes", "LshIndex.seal"]
        prelude = len(names)
        if rng.random() < 0.5:
            names.append("DecodeLayer.attend")  # what everything else is for
        names += rng.choices(self.names, self.weights, k=CALLS_PER_CASE)
        for i, name in enumerate(names):
            if name in CALLS:
                self.run_call(case, CALLS[name], 0 if i < prelude else None, verbose)
        if rng.random() < 0.5:
            self.driver.synchronize()
        objects = list(case.objects)
        rng.shuffle(objects)
        for name in objects:  # with work pending, or without
            del case.objects[name]
        self.driver.synchronize()

    def run_call(self, case: Case, what: Call, num_bends: int | None, verbose: bool) -> None:
        rng = case.rng
        values: dict[str, Any] = {}
        try:
            for name in what.arguments:
                values[name] = what.builder(name)(case)
            if num_bends is None:
                num_bends = min(rng.choice([0, 0, 0, 0, 1, 1, 1, 2]), len(values))
            for name in rng.sample(what.arguments, num_bends):
                others = [v for n, v in values.items() if isinstance(v, np.ndarray) and n != name]
                if "memory" in case.objects:
                    others.append(case.objects["memory"])
                values[name] = bend(case, what, name, values[name], others)
        except REFUSALS as error:  # an object that these dimensions do not allow
            self.outcomes[what.name]["not called"] += 1
            if verbose:
                print(f"  {what.name}: no arguments, {error!r}")
            return
        if verbose:
            print(f"  {what.name}({describe(values)})", flush=True)
        signal.alarm(HANG_S)
        try:
            call(case, what, values)
            outcome = "accepted"
        except REFUSALS as error:
            outcome = type(error).__name__
            if verbose:
                print(f"    {outcome}: {error}")
        except BaseException as error:
            raise Unexpected(f"{what.name}({describe(values)}) raised {error!r}") from error
        finally:
            signal.alarm(0)
        self.outcomes[what.name][outcome] += 1

    def summary(self) -> str:
        kinds = ["accepted", "not called", *(error.__name__ for error in REFUSALS)]
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        kinds = [kind for kind in kinds if total[kind] or kind == "accepted"]
        rows = [["", "calls", *kinds]]
        for name, counts in [*sorted(self.outcomes.items()), ("all", total)]:
            called = counts.total() - counts["not called"]
            rows.append([name, str(called), *(str(counts[kind]) for kind in kinds)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def describe(values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, np.ndarray):
            head = f"{type(value).__name__} {value.dtype} {value.shape} strides {value.strides}"
            head += f" at {value.__array_interface__['data'][0]:#x}"
            values = f" {value.tolist()}" if value.size <= 8 else ""
            return f"<{head}{values}{'' if value.flags.writeable else ' read-only'}>"
        return repr(value)[:80]

    return ", ".join(f"{name}={text(value)}" for name, value in values.items())


def run(args: argparse.Namespace, current: mmap.mmap) -> int:
    """Exit code. `current` says which case runs."""
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # then it ends the process
    with FakeDriver() as driver:
        fuzz = Fuzz(args.seed, driver)
        start = last = time.monotonic()
        number = args.case or 0
        while True:
            current[:8] = number.to_bytes(8, "little")
            try:
                fuzz.run_case(number, verbose=args.case is not None)
            except Exception:
                traceback.print_exc()
                print(fuzz.summary())
                return 1
            number += 1
            now = time.monotonic()
            if args.case is not None or number == args.cases or now - start > args.seconds:
                break
            if now - last > 10:
                print(f"[fuzz] {number} cases in {now - start:.0f} s", flush=True)
                last = now
        print(fuzz.summary())
        print(f"[fuzz] seed {args.seed}: {number - (args.case or 0)} cases, no failure", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=positive_number, default=20.0)
    parser.add_argument("--cases", type=positive, help="stop after as many, if that is earlier")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--case", type=whole(0), help="this case alone, with its calls printed")
    args = parser.parse_args(argv)
    for what in CALLS.values():
        for argument in what.arguments:
            what.builder(argument)
    # A child runs the cases, so that somebody is left to say which one ended it.
    current = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(args, current)
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        number = int.from_bytes(current[:8], "little")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(
            f"[fuzz] FAILED in case {number} by {how}; again with:\n"
            f"       {Path(__file__).name} --seed {args.seed} --case {number}",
            flush=True,
        )
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
