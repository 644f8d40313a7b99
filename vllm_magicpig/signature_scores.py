"""Scores of signatures in integers, and the arithmetic around them: the same on every instruction set.

Logits are integers in units of ln 2 / 128 nats here, so that `score + (127 << 7)` are the bits of the
bfloat16 2^(score / 128).

What is float32 is done by single IEEE operations, nothing fused, in the order stated: sums of products
over dimensions have 16 partial sums (`dot`), sums of powers 32 (`sum_of_powers`), which vectors of any
width up to these keep. Everything else is integers, whose sums have no order.

Formats, and why these. On AVX2 the fastest scan looks partial products up (vpshufb: 16 entries of 8
bits) and adds them in 8 bits. AVX-512 does the same twice as wide; products of bytes (VNNI) need as
many instructions at 2 bits, and their sums would be others. So sums are of table entries, by
definition, and a table is rounded so that no sum of 64 dimensions leaves 8 bits. vpunpck and vpmaddubsw
with weights 2^bit make one 16-bit sum of two; from there on all is 16 bits wide: vpmulhrsw, vpaddsw,
vpmaxsw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_magicpig.signature_blocks import (
    SUM_DIMENSIONS,
    EncodedBlocks,
    halves,
    in_order,
    rotate,
    sum16,
)
from vllm_magicpig.signature_reference import BLOCK_TOKENS

UNITS = 128 / math.log(2)
"""Of a nat."""

TABLE_TOP = 118.0
"""The unit of a table is the largest sum of 64 |q_j| over this: 16 entries are rounded by 1/2 at most,
and 118 + 8 is below 127."""

MOST_UNITS = 1 << 23
"""Products with means and with static keys are clipped here: 45,000 nats."""

LEAST_POWER = -126 * 128
"""Powers of two stop at the least normal float32."""


def query_units(queries: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 [g, d]: queries times float32(scale 128 / ln 2); scale: of the logits."""
    return queries.float() * torch.tensor(scale * UNITS, dtype=torch.float32)


@dataclass(frozen=True)
class Tables:
    """entries: int8 [g, p / 4, 16]: entry v of nibble n is the sum of +-q_j over dimensions 4 n + i,
    plus where bit i of v is set, in `units`: float32 [g]."""

    entries: torch.Tensor
    units: torch.Tensor


