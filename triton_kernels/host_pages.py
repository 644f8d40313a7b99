"""Rows and codes into host pages, and rows back to the device, through unified addressing.

The page's layout is PageLayout's (cpu_kernels/magicpig.h): per block and kv head a chunk of rows
[block_size][K | V][head_size], then codes [block_size / 32][L][32] uint16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_magicpig.triton_kernels.launch import (
    STRIDE_UNIT,
    Launch,
    require,
    require_rows,
    row_strides,
)

DEFAULT_PROGRAMS = 32
"""Programs of a launch, each looping over its share, so that the other SMs compute meanwhile.

A program keeps the rows of 32 tokens in flight, 16 KB at head size 128 in 16 bits. Little's law asks
for bandwidth times latency: 0.1 MB on PCIe 5 x16 (55 GB/s, about 2 us), 0.45 MB where the host is
behind NVLink-C2C (450 GB/s, 1 us). 32 programs have 0.5 MB.
"""

_TILE_TOKENS = tl.constexpr(32)
"""kTileTokens of cpu_kernels/magicpig.h: codes of so many tokens lie together, 64 bytes a table."""


def store_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor | None,
    slots: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
    num_programs: int = DEFAULT_PROGRAMS,
) -> None:
    """Writes rows, and codes where there are any, to the pages.

    key, value: float32, bfloat16 or float16 [n, num_kv_heads, head_size], the last dimension
    contiguous; codes: uint16 [n, num_kv_heads, L], contiguous, or None; slots: int64 [n], block *
    block_size + offset, -1 skips, no slot twice; pages: the rows' dtype [num_blocks, num_kv_heads,
    chunk_elements], contiguous, in pinned host memory. All but pages are on the device.
    Runs on the current stream. Raises ValueError before anything is launched.
    """
    launch = store_pages_launch(key, value, codes, slots, pages, block_size, num_programs)
    if key.numel() > 0:
        launch.run(key.device)


def store_pages_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor | None,
    slots: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
) -> None:
    """`store_pages` in plain PyTorch; every tensor is on the CPU."""
    _check_store(key, value, codes, slots, pages, block_size)
    written = slots >= 0
    block, offset = slots[written] // block_size, slots[written] % block_size
    rows = _rows(pages, block_size, key.shape[2])
    rows[block, :, offset] = torch.cat([key, value], dim=-1)[written]
    if codes is not None:
        tiles = _code_tiles(pages, block_size, key.shape[2], codes.shape[2])
        tile, lane = offset // _TILE_TOKENS.value, offset % _TILE_TOKENS.value
        tiles[block, :, tile, :, lane] = codes.view(torch.int16)[written]


def gather_pages(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    stop: int,
    keys_out: torch.Tensor,
    values_out: torch.Tensor,
    block_size: int,
    num_programs: int = DEFAULT_PROGRAMS,
) -> None:
    """Copies a request's rows [start, stop) out of the pages.

    pages: [num_blocks, num_kv_heads, chunk_elements] in pinned host memory, as in `store_pages`;
    block_table: int32 [max_blocks], contiguous; keys_out, values_out: the pages' dtype
    [stop - start, num_kv_heads, head_size], the last dimension contiguous, such as views of a
    larger staging buffer. All but pages are on the device.
    Runs on the current stream. Raises ValueError before anything is launched.
    """
    launch = gather_pages_launch(
        pages, block_table, start, stop, keys_out, values_out, block_size, num_programs
    )
    if stop > start:
        launch.run(keys_out.device)


def gather_pages_reference(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    stop: int,
    keys_out: torch.Tensor,
    values_out: torch.Tensor,
    block_size: int,
) -> None:
    """`gather_pages` in plain PyTorch; every tensor is on the CPU."""
    _check_gather(pages, block_table, start, stop, keys_out, values_out, block_size)
    head_size = keys_out.shape[2]
    positions = torch.arange(start, stop)
    blocks = block_table[positions // block_size].long()
    rows = _rows(pages, block_size, head_size)[blocks, :, positions % block_size]
    keys_out.copy_(rows[..., :head_size])
    values_out.copy_(rows[..., head_size:])


def store_pages_launch(
    key: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor | None,
    slots: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
    num_programs: int,
) -> Launch:
    """What `store_pages` launches."""
    _check_store(key, value, codes, slots, pages, block_size)
    num_tokens, num_kv_heads, head_size = key.shape
    num_units = triton.cdiv(num_tokens, _TILE_TOKENS.value) * num_kv_heads
    key_token_stride, key_head_stride = row_strides(key)
    value_token_stride, value_head_stride = row_strides(value)
    return Launch(
        _store_pages_kernel,
        (min(num_programs, num_units),),
        {
            "key_ptr": key,
            "value_ptr": value,
            "codes_ptr": codes,
            "slots_ptr": slots,
            "pages_ptr": pages,
            "num_tokens": num_tokens,
            "num_kv_heads": num_kv_heads,
            "key_token_stride": key_token_stride,
            "key_head_stride": key_head_stride,
            "value_token_stride": value_token_stride,
            "value_head_stride": value_head_stride,
            "chunk_elements": pages.shape[2],
            "BLOCK_SIZE": block_size,
            "HEAD_SIZE": head_size,
            "BLOCK_DIMS": triton.next_power_of_2(head_size),
            "NUM_TABLES": 0 if codes is None else codes.shape[2],
            "UNIT": STRIDE_UNIT,
            "num_warps": 4,
        },
    )


def gather_pages_launch(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    stop: int,
    keys_out: torch.Tensor,
    values_out: torch.Tensor,
    block_size: int,
    num_programs: int,
) -> Launch:
    """What `gather_pages` launches."""
    _check_gather(pages, block_table, start, stop, keys_out, values_out, block_size)
    _, num_kv_heads, head_size = keys_out.shape
    first_tile = start // _TILE_TOKENS.value
    num_tiles = triton.cdiv(stop, _TILE_TOKENS.value) - first_tile
    key_token_stride, key_head_stride = row_strides(keys_out)
    value_token_stride, value_head_stride = row_strides(values_out)
    return Launch(
        _gather_pages_kernel,
        (min(num_programs, num_tiles * num_kv_heads),),
        {
            "pages_ptr": pages,
            "block_table_ptr": block_table,
            "keys_ptr": keys_out,
            "values_ptr": values_out,
            "start": start,
            "stop": stop,
            "num_kv_heads": num_kv_heads,
            "key_token_stride": key_token_stride,
            "key_head_stride": key_head_stride,
            "value_token_stride": value_token_stride,
            "value_head_stride": value_head_stride,
            "chunk_elements": pages.shape[2],
            "BLOCK_SIZE": block_size,
            "HEAD_SIZE": head_size,
            "BLOCK_DIMS": triton.next_power_of_2(head_size),
            "UNIT": STRIDE_UNIT,
            "num_warps": 4,
        },
    )


_ROW_STRIDES = ["key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride"]


@triton.jit(
    do_not_specialize=["num_tokens", *_ROW_STRIDES],
    do_not_specialize_on_alignment=["slots_ptr"],
)
def _store_pages_kernel(
    key_ptr,
    value_ptr,
    codes_ptr,
    slots_ptr,
    pages_ptr,
    num_tokens,
    num_kv_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    chunk_elements,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    NUM_TABLES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One unit of work: 32 tokens of the batch and one kv head."""
    CODES_PER_ELEMENT: tl.constexpr = pages_ptr.dtype.element_ty.primitive_bitwidth // 16
    dims = tl.arange(0, BLOCK_DIMS)
    num_units = tl.cdiv(num_tokens, _TILE_TOKENS) * num_kv_heads
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        head = unit % num_kv_heads
        tokens = (unit // num_kv_heads) * _TILE_TOKENS + tl.arange(0, _TILE_TOKENS)
        slots = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
        written = slots >= 0
        offsets = slots % BLOCK_SIZE
        # int64 like the slots: a pool has more than 2**31 elements.
        chunks = (slots // BLOCK_SIZE * num_kv_heads + head) * chunk_elements

        in_rows = written[:, None] & (dims < HEAD_SIZE)[None, :]
        wide = tokens.to(tl.int64)
        key_rows = (wide * key_token_stride + head * key_head_stride) * UNIT
        value_rows = (wide * value_token_stride + head * value_head_stride) * UNIT
        key = key_ptr + key_rows[:, None] + dims[None, :]
        value = value_ptr + value_rows[:, None] + dims[None, :]
        row = pages_ptr + (chunks + offsets * (2 * HEAD_SIZE))[:, None] + dims[None, :]
        k = tl.load(key, mask=in_rows)
        v = tl.load(value, mask=in_rows)
        tl.store(row, k, mask=in_rows)
        tl.store(row + HEAD_SIZE, v, mask=in_rows)

        if NUM_TABLES > 0:
            code_pages = pages_ptr.to(tl.pointer_type(tl.uint16))
            chunk_codes = (chunks + BLOCK_SIZE * 2 * HEAD_SIZE) * CODES_PER_ELEMENT
            tiles = offsets // _TILE_TOKENS * (NUM_TABLES * _TILE_TOKENS)
            lanes = chunk_codes + tiles + offsets % _TILE_TOKENS
            batch_codes = (wide * num_kv_heads + head) * NUM_TABLES
            # The token is the fast dimension: a warp writes whole 64-byte runs of a table.
            for first in range(0, NUM_TABLES, 32):
                tables = first + tl.arange(0, 32)
                in_codes = (tables < NUM_TABLES)[:, None] & written[None, :]
                source = codes_ptr + batch_codes[None, :] + tables[:, None]
                target = code_pages + lanes[None, :] + tables[:, None] * _TILE_TOKENS
                tl.store(target, tl.load(source, mask=in_codes), mask=in_codes)


@triton.jit(
    do_not_specialize=["start", "stop", *_ROW_STRIDES],
    do_not_specialize_on_alignment=["block_table_ptr"],
)
def _gather_pages_kernel(
    pages_ptr,
    block_table_ptr,
    keys_ptr,
    values_ptr,
    start,
    stop,
    num_kv_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    chunk_elements,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One unit of work: 32 consecutive rows of one block and kv head."""
    dims = tl.arange(0, BLOCK_DIMS)
    lanes = tl.arange(0, _TILE_TOKENS)
    first_tile = start // _TILE_TOKENS
    num_units = (tl.cdiv(stop, _TILE_TOKENS) - first_tile) * num_kv_heads
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        head = unit % num_kv_heads
        first = (first_tile + unit // num_kv_heads) * _TILE_TOKENS
        # A block is a multiple of 32 tokens, so that the whole tile lies in one.
        block = tl.load(block_table_ptr + first // BLOCK_SIZE).to(tl.int64)
        chunk = (block * num_kv_heads + head) * chunk_elements
        row = pages_ptr + chunk + (first % BLOCK_SIZE + lanes)[:, None] * (2 * HEAD_SIZE)
        positions = first + lanes
        wanted = (positions >= start) & (positions < stop)
        in_rows = wanted[:, None] & (dims < HEAD_SIZE)[None, :]
        k = tl.load(row + dims[None, :], mask=in_rows)
        v = tl.load(row + HEAD_SIZE + dims[None, :], mask=in_rows)

        out = (positions - start).to(tl.int64)
        key_rows = (out * key_token_stride + head * key_head_stride) * UNIT
        value_rows = (out * value_token_stride + head * value_head_stride) * UNIT
        tl.store(keys_ptr + key_rows[:, None] + dims[None, :], k, mask=in_rows)
        tl.store(values_ptr + value_rows[:, None] + dims[None, :], v, mask=in_rows)


def _rows(pages: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
    """A view [num_blocks, num_kv_heads, block_size, 2 * head_size]."""
    row_elements = block_size * 2 * head_size
    return pages[:, :, :row_elements].unflatten(2, (block_size, 2 * head_size))


def _code_tiles(
    pages: torch.Tensor, block_size: int, head_size: int, num_tables: int
) -> torch.Tensor:
    """A view int16 [num_blocks, num_kv_heads, block_size / 32, L, 32]; PyTorch indexes no uint16."""
    tokens = _TILE_TOKENS.value
    start = block_size * 2 * head_size * (pages.element_size() // 2)
    codes = pages.view(torch.int16)[:, :, start : start + block_size * num_tables]
    return codes.unflatten(2, (block_size // tokens, num_tables, tokens))


def _check_store(
    key: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor | None,
    slots: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
) -> None:
    require_rows("key", key)
    require_rows("value", value)
    num_tokens, num_kv_heads, head_size = key.shape
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"value is {value.dtype} of shape {tuple(value.shape)}, but must be like key, "
            f"{key.dtype} of shape {tuple(key.shape)}; pass the rows of the same tokens."
        )
    num_tables = 0
    if codes is not None:
        num_tables = codes.shape[-1]
        require("codes", codes, torch.uint16, (num_tokens, num_kv_heads, num_tables))
    require("slots", slots, torch.int64, (num_tokens,))
    _check_pages(pages, key.dtype, block_size, num_kv_heads, head_size, num_tables)


def _check_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    stop: int,
    keys_out: torch.Tensor,
    values_out: torch.Tensor,
    block_size: int,
) -> None:
    require_rows("keys_out", keys_out)
    require_rows("values_out", values_out)
    num_tokens, num_kv_heads, head_size = keys_out.shape
    if values_out.shape != keys_out.shape or values_out.dtype != keys_out.dtype:
        raise ValueError(
            f"values_out is {values_out.dtype} of shape {tuple(values_out.shape)}, but must be like "
            f"keys_out, {keys_out.dtype} of shape {tuple(keys_out.shape)}; pass such a tensor."
        )
    _check_pages(pages, keys_out.dtype, block_size, num_kv_heads, head_size, 0)
    require("block_table", block_table, torch.int32, (block_table.numel(),))
    max_tokens = block_table.shape[0] * block_size
    if not 0 <= start <= stop <= max_tokens or stop - start != num_tokens:
        raise ValueError(
            f"rows {start} to {stop} do not fit keys_out, which holds {num_tokens}, and a block "
            f"table of {max_tokens} tokens; pass stop - start rows of the request."
        )


def _check_pages(
    pages: torch.Tensor,
    dtype: torch.dtype,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
    num_tables: int,
) -> None:
    if block_size <= 0 or block_size % _TILE_TOKENS.value:
        raise ValueError(
            f"block_size is {block_size}, but must be a positive multiple of "
            f"{_TILE_TOKENS.value}; use the pages' own."
        )
    if pages.dim() != 3 or pages.shape[1] != num_kv_heads or pages.dtype != dtype:
        raise ValueError(
            f"pages are {pages.dtype} of shape {tuple(pages.shape)}, but must be {dtype} "
            f"[num_blocks, {num_kv_heads} kv heads, chunk_elements] like the rows; pass the layer's."
        )
    needed = block_size * (2 * head_size * pages.element_size() + 2 * num_tables)
    if pages.shape[2] * pages.element_size() < needed or not pages.is_contiguous():
        raise ValueError(
            f"pages have chunks of {pages.shape[2] * pages.element_size()} bytes, strides "
            f"{pages.stride()}, but must be contiguous with at least {needed} bytes a chunk; pass "
            "the layer's."
        )
