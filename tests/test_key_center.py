"""Where a key centre comes from, and its calibration file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_magicpig.key_center import (
    KeyCenter,
    check_centers,
    load_centers,
    save_centers,
)


def observed(*chunks: torch.Tensor) -> tuple[KeyCenter, bool]:
    """chunks: [num_tokens, 2 kv heads, 16]."""
    center = KeyCenter("passage", layer_index=3, first_kv_head=0, num_kv_heads=2)
    center.prepare(head_size=16)
    assert center.value is None
    for chunk in chunks:
        center.observe(chunk)
    return center, center.fix(head_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_passage_gives_the_mean_of_its_keys(dtype: torch.dtype) -> None:
    """Of large keys too, whose sum a float16 or bfloat16 cannot hold."""
    keys = (torch.randn(512, 2, 16) + 900).to(dtype)
    center, is_finite = observed(*keys.split(100))
    assert is_finite
    assert center.is_nonzero
    assert center.value is not None
    assert center.value.dtype == torch.float32
    assert torch.allclose(center.value.double(), keys.double().mean(0), rtol=2**-23, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_keys_that_are_not_finite_give_no_centre(bad: float) -> None:
    keys = torch.randn(512, 2, 16)
    keys[200, 1, 3] = bad
    center, is_finite = observed(*keys.split(256))
    assert not is_finite
    assert not center.is_nonzero
    assert torch.equal(center.value, torch.zeros(2, 16))  # type: ignore[arg-type]


def test_without_any_keys_there_is_no_centre() -> None:
    """As in a model that generates nothing."""
    center, is_finite = observed()
    assert not is_finite
    assert torch.equal(center.value, torch.zeros(2, 16))  # type: ignore[arg-type]


def test_none_is_zero_from_the_start() -> None:
    center = KeyCenter("none", 0, 0, 2)
    center.prepare(8)
    assert torch.equal(center.value, torch.zeros(2, 8))  # type: ignore[arg-type]


def test_a_file_gives_each_rank_its_heads(tmp_path: Path) -> None:
    path = tmp_path / "centers.safetensors"
    saved = {1: torch.randn(4, 8), 17: torch.randn(4, 8)}
    save_centers(path, saved)
    loaded = load_centers(path)
    assert sorted(loaded) == [1, 17]
    assert torch.equal(loaded[17], saved[17])
    rank_1 = KeyCenter(str(path), layer_index=17, first_kv_head=2, num_kv_heads=2)
    rank_1.prepare(8)
    assert torch.equal(rank_1.value, saved[17][2:])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer_index", "first", "head_size", "message"),
    [
        (2, 0, 8, "has no centre for layer 2"),
        (1, 3, 8, "has 4 kv heads for layer 1, but kv heads 3 to 4 are needed"),
        (1, 0, 16, "has head size 8, but the model has 16"),
    ],
)
def test_a_file_of_another_model_is_refused(
    tmp_path: Path, layer_index: int, first: int, head_size: int, message: str
) -> None:
    path = tmp_path / "centers.safetensors"
    save_centers(path, {1: torch.zeros(4, 8)})
    with pytest.raises(ValueError, match=message):
        KeyCenter(str(path), layer_index, first, 2).prepare(head_size)


@pytest.mark.parametrize(
    ("about", "num_layers", "num_kv_heads", "message"),
    [
        ({"num_layers": "32"}, 28, 4, "has a model of 32 layers, but the model has 28"),
        ({}, 17, 4, "has a centre for layer 17, but the model has layers 0 to 16"),
        ({}, 18, 2, "has 4 kv heads, but the model has 2"),
        ({"num_layers": "18"}, 18, 8, "has 4 kv heads, but the model has 8"),
    ],
)
def test_a_start_with_a_file_of_another_model_is_refused(
    tmp_path: Path, about: dict[str, str], num_layers: int, num_kv_heads: int, message: str
) -> None:
    path = tmp_path / "centers.safetensors"
    save_centers(path, {1: torch.zeros(4, 8), 17: torch.zeros(4, 8)}, about)
    with pytest.raises(ValueError, match=message):
        check_centers(path, num_layers, num_kv_heads)
    check_centers(path, int(about.get("num_layers", 18)), 4)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "centers.txt"
    path.write_text("no tensors here")
    with pytest.raises(ValueError, match="is no calibration file of magicpig"):
        load_centers(path)
