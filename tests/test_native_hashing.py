"""pack_codes and InclusionTable against reference.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_helpers import each_isa, inclusion_table, pool

from vllm_magicpig import _C, reference


def packed_by_reference(projections: torch.Tensor, num_bits: int) -> np.ndarray:
    """reference.hash_codes with the identity as directions: the projections are the vectors."""
    return reference.hash_codes(projections, torch.eye(projections.shape[1]), num_bits).numpy()


@each_isa
@pytest.mark.parametrize("num_bits", range(1, 16))
@pytest.mark.parametrize("num_tables", [1, 7, 150, 255])
def test_packs_the_bits_of_the_reference(isa: _C.Isa, num_bits: int, num_tables: int) -> None:
    generator = torch.Generator().manual_seed(num_bits)
    for num_rows in (0, 1, 3, 67):
        x = torch.randn(num_rows, num_tables * num_bits, generator=generator)
        codes = _C.pack_codes(x.numpy(), num_bits, isa, pool())
        assert codes.dtype == np.uint16
        signs = (x > 0).reshape(num_rows, num_tables, num_bits).numpy()
        expected = (signs << np.arange(num_bits)).sum(-1)
        np.testing.assert_array_equal(codes, expected)
    if num_tables == 7:  # the identity grows with the square of K L
        np.testing.assert_array_equal(codes, packed_by_reference(x, num_bits))


@each_isa
def test_the_same_projections_give_the_codes_of_the_reference(isa: _C.Isa) -> None:
    vectors = torch.randn(50, 80, generator=torch.Generator().manual_seed(1))
    directions = reference.hyperplanes(80, 33, 9, seed=2)
    codes = _C.pack_codes((vectors @ directions).numpy(), 9, isa, pool())
    np.testing.assert_array_equal(codes, reference.hash_codes(vectors, directions, 9).numpy())


@each_isa
def test_only_a_positive_number_sets_a_bit(isa: _C.Isa) -> None:
    x = np.array([[0.0, -0.0, math.nan, 1e-45, -1e-45, math.inf, -math.inf, 1.0] * 3], np.float32)
    codes = _C.pack_codes(x, 8, isa, pool())
    assert codes.tolist() == [[0b10101000] * 3]


SETTINGS = [
    (10, 150, 2),
    (9, 120, 2),
    (8, 75, 2),
    (10, 150, 1),
    (10, 150, 4),
    (15, 255, 2),
    (2, 255, 170),
    (3, 20, 20),
]


@each_isa
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_log_u_is_within_1e_5_of_the_reference(
    isa: _C.Isa, setting: tuple[int, int, int], fraction: float
) -> None:
    check_log_u(inclusion_table(*setting[:2]), isa, setting, fraction)


def check_log_u(
    table: _C.InclusionTable, isa: _C.Isa, setting: tuple[int, int, int], fraction: float = 1.0
) -> None:
    """Of max(1, |log u|), over all cosines: a fine grid, and finer towards both ends. The error of p
    itself comes in t K / p times: cpu_kernels/inclusion_table.cpp."""
    near_one = 1 - np.logspace(-7.2, -2, 2000)
    cosine = np.concatenate([np.linspace(-1, 1, 20001), near_one, -near_one, [0.0, -0.0]])
    cosine = cosine.astype(np.float32)
    found = table.log_u(cosine, setting[2], fraction, isa)
    p = 1 - torch.arccos(torch.from_numpy(cosine).double()) / math.pi
    expected = reference.log_mixed_inclusion_probability(p, *setting, fraction).numpy()
    error = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    worst = error.argmax()
    bound = max(1e-5, 1.2e-7 * setting[0] * setting[2])
    assert error[worst] < bound, (cosine[worst], found[worst], expected[worst])


@each_isa
def test_log_u_stays_in_its_table_for_any_cosine(isa: _C.Isa) -> None:
    table = inclusion_table(10, 150)
    floor = reference.LOG_U_FLOOR
    cosine = np.array([1, -1, 1.5, -1.5, math.inf, -math.inf], np.float32)
    assert table.log_u(cosine, 2, 1.0, isa).tolist() == pytest.approx([0, floor] * 3)
    table.log_u(np.full(9, math.nan, np.float32), 2, 1.0, isa)


@each_isa
def test_ragged_lengths_are_cut_from_one_result(isa: _C.Isa) -> None:
    table = inclusion_table(10, 150)
    cosine = np.linspace(-0.9, 0.9, 223, dtype=np.float32)
    whole = table.log_u(cosine, 2, 1.0, isa)
    for size in (0, 1, 7, 8, 9, 15, 17, 127, 128, 129):
        np.testing.assert_array_equal(table.log_u(cosine[:size].copy(), 2, 1.0, isa), whole[:size])


@each_isa
@pytest.mark.parametrize("setting", [(10, 150), (15, 3), (9, 129), (2, 255)], ids=str)
@pytest.mark.parametrize("head_size", [16, 72, 128, 136, 256])
def test_transforms_hash_as_the_hyperplanes_do(
    isa: _C.Isa, head_size: int, setting: tuple[int, int]
) -> None:
    """Bit for bit, but where a projection is within its rounding of zero: each of 4 log2(size) stages,
    all of them rotations but for their scale, rounds by at most 2**-24 of the vector's norm."""
    num_bits, num_tables = setting
    plane = (head_size, num_tables, num_bits, 7)
    signs = reference.hadamard_signs(*plane)
    size = signs.shape[1]
    simhash = _C.SimHash(signs.numpy(), head_size, num_bits, num_tables)
    generator = torch.Generator().manual_seed(head_size)
    vectors = torch.randn(37, 3, head_size, generator=generator)
    vectors[0] = 0
    center = torch.randn(3, head_size, generator=generator)
    directions = reference.hyperplanes(*plane)
    for mean in (None, center):
        codes = simhash.hash(
            vectors.numpy(), None if mean is None else mean.numpy(), isa, pool()
        ).astype(np.int64)
        x = vectors if mean is None else vectors - mean
        projections = x.double() @ directions.double()
        expected = (projections > 0).numpy()
        found = (codes[..., None] >> np.arange(num_bits) & 1).astype(bool).reshape(expected.shape)
        # `directions` are the transforms over size: the same units.
        norms = x.double().norm(dim=-1, keepdim=True)
        margin = 4 * math.log2(size) * 2**-24 * size * norms
        doubtful = (projections.abs() <= margin).numpy()
        assert doubtful[1:].mean() < 1e-3
        np.testing.assert_array_equal(found | doubtful, expected | doubtful)


@each_isa
def test_any_number_of_vectors_hashes_alike(isa: _C.Isa) -> None:
    """Whole tasks and lanes or not; each vector with the centre of its own head."""
    signs = reference.hadamard_signs(24, 40, 4, seed=1).numpy()
    simhash = _C.SimHash(signs, 24, 4, 40)
    vectors = np.random.default_rng(0).normal(size=(700, 3, 24)).astype(np.float32)
    center = np.random.default_rng(1).normal(size=(3, 24)).astype(np.float32)
    whole = simhash.hash(vectors, center, isa, pool())
    for n in (0, 1, 5, 6, 11, 341, 342, 700):
        np.testing.assert_array_equal(
            simhash.hash(vectors[:n].copy(), center, isa, pool()), whole[:n]
        )
    np.testing.assert_array_equal(simhash.hash(vectors - center, None, isa, pool()), whole)
