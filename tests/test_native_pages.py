"""Rows, codes and write epochs in the pages, read back through the documented layout."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from native_helpers import Layer, pool, row_bits

from vllm_magicpig import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_in_memory(layer: Layer) -> np.ndarray:
    """[num_blocks, num_kv_heads, block_size, K | V, head_size]."""
    element = np.float32 if layer.dtype == torch.float32 else np.uint16
    size = layer.block_size * 2 * layer.head_size * np.dtype(element).itemsize
    rows = np.ascontiguousarray(layer.memory[:, :, :size]).view(element)
    return rows.reshape(*rows.shape[:2], layer.block_size, 2, layer.head_size)


def codes_in_memory(layer: Layer) -> np.ndarray:
    """[num_blocks, num_kv_heads, block_size / 32, L, 32]."""
    start = layer.block_size * 2 * layer.head_size * layer.dtype.itemsize
    stop = start + layer.block_size * layer.num_tables * 2
    codes = np.ascontiguousarray(layer.memory[:, :, start:stop]).view(np.uint16)
    return codes.reshape(*codes.shape[:2], layer.block_size // 32, layer.num_tables, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_rows_and_codes_lie_where_the_layout_says(
    dtype: torch.dtype, head_size: int, block_size: int
) -> None:
    layer = Layer(
        num_blocks=5,
        num_kv_heads=3,
        num_tables=7,
        head_size=head_size,
        block_size=block_size,
        levels=[block_size],
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(head_size + block_size)
    num_tokens = 3 * block_size - 5
    # As attention gives them: K and V are slices of one projection, so no head is contiguous.
    qkv = torch.randn(num_tokens, 3, 3 * head_size, generator=generator).to(dtype)
    key, value = qkv[:, :, head_size : 2 * head_size], qkv[:, :, 2 * head_size :]
    codes = torch.randint(0, 1 << 16, (num_tokens, 3, 7), generator=generator)
    order = torch.randperm(5 * block_size, generator=generator)[:num_tokens].numpy()
    slots = np.where(np.arange(num_tokens) % 11 == 3, -1, order).astype(np.int64)
    before = layer.memory.copy()

    layer.pages.store_rows(row_bits(key), row_bits(value), slots, pool())
    layer.pages.store_codes(codes.numpy().astype(np.uint16), slots, pool())

    rows, stored = rows_in_memory(layer), codes_in_memory(layer)
    written = np.zeros((5, block_size), dtype=bool)
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        block, offset = divmod(int(slot), block_size)
        written[block, offset] = True
        np.testing.assert_array_equal(rows[block, :, offset, 0], row_bits(key)[token])
        np.testing.assert_array_equal(rows[block, :, offset, 1], row_bits(value)[token])
        tile = stored[block, :, offset // 32, :, offset % 32]
        np.testing.assert_array_equal(tile, codes[token].numpy())
    after, layer.memory = rows_in_memory(layer), before
    np.testing.assert_array_equal(
        after.transpose(0, 2, 1, 3, 4)[~written],
        rows_in_memory(layer).transpose(0, 2, 1, 3, 4)[~written],
    )
    some = slots[slots >= 0][::3].copy()
    np.testing.assert_array_equal(
        layer.pages.load_codes(some), codes.numpy()[slots >= 0][::3].astype(np.uint16)
    )


def test_a_chunk_holds_rows_and_codes_and_nothing_else() -> None:
    assert _C.Pages.chunk_bytes("bfloat16", 128, 128, 150) == 128 * 2 * 128 * 2 + 128 * 150 * 2
    assert _C.Pages.chunk_bytes("float32", 32, 16, 0) == 32 * 2 * 16 * 4


def test_only_a_write_to_offset_0_starts_an_epoch() -> None:
    layer = Layer(num_blocks=4)
    rows = torch.zeros(1, 1, 16)

    def write(*slots: int) -> list[int]:
        some = rows.expand(1, len(slots), 16)
        key = row_bits(some.transpose(0, 1))
        layer.pages.store_rows(key, key, np.array(slots, np.int64), pool())
        return [layer.pages.epoch(block) for block in range(4)]

    assert write(1, 31, 33, 127) == [0, 0, 0, 0]
    assert write(0, 64, 65) == [1, 0, 1, 0]
    assert write(-1, 66) == [1, 0, 1, 0]
    assert write(64) == [1, 0, 2, 0]
    layer.pages.store_codes(np.zeros((1, 1, 8), np.uint16), np.array([64], np.int64), pool())
    assert layer.pages.epoch(2) == 2


def test_a_block_holds_what_was_written_since_its_epoch() -> None:
    pages = Layer(num_blocks=5).pages

    def write(*slots: int) -> tuple[list[int], int, int, list[int]]:
        pages.note_writes(np.array(slots, np.int64))
        epochs = [pages.epoch(block) for block in range(5)]
        return epochs, pages.num_tokens, pages.num_used_blocks, pages.written_blocks().tolist()

    assert write() == ([0, 0, 0, 0, 0], 0, 0, [])
    assert write(-1, -1) == ([0, 0, 0, 0, 0], 0, 0, [])
    # Two requests, of which the first goes on in block 3.
    assert write(*range(32, 64), 96, 97, *range(0, 5)) == ([1, 1, 0, 1, 0], 39, 3, [0, 1, 3])
    assert write(98) == ([1, 1, 0, 1, 0], 40, 3, [0, 1, 3])
    assert write(-1, 5, -1, 99, 100) == ([1, 1, 0, 1, 0], 43, 3, [0, 1, 3])
    # Block 1 gets a new owner: what it held no longer counts.
    assert write(32) == ([1, 2, 0, 1, 0], 12, 3, [0, 1, 3])
    # Adjacent blocks in a run of slots, the last one full.
    assert write(*range(128, 160), *range(64, 96)) == ([1, 2, 1, 1, 1], 76, 5, [0, 1, 2, 3, 4])
    assert pages.written_blocks().dtype == np.int32


def test_note_writes_counts_as_store_rows_does() -> None:
    """The same slots through both, in two layers."""
    noted, stored = (Layer(9, block_size=64, levels=[64]) for _ in range(2))
    generator = np.random.default_rng(0)
    for _ in range(60):
        block, start = generator.integers(9), generator.integers(3) * 20
        stop = generator.integers(start, 65)
        other = generator.integers(9) * 64
        slots = np.concatenate([block * 64 + np.arange(start, stop), [-1], [other, other + 1]])
        rows = row_bits(torch.zeros(len(slots), 1, 16))
        noted.pages.note_writes(slots)
        stored.pages.store_rows(rows, rows, slots, pool())
        assert [noted.pages.epoch(b) for b in range(9)] == [stored.pages.epoch(b) for b in range(9)]
        assert noted.pages.num_tokens == stored.pages.num_tokens
        np.testing.assert_array_equal(noted.pages.written_blocks(), stored.pages.written_blocks())
    assert (noted.memory == 0xA5).all()


def test_writes_are_noted_from_several_threads() -> None:
    """Each fills blocks of its own, again and again, and they share a last one."""
    pages = Layer(num_blocks=4 * 8 + 1).pages
    shared = np.array([32 * 32], np.int64)

    def write(first_block: int) -> None:
        slots = np.arange(first_block * 32, (first_block + 8) * 32)
        for _ in range(50):
            for start in range(0, len(slots), 7):
                pages.note_writes(slots[start : start + 7])
            pages.note_writes(shared)

    threads = [threading.Thread(target=write, args=(8 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pages.epoch(block) for block in range(32)] == [50] * 32
    assert pages.epoch(32) == 4 * 50
    assert pages.num_tokens == 32 * 32 + 1
    assert pages.num_used_blocks == 33


def test_what_is_forgotten_is_neither_counted_nor_trusted() -> None:
    layer = Layer(3, max_bytes=1 << 20)
    tables, lens = np.array([[0, 1]], np.int32), np.array([64], np.int32)
    rows, codes = torch.zeros(1, 64, 16), torch.zeros(1, 64, 8, dtype=torch.int32)

    def fill() -> None:
        layer.store_rows([0, 1], 0, rows, rows)
        layer.store_codes([0, 1], 0, codes)
        assert layer.index.seal(tables, lens, pool()) == 1
        assert layer.index.find(tables[0], 64) == [(0, 64)]

    fill()
    layer.pages.forget()
    assert (layer.pages.num_tokens, layer.pages.num_used_blocks) == (0, 0)
    assert layer.pages.written_blocks().size == 0
    assert [layer.pages.epoch(block) for block in range(3)] == [2, 2, 1]
    assert layer.index.find(tables[0], 64) == []

    fill()  # where the stale one is dropped
    assert (layer.index.segments_built, layer.index.segments_dropped) == (2, 1)
    layer.index.forget()
    assert (layer.index.num_segments, layer.index.num_bytes) == (0, 0)
    assert (layer.index.segments_built, layer.index.segments_dropped) == (0, 0)
    assert layer.index.find(tables[0], 64) == []
    assert layer.index.seal(tables, lens, pool()) == 1, "the codes are still there"
    assert layer.pages.num_tokens == 64


def test_nothing_is_a_valid_amount() -> None:
    layer = Layer(num_blocks=1)
    none = np.zeros(0, np.int64)
    before = layer.memory.copy()
    rows = np.zeros((0, 1, 16), np.float32)
    layer.pages.store_rows(rows, rows, none, pool())
    layer.pages.store_codes(np.zeros((0, 1, 8), np.uint16), none, pool())
    assert layer.pages.load_codes(none).shape == (0, 1, 8)
    np.testing.assert_array_equal(layer.memory, before)


def test_the_memory_outlives_the_array_that_named_it() -> None:
    size = _C.Pages.chunk_bytes("float32", 32, 16, 4)
    pages = _C.Pages(np.zeros((2, 1, size), np.uint8), "float32", 32, 16, 4)
    index = _C.LshIndex(pages, 3, [32])
    del pages
    tables, lens = np.array([[0, 1]], np.int32), np.array([64], np.int32)
    assert index.seal(tables, lens, pool()) == 2