def tables(queries: torch.Tensor, signs: torch.Tensor) -> Tables:
    """queries: float32 [g, d], in units. Signed sums are ((q_0 + q_1) + (q_2 + q_3))."""
    rotated = rotate(queries, signs).reshape(len(queries), -1, 4)
    sizes = rotated.abs()
    of_nibble = (sizes[..., 0] + sizes[..., 1]) + (sizes[..., 2] + sizes[..., 3])
    nibbles = min(of_nibble.shape[1], SUM_DIMENSIONS // 4)
    most = in_order(of_nibble.reshape(len(queries), -1, nibbles)).amax(1)
    units = most / TABLE_TOP
    inverse = torch.where(most > 0, 1 / units, 0.0)
    sign = 2.0 * (torch.arange(16)[:, None] >> torch.arange(4) & 1) - 1
    signed = rotated[:, :, None] * sign
    sums = (signed[..., 0] + signed[..., 1]) + (signed[..., 2] + signed[..., 3])
    return Tables((sums * inverse[:, None, None]).round().to(torch.int8), units)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T with 16 partial sums (`sum16`): float32 [rows of a, rows of b]."""
    return sum16(a[:, None] * b)


def table_sums(table: Tables, encoded: EncodedBlocks, bits: int) -> torch.Tensor:
    """Of each token, over planes of bits, 2^bit times the entries of its nibbles: int64 [g, tokens]."""
    codes = encoded.codes.flatten(0, 1).int()
    nibble = torch.arange(codes.shape[1] // 4)
    total = torch.zeros(len(table.units), len(codes), dtype=torch.int64)
    for bit in range(bits):
        index = (codes.reshape(len(codes), -1, 4) >> bit & 1) << torch.arange(4)
        total += table.entries[:, nibble, index.sum(2)].sum(2, dtype=torch.int64) << bit
    return total


def scores(
    sums: torch.Tensor, units: torch.Tensor, encoded: EncodedBlocks, bits: int
) -> torch.Tensor:
    """The residual's part of the logits: int64 [g, tokens], in -32767 to 32767.

    sums: of `table_sums`; units: float32 [g], of the tables, times b where scores are shrunk. What a
    block and a head have in common is a 16-bit number and a power of two.
    """
    shift = sum_shift(encoded.codes.shape[2], bits)
    multiplier, exponent = multipliers(units, encoded.units, shift)
    per_token = [x.repeat_interleave(BLOCK_TOKENS, 1) for x in (multiplier, exponent)]
    factor = mulhrs(encoded.factors.flatten().long(), per_token[0])
    return (mulhrs(sums << shift, factor) << per_token[1]).clamp(-32767, 32767)


def sum_shift(size: int, bits: int) -> int:
    """By which sums are shifted up to fill 16 bits; size: p."""
    most = 127 * (2**bits - 1) * max(1, size // SUM_DIMENSIONS)
    shift: int = (32767 // most).bit_length() - 1
    return shift


def multipliers(
    units: torch.Tensor, factor_units: torch.Tensor, shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [g, blocks] up to 32767, exponent int64 [g, blocks] of 0 to 7).

    A score is mulhrs(sum << shift, mulhrs(F, multiplier)) << exponent. units: float32 [g];
    factor_units: float32 [blocks]. With exponent 0 scores are right to 1.5 units; with more they are
    coarser as they are larger; beyond the last they are too small, at 20,000 nats.
    """
    value = factor_units * (units * 2.0 ** (29 - shift))[:, None]
    exponent = sum((value > 32767 * 2.0**e).long() for e in range(7))
    assert isinstance(exponent, torch.Tensor)
    return (value * 2.0**-exponent).round().clamp(max=32767).long(), exponent


def mulhrs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """vpmulhrsw: the product over 2^15, rounded, half up."""
    return ((a * b >> 14) + 1) >> 1


def adds(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """vpaddsw."""
    return (a + b).clamp(-32768, 32767)


def rounded(products: torch.Tensor) -> torch.Tensor:
    """float32 units to int64, half to even."""
    return products.round().clamp(-MOST_UNITS, MOST_UNITS).long()


def sum_of_powers(units: torch.Tensor) -> torch.Tensor:
    """float32 [g]: sum of 2^(units / 128), linear between powers of two; units: int64 [g, n], up to 0.

    Partial sum i of 32 adds up elements i, i + 32, i + 64 in order (sampled tokens by place, static
    keys by position); then halves are added until one is left. Elements beyond the last count as the
    least.
    """
    padding = (0, -units.shape[1] % 32)
    padded = torch.nn.functional.pad(units, padding, value=LEAST_POWER).clamp(min=LEAST_POWER)
    powers = (padded + (127 << 7) << 16).int().view(torch.float32)
    return halves(in_order(powers.reshape(len(units), -1, 32).transpose(1, 2)))


def power(units: torch.Tensor) -> torch.Tensor:
    """2^(units / 128): float32(2^(k / 128)) of the low 7 bits times a power of two, 0 below the least
    normal number; units: int64, at most 0."""
    table = torch.tensor([2.0 ** (k / 128) for k in range(128)], dtype=torch.float32)
    found = torch.ldexp(table[units & 127], units >> 7)
    return torch.where(units < LEAST_POWER, 0.0, found)


def log2_units(x: torch.Tensor) -> torch.Tensor:
    """128 log2(x) from exponent and the first 8 bits of the mantissa, int64; x: float32, positive."""
    table = torch.tensor([round(128 * math.log2(1 + (k + 0.5) / 256)) for k in range(256)])
    bits = x.contiguous().view(torch.int32).long()
    return ((bits >> 23) - 127) * 128 + table[bits >> 15 & 255]
