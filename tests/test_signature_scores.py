"""Integer scores: within a derived distance of the formulas, and never beyond their formats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from signature_worlds import world

from vllm_magicpig import signature_blocks as blocks
from vllm_magicpig import signature_reference as reference
from vllm_magicpig import signature_scores as integers

SHAPES = [(16, 2), (24, 1), (64, 4), (80, 2), (128, 2), (256, 1), (256, 2)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores_of(
    table: integers.Tables,
    encoded: blocks.EncodedBlocks,
    bits: int,
    b: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    sums = integers.table_sums(table, encoded, bits)
    return integers.scores(sums, table.units * b, encoded, bits)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([16, 32, 64, 128, 256]),
    st.integers(0, 2**32),
    st.floats(-6, 6),
    st.sampled_from(["normal", "one", "equal", "two sizes"]),
)
def test_no_sum_leaves_eight_bits(size: int, seed: int, log_size: float, kind: str) -> None:
    """Whatever the query: the largest entries of 64 dimensions add up to 127 at most."""
    q = normal(1, size, seed=seed)
    if kind == "one":
        q *= torch.arange(size) == seed % size
    elif kind == "equal":
        q = q.sign()
    elif kind == "two sizes":
        q[:, ::3] *= 1e-3
    signs = torch.ones(2, size, dtype=torch.int8)
    table = integers.tables(10**log_size * q, signs)
    most = table.entries.int().abs().amax(2).reshape(-1, min(16, size // 4)).sum(1)
    assert most.max() <= 127
    assert most.max() >= 100  # and the bits are used


def test_entries_are_signed_sums() -> None:
    q = normal(3, 128)
    signs = reference.rotation_signs(128, 1)
    table = integers.tables(q, signs)
    rotated = blocks.rotate(q, signs).double()
    for nibble in (0, 17, 31):
        for v in range(16):
            sign = torch.tensor([1.0 if v >> i & 1 else -1.0 for i in range(4)]).double()
            exact = rotated[:, 4 * nibble : 4 * nibble + 4] @ sign / table.units
            assert (table.entries[:, nibble, v] - exact).abs().max() < 0.5001
    assert torch.equal(table.entries.flip(2), -table.entries)
    zero = integers.tables(torch.zeros(1, 128), signs)
    assert zero.entries.eq(0).all()


@pytest.mark.parametrize(("head_size", "bits"), SHAPES)
@pytest.mark.parametrize("gain", [0.3, 3.0, 30.0])
def test_scores_are_the_formulas_within_their_rounding(
    head_size: int, bits: int, gain: float
) -> None:
    """Entries are off by 1/2 unit, nibbles times planes of them; F by 1/2, the multiplier by 1/2 of
    32,768, and both products are rounded."""
    w = world(256, head_size, gain=gain)
    signs = reference.rotation_signs(head_size, 2)
    encoded = blocks.encode_blocks(w.keys.float(), signs, bits)
    queries = integers.query_units(w.queries.float(), 1.0)
    table = integers.tables(queries, signs)
    found = scores_of(table, encoded, bits).double()
    codes = encoded.codes.flatten(0, 1).double() - (2**bits - 1) / 2
    f = (encoded.factors.double() * encoded.units.double()[:, None]).flatten()
    rotated = queries.double() @ reference.rotation(head_size, 2).T
    exact = rotated @ codes.T * f
    size = codes.shape[1]
    units = table.units.double()[:, None]
    of_entries = 0.5 * size / 4 * (2**bits - 1) / 2 * units * f
    shift = integers.sum_shift(size, bits)
    _, exponent = integers.multipliers(table.units, encoded.units, shift)
    coarse = 2.0 ** exponent.repeat_interleave(128, 1)
    # sum << shift is below 2^15: 1 of mulhrs(F, multiplier) and 1/2 each of multiplier and product
    of_products = coarse * (1 + 0.5 + 0.5)
    slack = 1 + 1e-5  # float32
    assert ((found - exact).abs() <= (of_entries + of_products) * slack).all()
    # and on average far nearer: the errors of 8 p entries are uniform and independent; they count as
    # half as many, since the units of the four heads differ
    planes = sum(4.0**bit for bit in range(bits))
    rms = (size / 4 * planes / 12) ** 0.5 / 2 * units * f
    spread = 1 + 5 * (0.8 / (4 * size)) ** 0.5
    assert (found - exact).pow(2).mean() < spread * (rms.pow(2) + coarse**2 / 4).mean()


@pytest.mark.parametrize(("head_size", "bits"), [(64, 2), (128, 2), (128, 1), (64, 4)])
def test_eight_bits_cost_little_of_the_scores_precision(head_size: int, bits: int) -> None:
    """The error of the codes themselves grows by less than 3 % at 1 and 2 bits, 30 % at 4."""
    w = world(1024, head_size)
    signs = reference.rotation_signs(head_size, 2)
    encoded = blocks.encode_blocks(w.keys.float(), signs, bits)
    table = integers.tables(integers.query_units(w.queries.float(), 1.0), signs)
    found = scores_of(table, encoded, bits) / integers.UNITS
    signatures, R = w.encoded(bits, 2)
    base, residual = reference.scores(w.queries, signatures, R)
    true = w.logits - base
    rms = [(x - true).pow(2).mean().sqrt() for x in (found, residual)]
    assert rms[0] < (1.03 if bits < 4 else 1.3) * rms[1]


def test_huge_queries_saturate_in_order() -> None:
    """Scores of 2^15 units and more stop there; the sign stays, and no sum wraps."""
    w = world(256)
    signs = reference.rotation_signs(64, 0)
    encoded = blocks.encode_blocks(w.keys.float(), signs, 2)
    queries = integers.query_units(w.queries.float(), 1.0)
    small = scores_of(integers.tables(queries, signs), encoded, 2)
    for times in (50.0, 1e3, 1e6):
        large = scores_of(integers.tables(times * queries, signs), encoded, 2)
        assert large.abs().max() == 32767
        clear = small.abs() > 20
        assert torch.equal(large.sign()[clear], small.sign()[clear])
        assert large[0, small[0].argmax()] == large[0].max()


def test_sums_fill_sixteen_bits() -> None:
    for size in (16, 32, 64, 128, 256):
        for bits in (1, 2, 4):
            most = 127 * (2**bits - 1) * max(1, size // 64)
            shift = integers.sum_shift(size, bits)
            assert most << shift <= 32767 < most << shift + 1


def test_shrinkage_scales_scores() -> None:
    w = world(256)
    signs = reference.rotation_signs(64, 0)
    encoded = blocks.encode_blocks(w.keys.float(), signs, 2)
    table = integers.tables(integers.query_units(w.queries.float(), 1.0), signs)
    b = torch.tensor([1.0, 0.9, 0.5, 0.3])
    full, found = (scores_of(table, encoded, 2, x) for x in (1.0, b))
    assert torch.equal(found[0], full[0])
    assert (found - b[:, None] * full).abs().max() <= 3


@pytest.mark.parametrize("head_size", [16, 24, 80, 128])
def test_dot_has_sixteen_partial_sums(head_size: int) -> None:
    a, b = normal(3, head_size), normal(5, head_size, seed=1)
    found = integers.dot(a, b)
    torch.testing.assert_close(found, a @ b.T, rtol=1e-5, atol=1e-5)
    partial = [0.0] * 16
    for j in range(head_size):
        product = a[1, j] * b[2, j]
        partial[j % 16] = product if j < 16 else partial[j % 16] + product
    while len(partial) > 1:
        half = len(partial) // 2
        partial = [x + y for x, y in zip(partial[:half], partial[half:], strict=True)]
    assert found[1, 2] == partial[0]


def test_rounding_of_products_is_vpmulhrsw() -> None:
    a = torch.tensor([32767, -32767, 3, -3, 16384, -16384])
    b = torch.tensor([32767, 32767, 16384, 16384, 1, 1])
    # 1.5 rounds to 2, -1.5 to -1, and so do halves of one
    assert integers.mulhrs(a, b).tolist() == [32766, -32766, 2, -1, 1, 0]


def test_powers_and_logarithms_are_inverse_within_two_units() -> None:
    units = -torch.arange(16000)
    x = integers.power(units)
    torch.testing.assert_close(x.double(), 2.0 ** (units.double() / 128), rtol=1e-6, atol=0)
    assert (integers.log2_units(x) - units).abs().max() <= 2
    assert integers.power(torch.tensor([integers.LEAST_POWER - 1])).item() == 0
    assert integers.log2_units(torch.tensor([1.0])).abs() <= 1


def test_sums_of_powers_are_linear_between_powers_of_two() -> None:
    """1 + f for 2^f, 6.2 % too much at most; the bits are those of a bfloat16."""
    for units in range(-400, 1, 7):
        found = integers.sum_of_powers(torch.tensor([[units]])).item()
        whole, rest = units // 128, units % 128
        assert found == pytest.approx(2.0**whole * (1 + rest / 128), abs=1e-30)
    many = -torch.arange(1000)[None] * 3
    exact = (2.0 ** (many.double() / 128)).sum().item()
    found = integers.sum_of_powers(many).item()
    assert 1 < found / exact < 1.0616
    excess = 1 / (2 * math.log(2) ** 2)
    assert found / exact == pytest.approx(excess, rel=0.01)
