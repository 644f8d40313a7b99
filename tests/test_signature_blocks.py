"""Blocks of signatures: the float32 encoding against the formulas, and the bytes of a block."""

from __future__ import annotations

import pytest
import torch
from signature_worlds import world

from vllm_magicpig import signature_blocks as blocks
from vllm_magicpig import signature_reference as reference

EPSILON = 2.0**-24  # of a float32 operation, relative
SHAPES = [(16, 2), (24, 1), (64, 4), (80, 2), (128, 2), (256, 1)]


def made(head_size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, blocks.EncodedBlocks]:
    """(keys in bfloat16, signs, encoded) of two blocks."""
    keys = world(256, head_size).keys.bfloat16()
    signs = reference.rotation_signs(head_size, 3)
    return keys, signs, blocks.encode_blocks(keys, signs, bits)


@pytest.mark.parametrize(("head_size", "bits"), SHAPES)
def test_codes_are_the_formulas_but_at_boundaries(head_size: int, bits: int) -> None:
    """A rotated value has 2 log2(p) + 1 additions behind it, the mean 128; each errs by EPSILON of what
    it adds up, and a level differs only where the value is that close to a step."""
    keys, _, encoded = made(head_size, bits)
    R = reference.rotation(head_size, 3)
    formula = reference.encode(keys.double(), R, bits)
    assert (encoded.means.double() - formula.means).abs().max() <= 2**-7 * formula.means.abs().max()
    x = (keys.double() - encoded.means.double().repeat_interleave(128, 0)) @ R.T
    size = x.shape[1]
    same_mean = reference_codes(x, bits)
    found = encoded.codes.flatten(0, 1).double() - (2**bits - 1) / 2
    same = (found == same_mean).all(1)
    assert same.double().mean() > 0.99
    for token in (~same).nonzero().flatten().tolist():
        cosine = torch.cosine_similarity(x[token], found[token], dim=0)
        best = torch.cosine_similarity(x[token], same_mean[token], dim=0)
        assert abs(cosine - best) < 20 * size * EPSILON
    f = encoded.factors.double() * encoded.units.double()[:, None]
    exact = (x.pow(2).sum(1) / (x * found).sum(1)).reshape(2, 128)
    half_step = encoded.units.double()[:, None] / 2
    assert ((f - exact).abs() <= half_step * (1 + 1e-3) + 4 * size * EPSILON * exact).all()
    squares = x.pow(2).sum(1)
    cosine = torch.cosine_similarity(x, found)
    e2 = squares * (1 - cosine**2) / (cosine**2 * (size - 1))
    # e2 is a difference of squares: its error is EPSILON of the minuend, squares / (size - 1), a sum's
    bound = 128 * 4 * size * EPSILON * squares.max() / (size - 1)
    assert (encoded.errors.double() - e2.reshape(2, 128).sum(1)).abs().max() < bound


def reference_codes(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Of rotated residuals, as `signature_reference.encode` has them for zero-mean blocks."""
    pairs = torch.cat([x, -x], 1).reshape(-1, x.shape[1])  # means are exactly 0
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    return reference.encode(pairs, identity, bits).codes[::2]


def test_equal_keys_have_no_residual() -> None:
    keys = torch.full((128, 64), -2.5)
    encoded = blocks.encode_blocks(keys, reference.rotation_signs(64, 0), 2)
    assert encoded.means.eq(-2.5).all()
    assert encoded.factors.eq(0).all()
    assert encoded.units.tolist() == [0.0]
    assert encoded.errors.tolist() == [0.0]


def test_the_largest_factor_of_a_block_fills_sixteen_bits() -> None:
    _, _, encoded = made(64, 2)
    assert encoded.factors.amax(1).tolist() == [blocks.MOST_FACTOR] * 2
    assert encoded.factors.min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_of_all_dtypes_are_read_exactly(dtype: torch.dtype) -> None:
    keys, signs, encoded = made(64, 2)
    small = (keys.float() * 2**-3).to(dtype)
    again = blocks.encode_blocks(small, signs, 2)
    assert torch.equal(again.codes, encoded.codes)
    assert torch.equal(again.factors, encoded.factors)
    assert torch.equal(again.units, encoded.units * 2**-3)


def test_a_block_is_encoded_alike_wherever_it_is() -> None:
    keys, signs, encoded = made(80, 2)
    alone = blocks.encode_blocks(keys[128:], signs, 2)
    assert torch.equal(blocks.pack(alone, 0, 2), blocks.pack(encoded, 1, 2))


@pytest.mark.parametrize("distance", [1, 3])
def test_sums_are_in_order(distance: int) -> None:
    """1 + 2^-24 + 2^-24 is 1 from the left and 1 + 2^-23 from the right."""
    small = torch.tensor([2.0**-24])
    terms = torch.cat([torch.ones(1), small, small]).repeat(distance, 1)
    assert blocks.in_order(terms).tolist() == [1.0] * distance
    assert blocks.in_order(terms.flip(1)).tolist() == [1 + 2.0**-23] * distance


@pytest.mark.parametrize(("head_size", "bits"), SHAPES)
def test_bytes_hold_what_was_encoded(head_size: int, bits: int) -> None:
    _, _, encoded = made(head_size, bits)
    size = encoded.codes.shape[2]
    page = blocks.pack(encoded, 1, bits)
    assert len(page) == blocks.block_bytes(head_size, bits)
    tile = blocks.tile_bytes(head_size, bits)
    of_sum = min(64, size)
    for token in (0, 9, 63, 64, 127):
        at = page[token // 64 * tile :]
        for j in range(0, size, 5):
            plane = (j // of_sum * bits) * (of_sum // 8) + j % of_sum // 8
            u = 0
            for i in range(bits):  # the highest bit first
                byte = at[(plane + i * (of_sum // 8)) * 64 + token % 64]
                u = u << 1 | int(byte) >> j % 8 & 1
            assert u == encoded.codes[1, token, j]
        place = (token % 64 >> 3 & 1) * 32 + token % 64 // 16 * 8 + token % 8
        factors = at[tile - 128 : tile].view(torch.int16)
        assert factors[place] == encoded.factors[1, token]
    header = page[2 * tile :]
    assert torch.equal(header[: 2 * head_size].view(torch.bfloat16), encoded.means[1])
    tail = header[2 * head_size : 2 * head_size + 8].view(torch.float32)
    assert tail.tolist() == [encoded.units[1], encoded.errors[1]]
    assert header[2 * head_size + 8 :].eq(0).all()


def test_sizes_are_the_plans() -> None:
    """2 d bits and 16 for a token, the mean and 8 bytes for a block: 36.5 bytes a token at 128."""
    assert blocks.block_bytes(128, 2) == 4672
    assert blocks.block_bytes(128, 1) == 2624
    assert blocks.block_bytes(64, 2) == 2496
    assert all(blocks.block_bytes(d, b) % 64 == 0 for d in range(16, 257, 8) for b in (1, 2, 4))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_places_are_where_unpacking_puts_tokens(width: int) -> None:
    """unpacklo_epi8 takes the low 8 bytes of each 16, unpackhi_epi8 the high ones."""
    tokens = torch.arange(64).reshape(-1, width // 16, 2, 8)  # registers, lanes, halves
    order = torch.cat([tokens[:, :, half].flatten() for half in (0, 1)])
    assert torch.equal(blocks.place(order), torch.arange(64))
