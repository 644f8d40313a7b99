"""What the tests of the native extension share: pools, ISAs, and a layer of pages with its oracle."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vllm_magicpig import _C, reference


def isa_or_none(name: str) -> _C.Isa | None:
    try:
        return _C.resolve_isa(name)
    except ValueError:
        return None


ISA_NAMES = ("portable", "avx2", "avx512", "avx512_vpopcnt")
each_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            isa_or_none(name),
            id=name,
            marks=pytest.mark.skipif(isa_or_none(name) is None, reason=f"this CPU has no {name}"),
        )
        for name in ISA_NAMES
    ],
)


MISSING_ISAS = [name for name in ISA_NAMES if isa_or_none(name) is None]


@functools.cache
def pool(num_threads: int = 2, native: ModuleType = _C) -> _C.ThreadPool:
    """Threads on the CPUs of this process; more threads than CPUs share them."""
    cpus = sorted(os.sched_getaffinity(0))
    return native.ThreadPool([cpus[i % len(cpus)] for i in range(num_threads)])


def row_bits(rows: torch.Tensor) -> npt.NDArray:
    """The array that the extension takes: float32 as it is, else the bits as uint16."""
    return (rows if rows.dtype == torch.float32 else rows.view(torch.uint16)).numpy()


@dataclass(frozen=True)
class Rule:
    min_matches: int = 2
    sink_tokens: int = 4
    window_tokens: int = 16
    row_budget: float = 0.0
    seed: int = 0

    def native(self, num_bits: int, num_tables: int, native: ModuleType = _C) -> _C.SampleRule:
        return native.SampleRule(inclusion_table(num_bits, num_tables, native), **vars(self))


@functools.cache
def inclusion_table(num_bits: int, num_tables: int, native: ModuleType = _C) -> _C.InclusionTable:
    return native.InclusionTable(num_bits, num_tables)


def native_codes(codes: torch.Tensor) -> npt.NDArray[np.uint16]:
    """Integer [..., L] as pages and kernels hold them."""
    return codes.contiguous().numpy().astype(np.uint16)


@dataclass
class Layer:
    """Pages of one layer and their native index. No block is written by two owners at once.

    native: the extension, or another build of it.
    """

    num_blocks: int
    num_kv_heads: int = 1
    num_tables: int = 8
    num_bits: int = 3
    head_size: int = 16
    block_size: int = 32
    levels: Sequence[int] = (64,)
    max_bytes: int = 0
    dtype: torch.dtype = torch.float32
    native: ModuleType = _C
    memory: npt.NDArray[np.uint8] = field(init=False)
    pages: _C.Pages = field(init=False)
    index: _C.LshIndex = field(init=False)

    def __post_init__(self) -> None:
        name = str(self.dtype).removeprefix("torch.")
        size = self.native.Pages.chunk_bytes(name, self.block_size, self.head_size, self.num_tables)
        # Poison: what was never written must never show. And 2 bytes more than needed, so that no
        # chunk but the first is aligned.
        self.memory = np.full((self.num_blocks, self.num_kv_heads, size + 2), 0xA5, np.uint8)
        self.pages = self.native.Pages(
            self.memory, name, self.block_size, self.head_size, self.num_tables
        )
        self.index = self.native.LshIndex(self.pages, self.num_bits, self.levels, self.max_bytes)

    def rule(self, rule: Rule) -> _C.SampleRule:
        return rule.native(self.num_bits, self.num_tables, self.native)

    def pool(self, num_threads: int = 2) -> _C.ThreadPool:
        return pool(num_threads, self.native)

    def slots(self, blocks: npt.ArrayLike, start: int, stop: int) -> npt.NDArray[np.int64]:
        tokens = np.arange(start, stop)
        table = np.asarray(blocks, np.int64)
        return table[tokens // self.block_size] * self.block_size + tokens % self.block_size

    def store_codes(self, blocks: npt.ArrayLike, start: int, codes: torch.Tensor) -> None:
        """codes: integer [num_kv_heads, num_tokens, L]."""
        slots = self.slots(blocks, start, start + codes.shape[1])
        native = native_codes(codes.transpose(0, 1))
        self.pages.store_codes(native, slots, self.pool())

    def store_rows(
        self, blocks: npt.ArrayLike, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """keys, values: [num_kv_heads, num_tokens, head_size]."""
        slots = self.slots(blocks, start, start + keys.shape[1])
        key, value = row_bits(keys.transpose(0, 1)), row_bits(values.transpose(0, 1))
        self.pages.store_rows(key, value, slots, self.pool())

    def sample(
        self,
        query_codes: torch.Tensor,
        block_tables: npt.ArrayLike,
        seq_lens: npt.ArrayLike,
        rule: Rule,
        isa: _C.Isa,
        num_threads: int = 2,
        by_code: bool = False,
    ) -> list[list[npt.NDArray[np.int32]]]:
        """query_codes: integer [num_reqs, num_q_heads, L]; by_code: without the index."""
        samples = self.native.sample(
            self.pages,
            self.rule(rule),
            None if by_code else self.index,
            native_codes(query_codes),
            np.asarray(block_tables, np.int32),
            np.asarray(seq_lens, np.int32),
            isa=isa,
            pool=self.pool(num_threads),
        )
        return [[positions for positions, _, _ in heads] for heads in samples]


def decode_attention(
    pages: _C.Pages,
    rule: _C.SampleRule | None,
    index: _C.LshIndex | None,
    query: Any,
    query_codes: _C.SimHash | npt.NDArray[np.uint16] | None,
    center: npt.NDArray[np.float32] | None,
    block_tables: npt.NDArray[np.int32],
    seq_lens: npt.NDArray[np.int32],
    out: Any,
    lse: npt.NDArray[np.float32] | None = None,
    tokens: npt.NDArray[np.int64] | None = None,
    native: ModuleType = _C,
    **settings: Any,
) -> tuple[npt.NDArray[np.int32], _C.DecodeCounters]:
    """One step of a layer of its own: (rows, what it counted). query_codes: or the layer's hasher;
    settings: those of DecodeLayer."""
    hasher = query_codes if isinstance(query_codes, native.SimHash) else None
    layer = native.DecodeLayer(pages, rule, index, hasher, **settings)
    if center is not None:
        layer.set_center(center)
    batch = native.DecodeBatch(pages, block_tables, seq_lens, tokens)
    rows = np.full((len(seq_lens), np.shape(query)[1]), -2, np.int32)
    layer.attend(query, batch, out, lse, rows, None if hasher is not None else query_codes)
    return rows, layer.counters


def best_cover(num_tokens: int, levels: Sequence[int]) -> list[tuple[int, int]]:
    """What a request wants segments for: (begin, end), ascending."""
    cover = []
    begin = 0
    for tokens in reversed(levels):
        while begin + tokens <= num_tokens:
            cover.append((begin, begin + tokens))
            begin += tokens
    return cover


def expected_sample(
    query_codes: torch.Tensor, codes: torch.Tensor, rule: Rule
) -> list[npt.NDArray[np.int64]]:
    """The positions of reference.sample for [num_q_heads, L] and [num_kv_heads, n, L]."""
    mask = reference.sample(
        query_codes, codes, rule.min_matches, rule.sink_tokens, rule.window_tokens
    )
    return [row.nonzero().flatten().numpy() for row in mask]


def assert_same_sample(
    found: list[npt.NDArray[np.int32]], expected: list[npt.NDArray[np.int64]]
) -> None:
    """Token for token."""
    assert len(found) == len(expected)
    for ids, positions in zip(found, expected, strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, positions)
