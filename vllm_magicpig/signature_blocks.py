"""The bytes of a block of signatures, and the float32 operations that make them.

    encoded = encode_blocks(keys, signs, bits)         the exact twin of signature_reference.encode
    page = pack(encoded, block)                        uint8, as the pool holds it

The kernels repeat this bit for bit: every operation is one IEEE float32 operation, rounded to nearest,
nothing fused, and every sum has its order: over dimensions in 16 partial sums (`sum16`), which vectors
of 4, 8 and 16 lanes all keep, over tokens one after another. A device whose sums have another order
agrees but for keys near a boundary.

Block of one kv head: 2 tiles of 64 tokens, then the header, then zeros to a multiple of 64 bytes.

    tile    codes   [sums of 64 dimensions][bit, the highest first][byte of 8 dimensions][64 tokens]
            factors int16 [64] at place(token)
    header  mean    bfloat16 [head_size]
            unit    float32: of the factors, f_i = unit F_i
            errors  float32: sum of e2 over the block

p is the power of two from head_size up; bit i of a code byte is of dimension 8 byte + i. A code u of 0
to 2^bits - 1 stands for c = u - (2^bits - 1) / 2, the sum over its bits of +-2^(bit - 1): each plane
of bits is looked up in the same tables of signs, 4 dimensions a nibble, and counts twice the next.

Why bit planes and not two dimensions in a nibble: 16 entries of 8 bits serve all planes, a head's
tables stay half as large, and rounding to 8 bits costs half as much (signature_scores.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_magicpig.signature_reference import BLOCK_TOKENS, QUANTISER_STEP, STEP_FACTORS

TILE_TOKENS = 64

SUM_DIMENSIONS = 64
"""What is added up in 8 bits: finer entries than with 128, for an addition in 16 bits per 64."""

MOST_FACTOR = 32767


@dataclass(frozen=True)
class EncodedBlocks:
    """means: bfloat16 [blocks, d]; codes: uint8 [blocks, 128, p], u; factors: int16 [blocks, 128], F;
    units: float32 [blocks]; errors: float32 [blocks], sums of e2."""

    means: torch.Tensor
    codes: torch.Tensor
    factors: torch.Tensor
    units: torch.Tensor
    errors: torch.Tensor


def encode_blocks(keys: torch.Tensor, signs: torch.Tensor, bits: int) -> EncodedBlocks:
    """keys: float [n, d] of any dtype that float32 holds, n a multiple of BLOCK_TOKENS; signs: int8 [2,
    p] of `signature_reference.rotation_signs`."""
    blocks = keys.float().reshape(-1, BLOCK_TOKENS, keys.shape[1])
    means = (in_order(blocks.transpose(1, 2)) * (1 / BLOCK_TOKENS)).bfloat16()
    x = (blocks - means.float()[:, None]).flatten(0, 1)
    y = rotate(x, signs)
    size, sizes = y.shape[1], y.abs()
    squares, half = sum16(y * y), sum16(sizes) * 0.5
    rms = (squares / size).sqrt()
    top = 2 ** (bits - 1) - 1
    best = torch.full_like(squares, -1.0)
    levels, alike, norms = torch.zeros_like(y), torch.zeros_like(squares), torch.ones_like(squares)
    for factor in STEP_FACTORS:
        step = torch.tensor(QUANTISER_STEP[bits] * factor, dtype=torch.float32)
        inverse = torch.where(squares > 0, 1 / (rms * step), 0.0)
        tried = (sizes * inverse[:, None]).trunc().clamp(max=top)
        product = half + sum16(sizes * tried)
        norm = (2 * tried + 1).pow(2).sum(1)  # 4 |c|^2: integers below 2^16, exact in any order
        quality = product * product / norm
        better = quality > best
        best = torch.where(better, quality, best)
        levels = torch.where(better[:, None], tried, levels)
        alike, norms = torch.where(better, product, alike), torch.where(better, norm, norms)
    f = torch.where(alike > 0, squares / alike, 0.0).reshape(-1, BLOCK_TOKENS)
    lost = (squares * (norms * 0.25) / (alike * alike) - 1).clamp(min=0)
    e2 = torch.where(alike > 0, squares * lost / (size - 1), 0.0)
    units = f.amax(1) / MOST_FACTOR
    factors = torch.where(units[:, None] > 0, (f / units[:, None]).round(), 0.0)
    codes = torch.where(y > 0, top + 1 + levels, top - levels)
    return EncodedBlocks(
        means,
        codes.to(torch.uint8).reshape(-1, BLOCK_TOKENS, size),
        factors.clamp(max=MOST_FACTOR).to(torch.int16),
        units,
        in_order(e2.reshape(-1, BLOCK_TOKENS)),
    )


def in_order(terms: torch.Tensor) -> torch.Tensor:
    """Sums of the last dimension, one term after another."""
    total = terms[..., 0].clone()
    for i in range(1, terms.shape[-1]):
        total += terms[..., i]
    return total


def sum16(terms: torch.Tensor) -> torch.Tensor:
    """Sums of the last dimension with 16 partial sums: float32 [..., n] to [...].

    Partial sum i adds up terms i, i + 16, i + 32 in order; then halves are added until one is left: 0
    to 7 and 8 to 15 first.
    """
    padded = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % 16))
    return halves(in_order(padded.reshape(*terms.shape[:-1], -1, 16).transpose(-1, -2)))


def halves(partial: torch.Tensor) -> torch.Tensor:
    """Sums of the last dimension, a power of two: its halves are added until one is left."""
    while partial.shape[-1] > 1:
        low, high = partial.chunk(2, -1)
        partial = low + high
    return partial[..., 0]


def rotate(vectors: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """R x = H D2 H D1 x / p: float32 [n, d] to [n, p], d padded with zeros; signs: int8 [2, p].

    Butterflies of distance 1, 2, 4 and so on, (a, b) to (a + b, a - b); p is a power of two, so that
    where the division is done makes no difference.
    """
    size = signs.shape[1]
    y = torch.nn.functional.pad(vectors, (0, size - vectors.shape[1])) * signs[0]
    y = _butterflies(y) * (signs[1] / size)
    return _butterflies(y)


def _butterflies(y: torch.Tensor) -> torch.Tensor:
    distance = 1
    while distance < y.shape[1]:
        pairs = y.reshape(len(y), -1, 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([a + b, a - b], 2).reshape(len(y), -1)
        distance *= 2
    return y


def place(token: torch.Tensor) -> torch.Tensor:
    """Where 16-bit values of a tile's tokens lie: those that unpacklo_epi8 makes first, then those of
    unpackhi_epi8, whatever the width of the vectors; token: integer, 0 to 63."""
    return (token >> 3 & 1) << 5 | token >> 4 << 3 | token & 7


def tile_bytes(head_size: int, bits: int) -> int:
    size = 1 << (head_size - 1).bit_length()
    return TILE_TOKENS * (bits * size // 8 + 2)


def block_bytes(head_size: int, bits: int) -> int:
    """Of one kv head: 4,672 at head size 128 with 2 bits, 36.5 a token."""
    return -(-(2 * tile_bytes(head_size, bits) + 2 * head_size + 8) // 64) * 64


def pack(encoded: EncodedBlocks, block: int, bits: int) -> torch.Tensor:
    """uint8 [block_bytes] of one of the blocks."""
    head_size, size = encoded.means.shape[1], encoded.codes.shape[2]
    of_sum = min(size, SUM_DIMENSIONS)
    bit = torch.arange(bits - 1, -1, -1)
    codes = encoded.codes[block].reshape(2, TILE_TOKENS, size // of_sum, of_sum // 8, 8, 1)
    planes = (codes.int() >> bit & 1) << torch.arange(8)[:, None]
    code_bytes = planes.sum(4).permute(0, 2, 4, 3, 1).to(torch.uint8).reshape(2, -1)
    factors = torch.empty(2, TILE_TOKENS, dtype=torch.int16)
    factors[:, place(torch.arange(TILE_TOKENS))] = encoded.factors[block].reshape(2, -1)
    tiles = torch.cat([code_bytes, factors.view(torch.uint8)], 1).flatten()
    header = [
        part.reshape(-1).contiguous().view(torch.uint8)
        for part in (encoded.means[block], encoded.units[block], encoded.errors[block])
    ]
    page = torch.zeros(block_bytes(head_size, bits), dtype=torch.uint8)
    used = torch.cat([tiles, *header])
    page[: len(used)] = used
    return page
