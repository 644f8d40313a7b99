"""simhash against reference.hash_codes; run by test_triton_simhash.py."""

from __future__ import annotations

import math

import pytest
import torch
from triton_helpers import DEVICE, in_host_memory, synchronize

from vllm_magicpig import reference
from vllm_magicpig.triton_kernels.simhash import pack_directions, sign_margin, simhash


def bits(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[..., L] -> bool [..., L * K], in the order of the hyperplanes' columns."""
    return ((codes[..., None].int() >> torch.arange(num_bits)) & 1).bool().flatten(-2)


def hashed(
    vectors: torch.Tensor,
    directions: torch.Tensor,
    num_bits: int,
    center: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel's codes, int32 [n, heads, L], in host memory, with poison behind them."""
    shape = (*vectors.shape[:2], directions.shape[1] // num_bits)
    poison = torch.full((math.prod(shape) + 1024,), 0xA5A5, dtype=torch.int32)
    memory = in_host_memory(poison.to(torch.uint16))
    codes = memory[: math.prod(shape)].view(shape)
    simhash(
        vectors.to(DEVICE),
        pack_directions(directions, num_bits).to(DEVICE),
        shape[2],
        None if center is None else center.to(DEVICE),
        codes,
    )
    synchronize()
    assert torch.all(memory[codes.numel() :].int() == 0xA5A5), "written past the end"
    return codes.int()


def assert_same_signs(
    found: torch.Tensor,
    vectors: torch.Tensor,
    directions: torch.Tensor,
    num_bits: int,
    center: torch.Tensor | None,
) -> None:
    """Every bit is the reference's, but where the projection is within the margin of zero."""
    centred = vectors.float() if center is None else vectors.float() - center
    expected = reference.hash_codes(centred, directions, num_bits)
    differ = bits(found, num_bits) != bits(expected, num_bits)
    projections = centred.double() @ directions.double()
    doubtful = projections.abs() < sign_margin(vectors, directions, center)
    assert not (differ & ~doubtful).any()
    assert torch.all(found < 1 << num_bits)


@pytest.mark.parametrize(
    ("num_bits", "num_tables", "num_tokens", "num_heads", "head_size", "dtype"),
    [
        (2, 1, 1, 1, 16, torch.float32),
        (4, 7, 15, 3, 64, torch.bfloat16),
        (9, 120, 17, 2, 80, torch.float16),
        (10, 150, 1, 8, 128, torch.bfloat16),
        (10, 150, 1, 40, 128, torch.float32),
        (10, 120, 15, 8, 128, torch.float16),
        (15, 255, 17, 2, 256, torch.bfloat16),
        # More than 256 rows: the large tiles.
        (10, 150, 129, 2, 128, torch.bfloat16),
        (4, 7, 127, 3, 64, torch.float16),
        (9, 33, 129, 2, 256, torch.float32),
        (15, 31, 127, 5, 16, torch.float32),
        (2, 255, 129, 3, 80, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("centred", [False, True])
def test_codes_are_the_references_outside_the_margin(
    num_bits: int,
    num_tables: int,
    num_tokens: int,
    num_heads: int,
    head_size: int,
    dtype: torch.dtype,
    centred: bool,
) -> None:
    generator = torch.Generator().manual_seed(num_tables * num_tokens + head_size)
    directions = reference.hyperplanes(head_size, num_tables, num_bits, seed=num_tables)
    # As attention gives them: keys are a slice of a fused projection, and no token is contiguous.
    qkv = torch.randn(num_tokens, 3 * num_heads, head_size, generator=generator)
    center = 3 * torch.randn(num_heads, head_size, generator=generator) if centred else None
    keys = qkv.to(dtype)[:, num_heads : 2 * num_heads]
    found = hashed(keys, directions, num_bits, center)
    assert_same_signs(found, keys, directions, num_bits, center)


@pytest.mark.parametrize("head_size", [16, 128])
def test_signs_are_right_just_outside_the_margin(head_size: int) -> None:
    """Vectors turned until one projection is a few margins from zero; one bit each is at stake."""
    generator = torch.Generator().manual_seed(head_size)
    num_vectors = 300
    directions = reference.hyperplanes(head_size, num_vectors // 4, 4, seed=1)
    vectors = torch.randn(num_vectors, 1, head_size, generator=generator)
    margin = sign_margin(vectors, directions)[:, 0].diagonal()
    steps = torch.linspace(1.1, 3, num_vectors).double()
    steps[::2] *= -1
    r = directions.double().T
    x = vectors[:, 0].double()
    x += ((steps * margin - (x * r).sum(1)) / (r * r).sum(1))[:, None] * r
    vectors = x.float()[:, None]

    exact = (vectors[:, 0].double() * r).sum(1)
    distance = exact.abs() / sign_margin(vectors, directions)[:, 0].diagonal()
    outside = (distance > 1) & (distance < 8)
    assert outside.sum() > 0.9 * num_vectors, "rounding to float32 undid the construction"
    found = bits(hashed(vectors, directions, 4), 4)[:, 0].diagonal()
    assert torch.equal(found[outside], (exact > 0)[outside])


@pytest.mark.parametrize("exponent", [-140, -100, -30, 30, 100])
def test_codes_do_not_depend_on_the_length_of_a_vector(exponent: int) -> None:
    """A power of two changes no sign, from subnormal numbers to those far beyond fp16."""
    generator = torch.Generator().manual_seed(1)
    # 4 bits a number: they are exact as subnormals too.
    vectors = torch.randint(-7, 8, (5, 2, 32), generator=generator).float()
    directions = reference.hyperplanes(32, 9, 6, seed=2)
    scaled = torch.ldexp(vectors, torch.tensor(exponent))
    assert torch.equal(torch.ldexp(scaled, torch.tensor(-exponent)), vectors)
    assert torch.equal(hashed(scaled, directions, 6), hashed(vectors, directions, 6))


def test_lengths_may_differ_from_row_to_row_and_column_to_column() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([1e-30, 1.0, 0.0, 1e30, 1e-4])[:, None, None]
    vectors = lengths * torch.randn(5, 2, 64, generator=generator)
    vectors[:, :, ::7] *= 2**-18  # subnormal beside the others, were it not for the second piece
    directions = 1e-3 * reference.hyperplanes(64, 20, 5, seed=3)
    found = hashed(vectors, directions, 5)
    assert_same_signs(found, vectors, directions, 5, None)
    assert torch.all(found[2] == 0), "no projection of zero is > 0"


def test_the_signs_of_a_vector_are_its_codes_under_the_axes() -> None:
    axes = torch.eye(16)  # 4 tables of 4 bits
    vectors = torch.zeros(1, 2, 16)
    vectors[0, 0, :6] = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.0, 3.0])
    vectors[0, 1] = -1
    assert hashed(vectors, axes, 4)[0].tolist() == [[0b1001, 0b0010, 0, 0], [0, 0, 0, 0]]


def test_no_vectors_are_a_valid_amount() -> None:
    directions = reference.hyperplanes(16, 3, 2, seed=0)
    assert hashed(torch.zeros(0, 2, 16), directions, 2).shape == (0, 2, 3)
