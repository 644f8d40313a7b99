"""SimHash on the GPU: centre -> project -> sign -> pack (arXiv 2410.16179, section 4.1).

The projections are three fp16 products on the tensor cores, accumulated in fp32:
x R = hi(x) hi(R) + hi(x) lo(R) + lo(x) hi(R), where hi + lo is a number in two fp16 pieces of 11
bits. That is the accuracy of tl.dot's tf32x3 at twice its rate, and R is split once instead of in
every program; tf32x3 also spills at these tiles on sm_80 and sm_100 (Triton 3.9). "ieee" leaves the
tensor cores, at a fifth of the rate. A chunk of 8K tokens and 8 heads at K = 10 and L = 150 takes
81 GFLOP, 2 % of what the layer of an 8B model itself computes for that chunk. `sign_margin` says how
far off a projection can be.

A power of two keeps the pieces inside fp16's range: the largest element of each vector, and of R,
lies in [2**14, 2**15). No sign depends on it.
"""

from __future__ import annotations

from typing import NamedTuple

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

_TABLES_PER_TILE = 32
"""Divides the padded L. A larger tile would multiply by more padding: L = 150 fills 94 % of 5."""

_SMALL_BATCH_ROWS = 256
"""Up to here 16-row tiles: one decode step is a few dozen vectors, and needs many programs."""


class _Tiling(NamedTuple):
    rows: int
    tables: int
    num_warps: int
    num_stages: int


def _tiling(num_rows: int, head_size: int, itemsize: int) -> _Tiling:
    """The vectors' pieces stay in registers, R streams through num_stages buffers.

    The largest tiles with no spills and, on sm_80, at most 99 KB of shared memory (what sm_86,
    sm_89 and sm_120 have), for K <= 15 and L <= 255: scripts/triton_resources.py.
    """
    if num_rows <= _SMALL_BATCH_ROWS:
        return _Tiling(rows=16, tables=32, num_warps=4, num_stages=3)
    if head_size <= 128:
        rows = 128 if itemsize == 2 else 64
        return _Tiling(rows, tables=32, num_warps=8, num_stages=3)
    return _Tiling(rows=64, tables=16, num_warps=8, num_stages=3)


