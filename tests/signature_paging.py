"""Requests in pages with their signatures, on shuffled blocks, for tests of native steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from native_helpers import pool, row_bits
from signature_worlds import SINK, WINDOW, world

from vllm_magicpig import _C
from vllm_magicpig import signature_blocks as blocks
from vllm_magicpig import signature_reference as reference

Lists = list[list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]]]


@dataclass
class Paged:
    """keys, values: [request][kv head, n, head_size] in the pages' dtype."""

    dtype: torch.dtype
    head_size: int
    bits: int
    num_kv_heads: int
    seq_lens: Sequence[int]
    block_size: int = 128
    seed: int = 3
    layer: int = 2
    first_kv_head: int = 1
    sink: int = SINK
    window: int = WINDOW
    threads: int = 2
    native: ModuleType = _C
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.signs = reference.rotation_signs(self.head_size, self.seed)
        needed = [-(-n // self.block_size) for n in self.seq_lens]
        num_blocks = sum(needed) + 3
        name = str(self.dtype).removeprefix("torch.")
        row_bytes = 2 * self.head_size * self.dtype.itemsize
        self.memory = np.zeros(
            (num_blocks, self.num_kv_heads, self.block_size * row_bytes), dtype=np.uint8
        )
        self.pages = self.native.Pages(self.memory, name, self.block_size, self.head_size, 0)
        of_block = blocks.block_bytes(self.head_size, self.bits) * (self.block_size // 128)
        self.signatures = self.native.SignaturePool(
            self.pages,
            aligned(num_blocks * self.num_kv_heads * of_block),
            self.signs.numpy(),
            self.bits,
        )
        order = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
        self.tables = np.zeros((len(self.seq_lens), max(needed)), dtype=np.int32)
        for row, (n, count) in enumerate(zip(self.seq_lens, needed, strict=True)):
            self.tables[row, :count], order = order[:count], order[count:]
            worlds = [
                world(n, self.head_size, seed=10 * row + head) for head in range(self.num_kv_heads)
            ]
            self.keys.append(torch.stack([w.keys for w in worlds]).to(self.dtype))
            self.values.append(torch.stack([w.values for w in worlds]).to(self.dtype))
            self.store(row, 0, n)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return np.array(self.seq_lens, dtype=np.int32)

    def store(self, row: int, start: int, stop: int) -> None:
        """Writes a request's rows from `keys` and `values` to its pages."""
        positions = np.arange(start, stop)
        slots = self.tables[row, positions // self.block_size].astype(np.int64) * self.block_size
        keys, values = (
            row_bits(part[row][:, start:stop].transpose(0, 1).contiguous())
            for part in (self.keys, self.values)
        )
        self.pages.store_rows(
            keys, values, slots + positions % self.block_size, pool(self.threads, self.native)
        )

    def rule(self, budget: float) -> _C.SignatureRule:
        return self.native.SignatureRule(
            sink_tokens=self.sink,
            window_tokens=self.window,
            row_budget=budget,
            seed=self.seed,
            layer=self.layer,
            first_kv_head=self.first_kv_head,
        )

    def lists(
        self,
        query: torch.Tensor,
        budget: float,
        scale: float,
        isa: _C.Isa,
        rows: Sequence[int] | None = None,
        threads: int = 2,
    ) -> Lists:
        """query: float32 [num_requests, num_q_heads, head_size], of the requests `rows`."""
        which = list(range(len(self.seq_lens)) if rows is None else rows)
        return self.signatures.lists(
            self.rule(budget),
            query[which].contiguous().numpy(),
            np.ascontiguousarray(self.tables[which]),
            self.lengths[which],
            scale=scale,
            exact_below=1,
            isa=isa,
            pool=pool(threads, self.native),
        )

    def attend(
        self,
        query: torch.Tensor,
        budget: float,
        scale: float,
        isa: _C.Isa,
        threads: int = 2,
        error_bars: npt.NDArray[np.float32] | None = None,
    ) -> tuple[torch.Tensor, npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """(out float32, lse, rows) of a decode step, each [num_requests, num_q_heads, ...]."""
        layer = self.native.DecodeLayer.of_signatures(
            self.signatures,
            self.rule(budget),
            scale=scale,
            exact_below=1,
            isa=isa,
            pool=pool(threads, self.native),
        )
        out = torch.empty_like(query)
        lse = np.empty(query.shape[:2], dtype=np.float32)
        rows = np.empty(query.shape[:2], dtype=np.int32)
        batch = self.native.DecodeBatch(self.pages, self.tables, self.lengths)
        layer.attend(query, batch, out, lse, rows, None, error_bars)
        return out, lse, rows


def aligned(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Of a cache line, as signatures lie."""
    memory = np.zeros(num_bytes + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]
