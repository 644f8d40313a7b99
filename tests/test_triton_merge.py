"""Merging by LSE: the kernel, and the door of its launcher."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import run_cases

from vllm_magicpig.triton_kernels.merge import merge_into


def test_the_kernel_under_the_interpreter() -> None:
    run_cases("triton_merge_cases.py", interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU")
def test_the_kernel_on_the_gpu() -> None:
    run_cases("triton_merge_cases.py", interpreted=False)


def arguments() -> dict[str, torch.Tensor]:
    return {
        "out": torch.zeros(3, 2, 16),
        "lse": torch.zeros(2, 3),
        "part": torch.zeros(3, 2, 16),
        "part_lse": torch.zeros(2, 3),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("out", torch.zeros(3, 2, 16, dtype=torch.bfloat16), "out must be float32"),
        ("part", torch.zeros(2, 2, 16), "both of one shape"),
        ("part", torch.zeros(3, 2, 16, dtype=torch.int32), "part is torch.int32"),
        ("lse", torch.zeros(3, 2), "lse is torch.float32 of shape"),
        ("part_lse", torch.zeros(3, 2).t(), "part_lse is torch.float32 of shape"),
        ("lse", torch.zeros(2, 3, dtype=torch.float64), "lse is torch.float64"),
    ],
)
def test_wrong_arguments_are_named(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_into(**arguments() | {name: value})


def test_a_launch_without_a_gpu_says_so() -> None:
    with pytest.raises(ValueError, match="runs on a CUDA device"):
        merge_into(**arguments())
