"""SimHash on the GPU: the margin that its test rests on, its plain twin, and its door."""

from __future__ import annotations

import math

import pytest
import torch
from triton_helpers import run_cases

from vllm_magicpig import reference
from vllm_magicpig.triton_kernels.launch import require_rows, row_strides
from vllm_magicpig.triton_kernels.simhash import (
    pack_directions,
    sign_margin,
    simhash,
    simhash_reference,
)


def test_the_kernel_under_the_interpreter() -> None:
    run_cases("triton_simhash_cases.py", interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU")
def test_the_kernel_on_the_gpu() -> None:
    run_cases("triton_simhash_cases.py", interpreted=False)


@pytest.mark.parametrize("head_size", [16, 64, 128, 256])
def test_the_margin_leaves_few_bits_in_doubt(head_size: int) -> None:
    """A vector in no special direction has a projection that is normal with deviation |x|, and the
    margin is g sum |x_d R_d|, at most g sqrt(D) sqrt(2 / pi) |x| on average: so the share within it
    is 2 g sqrt(D) / pi at most, 7.6e-4 at head size 256.
    """
    generator = torch.Generator().manual_seed(head_size)
    num_vectors, num_columns = 4000, 1008
    vectors = torch.randn(num_vectors, 1, head_size, generator=generator)
    directions = reference.hyperplanes(head_size, num_columns // 8, 8, seed=4)
    relative = head_size * (2**-24 + 2**-22) + 3 * 2**-22
    expected = 2 * relative * math.sqrt(head_size) / math.pi * num_vectors * num_columns
    doubtful = (vectors.double() @ directions.double()).abs() < sign_margin(vectors, directions)
    assert 0.5 * expected < doubtful.sum() < expected + 5 * math.sqrt(expected)


@pytest.mark.parametrize("num_tables", [1, 31, 32, 33, 150, 255])
@pytest.mark.parametrize("num_bits", [2, 10, 15])
def test_planes_hold_the_directions_to_22_bits(num_bits: int, num_tables: int) -> None:
    directions = reference.hyperplanes(24, num_tables, num_bits, seed=5)
    planes = pack_directions(directions, num_bits)
    padded = -(-num_tables // 32) * 32
    assert planes.shape == (2, num_bits, 24, padded)
    assert planes.dtype == torch.float16
    assert torch.all(planes[..., num_tables:] == 0)
    found = planes.double().sum(0)[..., :num_tables].permute(1, 2, 0).flatten(1)
    largest = found.abs().max()
    assert 2**14 <= largest < 2**15
    scale = 2.0 ** round(math.log2((largest / directions.abs().max()).item()))
    error = (found / scale - directions.double()).abs()
    # 2**-22 of the number, or half the spacing of fp16's subnormals.
    assert torch.all(error <= torch.clamp(2**-22 * directions.double().abs(), min=2**-25 / scale))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_plain_twin_gives_the_references_codes(dtype: torch.dtype, centred: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    directions = reference.hyperplanes(64, 40, 9, seed=6)
    keys = torch.randn(130, 3, 128, generator=generator).to(dtype)[..., 64:]
    center = torch.randn(3, 64, generator=generator) if centred else None
    codes = torch.full((130, 3, 40), 0xA5, dtype=torch.int32).to(torch.uint16)
    simhash_reference(keys, pack_directions(directions, 9), 40, center, codes)
    x = keys.float() if center is None else keys.float() - center
    differ = codes.int() ^ reference.hash_codes(x, directions, 9)
    doubtful = (x.double() @ directions.double()).abs() < sign_margin(keys, directions, center)
    # A table with no bit in doubt has an equal code.
    assert not (differ.bool() & ~doubtful.unflatten(-1, (40, 9)).any(-1)).any()
    assert differ.count_nonzero() <= doubtful.count_nonzero()


def arguments() -> dict[str, object]:
    return {
        "vectors": torch.zeros(3, 2, 16),
        "planes": pack_directions(reference.hyperplanes(16, 5, 4, seed=0), 4),
        "num_tables": 5,
        "center": torch.zeros(2, 16),
        "codes": torch.zeros(3, 2, 5, dtype=torch.uint16),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vectors", torch.zeros(3, 2, 16, dtype=torch.float64), "vectors is torch.float64"),
        ("vectors", torch.zeros(3, 32), "vectors has shape"),
        ("vectors", torch.zeros(3, 2, 20), "multiple of 8"),
        ("vectors", torch.zeros(3, 2, 264), "16 to 256"),
        ("vectors", torch.zeros(3, 2, 32)[:, :, ::2], "contiguous"),
        ("vectors", torch.zeros(3, 2, 20)[:, :, :16], "multiples of 8 elements apart"),
        ("vectors", torch.zeros(3, 36)[:, :32].view(3, 2, 16), "multiples of 8 elements apart"),
        ("vectors", torch.zeros(97)[1:].view(3, 2, 16), "aligned to 16 bytes"),
        ("vectors", torch.zeros(3, 2, 24), "planes is torch.float16"),
        ("planes", torch.zeros(2, 4, 16, 32), "planes is torch.float32"),
        ("planes", torch.zeros(2, 17, 16, 32, dtype=torch.float16), "K from 2 to 15"),
        ("num_tables", 33, "planes is torch.float16"),
        ("num_tables", 0, "num_tables is 0"),
        ("num_tables", 256, "num_tables is 256"),
        ("center", torch.zeros(1, 16), "center is torch.float32"),
        ("center", torch.zeros(2, 16, dtype=torch.bfloat16), "center is torch.bfloat16"),
        ("codes", torch.zeros(3, 2, 5, dtype=torch.int16), "codes is torch.int16"),
        ("codes", torch.zeros(3, 5, 2, dtype=torch.uint16).mT, "contiguous"),
    ],
)
@pytest.mark.parametrize("function", [simhash, simhash_reference])
def test_wrong_arguments_are_refused(function, name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{**arguments(), name: value})


def test_the_stride_of_one_token_or_one_head_means_nothing() -> None:
    """PyTorch leaves it to chance."""
    one = torch.as_strided(torch.zeros(64), (1, 1, 16), (1, 3, 1))
    require_rows("vectors", one)
    assert row_strides(one) == (0, 0)
    assert row_strides(torch.zeros(3, 6, 32)[:, ::2, :16]) == (24, 8)


@pytest.mark.parametrize(
    ("directions", "num_bits"),
    [
        (torch.zeros(16, 12, dtype=torch.float64), 4),
        (torch.zeros(16, 12), 5),
        (torch.zeros(16, 17), 17),
        (torch.zeros(16, 12), 0),
    ],
)
def test_wrong_directions_are_refused(directions: torch.Tensor, num_bits: int) -> None:
    with pytest.raises(ValueError, match=r"directions are .* pass what reference\.hyperplanes"):
        pack_directions(directions, num_bits)


def test_a_launch_without_a_gpu_says_so() -> None:
    with pytest.raises(ValueError, match=r"simhash_kernel got tensors on cpu, .* CUDA device"):
        simhash(**arguments())