def pack_directions(directions: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Bit planes of the hyperplanes, split for the kernel: fp16 [2, K, head_size, L padded].

    directions: float32 [head_size, L * K], where column l * K + k is bit k of table l
    (reference.hyperplanes). Plane k holds bit k of every table; planes[0] + planes[1] is the
    direction times a power of two, to 22 bits. L is padded with zeros to a multiple of 32.
    """
    head_size, num_columns = directions.shape
    if directions.dtype != torch.float32 or not 2 <= num_bits <= 15 or num_columns % num_bits:
        raise ValueError(
            f"directions are {directions.dtype} of shape {tuple(directions.shape)} with "
            f"{num_bits} bits per table, but must be float32 [head_size, L * K] with K from 2 to "
            "15; pass what reference.hyperplanes returns."
        )
    num_tables = num_columns // num_bits
    _, exponent = torch.frexp(directions.abs().max())
    scaled = torch.ldexp(directions, 15 - exponent)
    hi = scaled.half()
    lo = (scaled - hi.float()).half()
    planes = directions.new_zeros(
        (2, num_bits, head_size, _padded(num_tables)), dtype=torch.float16
    )
    by_plane = torch.stack([hi, lo]).view(2, head_size, num_tables, num_bits).permute(0, 3, 1, 2)
    planes[..., :num_tables] = by_plane
    return planes


def _padded(num_tables: int) -> int:
    return -(-num_tables // _TABLES_PER_TILE) * _TABLES_PER_TILE


def simhash(
    vectors: torch.Tensor,
    planes: torch.Tensor,
    num_tables: int,
    center: torch.Tensor | None,
    codes: torch.Tensor,
) -> None:
    """Writes the codes of `vectors`: bit k of code l is set when projection l * K + k is > 0.

    vectors: float32, bfloat16 or float16 [n, heads, head_size], the last dimension contiguous,
    finite; planes: what `pack_directions` returned, on the vectors' device; center: float32
    [heads, head_size], subtracted in float32, or None (queries are never centred); codes: uint16
    [n, heads, L], contiguous, on the device or in pinned host memory.
    Runs on the current stream. Raises ValueError before anything is launched.
    """
    launch = simhash_launch(vectors, planes, num_tables, center, codes)
    if vectors.numel() > 0:
        launch.run(vectors.device)


def simhash_reference(
    vectors: torch.Tensor,
    planes: torch.Tensor,
    num_tables: int,
    center: torch.Tensor | None,
    codes: torch.Tensor,
) -> None:
    """`simhash` in plain PyTorch, on any device: one GEMM with the same 22-bit directions."""
    _check(vectors, planes, num_tables, center, codes)
    num_bits, head_size = planes.shape[1:3]
    directions = (planes[0].float() + planes[1].float())[..., :num_tables]
    x = vectors.float() if center is None else vectors.float() - center
    columns = directions.transpose(0, 1).reshape(head_size, num_bits * num_tables)
    projections = (x @ columns).unflatten(-1, (num_bits, num_tables))
    packed = torch.zeros(codes.shape, dtype=torch.int32, device=vectors.device)
    for bit in range(num_bits):
        packed |= (projections[:, :, bit] > 0).int() << bit
    codes.copy_(packed.to(torch.uint16))


def simhash_launch(
    vectors: torch.Tensor,
    planes: torch.Tensor,
    num_tables: int,
    center: torch.Tensor | None,
    codes: torch.Tensor,
) -> Launch:
    """What `simhash` launches."""
    _check(vectors, planes, num_tables, center, codes)
    num_tokens, num_heads, head_size = vectors.shape
    _, num_bits, _, num_padded_tables = planes.shape
    num_rows = num_tokens * num_heads
    tiling = _tiling(num_rows, head_size, vectors.element_size())
    token_stride, head_stride = row_strides(vectors)
    return Launch(
        _simhash_kernel,
        (triton.cdiv(num_rows, tiling.rows), num_padded_tables // tiling.tables),
        {
            "vectors_ptr": vectors,
            "planes_ptr": planes,
            "center_ptr": center,
            "codes_ptr": codes,
            "num_rows": num_rows,
            "num_heads": num_heads,
            "token_stride": token_stride,
            "head_stride": head_stride,
            "HEAD_SIZE": head_size,
            "NUM_BITS": num_bits,
            "NUM_TABLES": num_tables,
            "PADDED_TABLES": num_padded_tables,
            "BLOCK_ROWS": tiling.rows,
            "BLOCK_DIMS": triton.next_power_of_2(head_size),
            "BLOCK_TABLES": tiling.tables,
            "STAGES": tiling.num_stages,
            "UNIT": STRIDE_UNIT,
            "num_warps": tiling.num_warps,
        },
    )


def sign_margin(
    vectors: torch.Tensor, directions: torch.Tensor, center: torch.Tensor | None = None
) -> torch.Tensor:
    """How far apart a projection of the kernel and of the reference in float32 can be.

    Where the exact projection of the float32 vector (centred in float32) is at least this far from
    zero, both give its sign. vectors: [n, heads, head_size]; directions: float32 [head_size, L * K].
    Returns float64 [n, heads, L * K], in units of the projections. With D = head_size and S the sum
    of |x_d R_d|, what the two lose at most is

    - reference: D float32 additions in any order, D 2**-24 S;
    - kernel, splitting: x and R are 22 bits (2**-22 S each, or 2**-39 of the largest element where
      fp16 is subnormal), and lo(x) lo(R) is dropped, 2**-22 S;
    - kernel, summing: products are exact in float32. A tensor core cuts bits off, at least 2**-23
      of the largest operand, where it aligns the addends and where it stores the sum (Fasi et al.,
      PeerJ CS 7:e330, for sm_70 to sm_80): 2**-22 per addition. The D large products make
      D 2**-22 S; the 2 D small ones come first, when the sum is below 2**-10 S.
    """
    x = (vectors.float() if center is None else vectors.float() - center).double().abs()
    r = directions.double().abs()
    head_size = r.shape[0]
    relative = head_size * (2**-24 + 2**-22 * (1 + 3 * 2**-10)) + 3 * 2**-22
    # Terms of second order, such as the subnormal remainders' own products.
    relative *= 1 + 2**-9
    floor = x.amax(-1, keepdim=True) * r.sum(0) + x.sum(-1, keepdim=True) * r.max()
    return relative * (x @ r) + 2**-38 * floor


@triton.jit(do_not_specialize=["num_rows", "token_stride", "head_stride"])
def _simhash_kernel(
    vectors_ptr,
    planes_ptr,
    center_ptr,
    codes_ptr,
    num_rows,
    num_heads,
    token_stride,
    head_stride,
    HEAD_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    NUM_TABLES: tl.constexpr,
    PADDED_TABLES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    BLOCK_TABLES: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Codes of BLOCK_ROWS vectors in BLOCK_TABLES tables; a row is one (token, head)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tables = tl.program_id(1) * BLOCK_TABLES + tl.arange(0, BLOCK_TABLES)
    dims = tl.arange(0, BLOCK_DIMS)
    tokens = rows // num_heads
    heads = rows % num_heads
    in_rows = (rows < num_rows)[:, None] & (dims < HEAD_SIZE)[None, :]

    starts = (tokens * token_stride + heads * head_stride) * UNIT
    x = tl.load(vectors_ptr + starts[:, None] + dims[None, :], mask=in_rows, other=0.0)
    x = x.to(tl.float32)
    if center_ptr is not None:
        center = center_ptr + heads[:, None] * HEAD_SIZE + dims[None, :]
        x -= tl.load(center, mask=in_rows, other=0.0)

    # 2**(14 - e) for a largest element in [2**e, 2**(e + 1)), put together from exponent bits.
    exponent = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) >> 23
    scale = (tl.minimum(2 * 127 + 14 - exponent, 254) << 23).to(tl.float32, bitcast=True)
    x *= scale[:, None]
    hi = x.to(tl.float16)
    lo = (x - hi.to(tl.float32)).to(tl.float16)

    plane = planes_ptr + dims[:, None] * PADDED_TABLES + tables[None, :]
    in_plane = (dims < HEAD_SIZE)[:, None]
    codes = tl.full((BLOCK_ROWS, BLOCK_TABLES), 0, tl.int32)
    for bit in tl.range(0, NUM_BITS, num_stages=STAGES):
        direction_hi = plane + bit * (HEAD_SIZE * PADDED_TABLES)
        direction_lo = direction_hi + NUM_BITS * HEAD_SIZE * PADDED_TABLES
        if BLOCK_DIMS == HEAD_SIZE:
            r_hi = tl.load(direction_hi)
            r_lo = tl.load(direction_lo)
        else:
            r_hi = tl.load(direction_hi, mask=in_plane, other=0.0)
            r_lo = tl.load(direction_lo, mask=in_plane, other=0.0)
        # Small products first: their rounding is then relative to a small sum.
        projections = tl.dot(lo, r_hi)
        projections = tl.dot(hi, r_lo, projections)
        projections = tl.dot(hi, r_hi, projections)
        codes |= (projections > 0).to(tl.int32) << bit

    out = codes_ptr + rows[:, None] * NUM_TABLES + tables[None, :]
    in_codes = (rows < num_rows)[:, None] & (tables < NUM_TABLES)[None, :]
    tl.store(out, codes.to(tl.uint16), mask=in_codes)


def _check(
    vectors: torch.Tensor,
    planes: torch.Tensor,
    num_tables: int,
    center: torch.Tensor | None,
    codes: torch.Tensor,
) -> None:
    require_rows("vectors", vectors)
    num_tokens, num_heads, head_size = vectors.shape
    if not 1 <= num_tables <= 255:
        raise ValueError(f"num_tables is {num_tables}, but must be 1 to 255; correct L.")
    if planes.dim() != 4 or not 2 <= planes.shape[1] <= 15:
        raise ValueError(
            f"planes have shape {tuple(planes.shape)}, but must be [2, K, head_size, L padded] with "
            "K from 2 to 15; pass what pack_directions returned."
        )
    expected = (2, planes.shape[1], head_size, _padded(num_tables))
    require("planes", planes, torch.float16, expected)
    if center is not None:
        require("center", center, torch.float32, (num_heads, head_size))
    require("codes", codes, torch.uint16, (num_tokens, num_heads, num_tables))
