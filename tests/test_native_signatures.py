"""Native signatures against signature_blocks.py: byte for byte, on every instruction set."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from native_helpers import each_isa, pool, row_bits
from signature_worlds import world

from vllm_magicpig import _C, signature_reference
from vllm_magicpig.signature_blocks import encode_blocks, pack, rotate, sum16

SHAPES = [(16, 2), (24, 1), (64, 2), (64, 4), (72, 2), (80, 2), (128, 1), (128, 2), (256, 2)]


def check(keys: torch.Tensor, bits: int, isa: _C.Isa, native: ModuleType = _C) -> None:
    signs = signature_reference.rotation_signs(keys.shape[1], 7)
    name = str(keys.dtype).removeprefix("torch.")
    threads = pool(2, native)
    found = native.encode_signatures(row_bits(keys), name, signs.numpy(), bits, isa, threads)
    encoded = encode_blocks(keys, signs, bits)
    for block in range(len(keys) // 128):
        np.testing.assert_array_equal(found[block], pack(encoded, block, bits).numpy())


@each_isa
@pytest.mark.parametrize(("head_size", "bits"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_are_the_references(
    isa: _C.Isa, head_size: int, bits: int, dtype: torch.dtype
) -> None:
    check(world(256, head_size, seed=bits).keys.to(dtype), bits, isa)


@each_isa
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_equal_keys_zeros_and_outliers(isa: _C.Isa, bits: int) -> None:
    keys = torch.full((512, 64), 1.5)
    keys[128:256] = 0
    keys[256:384] = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    keys[300] *= 1e4  # its factor is the block's largest, the others' are small
    keys[384:, ::2] = 0
    keys[400, 1] = -3.0
    check(keys, bits, isa)


@each_isa
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("scale", [1e-23, 1e-22, 1e-19, 1e16])
def test_tiny_and_huge_keys(isa: _C.Isa, bits: int, scale: float) -> None:
    """Squares that are 0, not normal or large; a root mean square of 0 makes the inverse infinite."""
    check((world(128, 128).keys * scale).float(), bits, isa)


@each_isa
@pytest.mark.parametrize("step_factor", signature_reference.STEP_FACTORS)
def test_sizes_at_the_boundary_of_levels(isa: _C.Isa, step_factor: float) -> None:
    """Many sizes are one step but for rounding: the next float has another level."""
    keys = boundary_keys(step_factor)
    signs = signature_reference.rotation_signs(128, 7)
    sizes = rotate(keys, signs).abs()
    rms = (sum16(sizes * sizes) / 128).sqrt()
    step = torch.tensor(signature_reference.QUANTISER_STEP[2] * step_factor, dtype=torch.float32)
    inverse = (1 / (rms * step))[:, None]
    below = torch.nextafter(sizes, torch.zeros(1))
    first = (sizes * inverse >= 1) & (below * inverse < 1)
    last = (sizes * inverse < 1) & (torch.nextafter(sizes, 2 * sizes) * inverse >= 1)
    assert first.sum() > 100 < last.sum()
    check(keys, 2, isa)


def boundary_keys(step_factor: float) -> torch.Tensor:
    """float32 [256, 128], every other key the negative of the one before: the means are 0."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(128, 128, generator=generator, dtype=torch.float64)
    step = signature_reference.QUANTISER_STEP[2] * step_factor
    rest = y[:, 32:].square().sum(1)
    y[:, :32] = y[:, :32].sign() * (step * (rest / (128 - 32 * step**2)).sqrt())[:, None]
    keys = y @ signature_reference.rotation(128, 7)
    return torch.stack([keys, -keys], 1).reshape(256, 128).float()


@each_isa
def test_wild_keys_leave_other_blocks_alone(isa: _C.Isa) -> None:
    keys = world(384).keys.float()
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45])
    keys[128:256] = wild.repeat(128 * 64 // 6 + 1)[: 128 * 64].reshape(128, 64)
    signs = signature_reference.rotation_signs(64, 7)
    found = _C.encode_signatures(keys.numpy(), "float32", signs.numpy(), 2, isa, pool())
    encoded = encode_blocks(keys, signs, 2)
    for block in (0, 2):
        np.testing.assert_array_equal(found[block], pack(encoded, block, 2).numpy())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"keys": np.zeros((100, 64), np.float32)}, "keys are of 100 tokens, but blocks of 128"),
        ({"keys": np.zeros((128, 60), np.float32)}, "head_size is 60"),
        ({"keys": np.zeros((128, 64), np.float64)}, "keys is float64"),
        ({"row_dtype": "int8"}, 'row_dtype is "int8"'),
        ({"row_dtype": "bfloat16"}, "keys is float32, but uint16 is needed"),
        ({"bits": 3}, "bits is 3, but must be 1, 2 or 4"),
        ({"signs": np.ones((2, 32), np.int8)}, "signs has shape"),
        ({"signs": np.zeros((2, 64), np.int8)}, "signs holds 0"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(changed: dict, words: str) -> None:
    arguments = {
        "keys": np.zeros((128, 64), np.float32),
        "row_dtype": "float32",
        "signs": np.ones((2, 64), np.int8),
        "bits": 2,
        "isa": _C.Isa.portable,
        "pool": pool(),
    }
    assert _C.encode_signatures(**arguments).shape == (1, 2496)
    with pytest.raises(ValueError, match=words):
        _C.encode_signatures(**{**arguments, **changed})
