"""store_pages and gather_pages against the native pages; run by test_triton_pages.py."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np
import pytest
import torch
from native_helpers import pool, row_bits
from triton_helpers import DEVICE, INTERPRETED, in_host_memory, synchronize

from vllm_magicpig.capacity import content_bytes
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.triton_kernels import host_pages
from vllm_magicpig.triton_kernels.launch import Launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_BLOCKS, NUM_KV_HEADS = 9, 3


def poisoned_pages(
    dtype: torch.dtype, head_size: int, num_tables: int, block_size: int, padding: int = 0
) -> torch.Tensor:
    """[num_blocks, num_kv_heads, chunk_elements]; `padding` elements a token are nobody's."""
    elements = content_bytes(head_size, dtype.itemsize, num_tables) // dtype.itemsize + padding
    shape = (NUM_BLOCKS, NUM_KV_HEADS, block_size * elements)
    poison = torch.full((*shape[:2], shape[2] * dtype.itemsize), 0xA5, dtype=torch.uint8)
    return in_host_memory(poison.view(dtype))


def native(pages: torch.Tensor, head_size: int, num_tables: int, block_size: int) -> HostPages:
    return HostPages(pages.view(NUM_BLOCKS, NUM_KV_HEADS, block_size, -1), head_size, num_tables)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all, NaNs with a payload among them: rows are copied, not computed with."""
    generator = torch.Generator().manual_seed(seed)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(dtype)


def random_codes(num_tokens: int, num_tables: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tables)
    codes = torch.randint(0, 1 << 16, (num_tokens, NUM_KV_HEADS, num_tables), generator=generator)
    return codes.to(torch.uint16)


def scattered(num_tokens: int, num_slots: int) -> torch.Tensor:
    """Slots in any order, some skipped."""
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    slots[2::5] = -1
    return slots


def consecutive(num_tokens: int, num_slots: int) -> torch.Tensor:
    """A chunk of a prompt that begins inside a block, and padding behind it."""
    slots = torch.arange(num_tokens) + 37
    slots[num_tokens - num_tokens // 4 :] = -1
    return slots


def assert_same_bytes(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize(
    ("dtype", "head_size", "num_tables", "block_size", "num_tokens", "num_programs"),
    [
        (torch.float32, 16, 1, 32, 1, 32),
        (torch.bfloat16, 64, 7, 64, 15, 32),
        (torch.float16, 80, 33, 32, 17, 1),
        (torch.bfloat16, 128, 150, 128, 129, 32),
        (torch.bfloat16, 128, 120, 128, 127, 2),
        (torch.float32, 128, 7, 64, 200, 7),
        (torch.float16, 256, 255, 32, 65, 32),
        (torch.float32, 256, 31, 32, 33, 5),
    ],
)
@pytest.mark.parametrize("placement", [scattered, consecutive])
@pytest.mark.parametrize("with_codes", [True, False])
@pytest.mark.parametrize("function", ["kernel", "reference"])
def test_pages_are_those_that_the_native_writes_make(
    dtype: torch.dtype,
    head_size: int,
    num_tables: int,
    block_size: int,
    num_tokens: int,
    num_programs: int,
    placement,
    with_codes: bool,
    function: str,
) -> None:
    # As attention gives them: slices of one fused projection.
    qkv = random_rows((num_tokens, 3 * NUM_KV_HEADS, head_size), dtype, seed=head_size)
    key, value = qkv[:, NUM_KV_HEADS : 2 * NUM_KV_HEADS], qkv[:, 2 * NUM_KV_HEADS :]
    codes = random_codes(num_tokens, num_tables) if with_codes else None
    slots = placement(num_tokens, NUM_BLOCKS * block_size)

    expected = poisoned_pages(dtype, head_size, num_tables, block_size, padding=3)
    pages = native(expected, head_size, num_tables, block_size).native
    pages.store_rows(row_bits(key), row_bits(value), slots.numpy(), pool())
    if codes is not None:
        pages.store_codes(codes.numpy(), slots.numpy(), pool())

    found = poisoned_pages(dtype, head_size, num_tables, block_size, padding=3)
    if function == "reference":
        host_pages.store_pages_reference(key, value, codes, slots, found, block_size)
    else:
        fused = qkv.to(DEVICE)
        host_pages.store_pages(
            fused[:, NUM_KV_HEADS : 2 * NUM_KV_HEADS],
            fused[:, 2 * NUM_KV_HEADS :],
            None if codes is None else codes.to(DEVICE),
            slots.to(DEVICE),
            found,
            block_size,
            num_programs,
        )
        synchronize()
    assert_same_bytes(found, expected)


@pytest.mark.parametrize(
    ("dtype", "head_size", "block_size", "start", "stop", "num_programs"),
    [
        (torch.float32, 16, 32, 0, 1, 32),
        (torch.bfloat16, 64, 64, 63, 65, 32),
        (torch.float16, 80, 32, 31, 160, 1),
        (torch.bfloat16, 128, 128, 5, 135, 32),
        (torch.bfloat16, 128, 128, 128, 384, 2),
        (torch.float32, 128, 64, 17, 300, 7),
        (torch.float16, 256, 32, 0, 224, 32),
    ],
)
@pytest.mark.parametrize("function", ["kernel", "reference"])
def test_gathered_rows_are_those_of_the_pages(
    dtype: torch.dtype,
    head_size: int,
    block_size: int,
    start: int,
    stop: int,
    num_programs: int,
    function: str,
) -> None:
    pages = poisoned_pages(dtype, head_size, 7, block_size)
    pages.copy_(random_rows(tuple(pages.shape), dtype, seed=1))
    # A block table is longer than the request, and its tail is unused.
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(2))
    table = torch.cat([order[: -(-stop // block_size)], torch.full((3,), 1 << 30)]).int()
    keys, values = native(pages, head_size, 7, block_size).gather(table.numpy(), start, stop)

    # Staging holds keys and values side by side, and more tokens than this piece.
    num_tokens = stop - start
    staging = random_rows((num_tokens + 5, 2 * NUM_KV_HEADS, head_size), dtype, seed=3)
    found, around = staging.clone().to(DEVICE), staging.clone()
    keys_out = found[2 : 2 + num_tokens, :NUM_KV_HEADS]
    values_out = found[2 : 2 + num_tokens, NUM_KV_HEADS:]
    if function == "reference":
        keys_host, values_host = keys_out.cpu(), values_out.cpu()
        host_pages.gather_pages_reference(
            pages, table, start, stop, keys_host, values_host, block_size
        )
        keys_out.copy_(keys_host)
        values_out.copy_(values_host)
    else:
        host_pages.gather_pages(
            pages, table.to(DEVICE), start, stop, keys_out, values_out, block_size, num_programs
        )
        synchronize()
    around[2 : 2 + num_tokens, :NUM_KV_HEADS] = keys.transpose(0, 1)
    around[2 : 2 + num_tokens, NUM_KV_HEADS:] = values.transpose(0, 1)
    assert_same_bytes(found.cpu(), around)


def test_what_was_stored_is_gathered() -> None:
    dtype, head_size, block_size = torch.bfloat16, 64, 32
    rows = random_rows((70, 2 * NUM_KV_HEADS, head_size), dtype, seed=4).to(DEVICE)
    table = torch.tensor([7, 0, 4], dtype=torch.int32)
    tokens = torch.arange(70)
    slots = table[tokens // block_size] * block_size + tokens % block_size
    pages = poisoned_pages(dtype, head_size, 0, block_size)
    host_pages.store_pages(
        rows[:, :NUM_KV_HEADS], rows[:, NUM_KV_HEADS:], None, slots.to(DEVICE), pages, block_size
    )
    found = torch.empty_like(rows)
    host_pages.gather_pages(
        pages,
        table.to(DEVICE),
        0,
        70,
        found[:, :NUM_KV_HEADS],
        found[:, NUM_KV_HEADS:],
        block_size,
    )
    synchronize()
    assert_same_bytes(found.cpu(), rows.cpu())


def test_no_tokens_are_a_valid_amount() -> None:
    pages = poisoned_pages(torch.float32, 16, 7, 32)
    before = pages.clone()
    rows = torch.zeros(0, NUM_KV_HEADS, 16, device=DEVICE)
    no_slots = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    table = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    host_pages.store_pages(rows, rows, None, no_slots, pages, 32)
    host_pages.gather_pages(pages, table, 5, 5, rows, rows, 32)
    synchronize()
    assert_same_bytes(pages, before)


@pytest.mark.skipif(not INTERPRETED, reason="the reserved memory is not pinned")
def test_addresses_beyond_2_to_the_31_elements() -> None:
    """A pool of 4 GB of which few bytes are touched: reserved memory that is never committed."""
    dtype, block_size, head_size, num_tables, num_heads = torch.bfloat16, 32, 16, 3, 2
    chunk, block = 1 << 20, 1025
    assert block * num_heads * chunk > 1 << 31
    num_bytes = (block + 1) * num_heads * chunk * dtype.itemsize
    no_reserve = 0x4000  # MAP_NORESERVE; Python's mmap module does not name it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    reserved = np.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), np.uint8)
    # The interpreter copies the storage of every argument: this one has the pool's first bytes.
    first = torch.from_numpy(reserved[:65536]).view(dtype).view(1, num_heads, -1)
    rows = random_rows((5, 2 * num_heads, head_size), dtype, seed=5)
    key, value = rows[:, :num_heads], rows[:, num_heads:]
    codes = random_codes(5, num_tables)[:, :num_heads].contiguous()
    offsets = torch.arange(3, 8)

    slots = block * block_size + offsets
    run_with_chunks_of(
        chunk, host_pages.store_pages_launch(key, value, codes, slots, first, block_size, 4)
    )
    expected = torch.zeros_like(first)
    host_pages.store_pages_reference(key, value, codes, offsets, expected, block_size)
    for head in range(num_heads):
        start = (block * num_heads + head) * chunk * dtype.itemsize
        found = torch.from_numpy(reserved[start : start + expected[0, head].nbytes].copy())
        assert_same_bytes(found, expected[0, head])

    table = torch.tensor([block], dtype=torch.int32)
    found = torch.zeros_like(rows)
    keys_out, values_out = found[:, :num_heads], found[:, num_heads:]
    run_with_chunks_of(
        chunk,
        host_pages.gather_pages_launch(first, table, 3, 8, keys_out, values_out, block_size, 4),
    )
    assert_same_bytes(found, rows)


def run_with_chunks_of(chunk_elements: int, launch: Launch) -> None:
    arguments = {**launch.arguments, "chunk_elements": chunk_elements}
    dataclasses.replace(launch, arguments=arguments).run(torch.device("cpu"))
