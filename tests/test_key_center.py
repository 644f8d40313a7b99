"""When a key centre exists, and its calibration file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_magicpig.key_center import (
    MIN_KEYS,
    KeyCenter,
    check_centers,
    load_centers,
    save_centers,
)


def test_the_first_prompt_gives_the_mean_of_its_keys() -> None:
    center = KeyCenter("first_prompt", layer_index=3, first_kv_head=0, num_kv_heads=2)
    center.prepare(head_size=16)
    assert center.value is None
    keys = torch.randn(2, MIN_KEYS, 16, dtype=torch.float64) + 7
    center.freeze(keys)
    assert center.value is not None
    assert center.value.dtype == torch.float32
    assert torch.allclose(center.value.double(), keys.mean(1), atol=1e-6)


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
