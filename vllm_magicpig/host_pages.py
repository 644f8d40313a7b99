"""Host pages as torch sees them, and rows copied out for dense prefill."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from vllm_magicpig import _C

ROW_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class HostPages:
    """The pages of one layer: vLLM's KV tensor of the CPU platform, or a part of the host pool.

    kv_cache: row dtype [num_blocks, num_kv_heads, block_size, content_bytes / itemsize], contiguous;
    each (block, kv head) holds block_size rows of K | V, then the codes (cpu_kernels/magicpig.h).
    """

    def __init__(self, kv_cache: torch.Tensor, head_size: int, num_tables: int) -> None:
        num_blocks, num_kv_heads, self.block_size, _ = kv_cache.shape
        chunks = kv_cache.flatten(2)
        row_elements = self.block_size * 2 * head_size
        # A view: only the last dimension is split.
        self._rows = chunks[:, :, :row_elements].view(
            num_blocks, num_kv_heads, self.block_size, 2 * head_size
        )
        self.head_size = head_size
        self.num_blocks, self.num_kv_heads = num_blocks, num_kv_heads
        self.block_bytes = kv_cache.nbytes // max(num_blocks, 1)
        self.chunks = chunks  # what Triton kernels take
        self.native = _C.Pages(
            chunks.view(torch.uint8).numpy(),
            ROW_DTYPES[kv_cache.dtype],
            self.block_size,
            head_size,
            num_tables,
        )

    def store_rows(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: npt.NDArray[np.int64],
        pool: _C.ThreadPool,
    ) -> None:
        """key, value: [num_tokens, num_kv_heads, head_size]; slots: int64 [num_tokens], -1 skips."""
        self.native.store_rows(row_bits(key), row_bits(value), slots, pool)

    def gather(
        self, block_table: npt.NDArray[np.int32], start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies a request's (keys, values), each [num_kv_heads, stop - start, head_size]."""
        first = start // self.block_size
        blocks = torch.from_numpy(block_table[first : -(-stop // self.block_size)]).long()
        rows = self._rows.transpose(0, 1).index_select(1, blocks).flatten(1, 2)
        rows = rows[:, start - first * self.block_size : stop - first * self.block_size]
        return rows[..., : self.head_size], rows[..., self.head_size :]

    def pieces(
        self, block_table: npt.NDArray[np.int32], num_tokens: int, piece_tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`gather` of the first num_tokens, piece by piece, so that the copies stay bounded."""
        for start in range(0, num_tokens, piece_tokens):
            yield self.gather(block_table, start, min(start + piece_tokens, num_tokens))


def row_bits(rows: torch.Tensor) -> npt.NDArray[np.generic]:
    """A NumPy view of rows, 16-bit ones as uint16: NumPy has no bfloat16."""
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if rows.dtype != torch.float32:
        rows = rows.view(torch.uint16)
    array: npt.NDArray[np.generic] = rows.numpy()
    return array
