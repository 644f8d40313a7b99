"""Rows and codes through unified addressing: the kernels, and the doors of their launchers."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import run_cases

from vllm_magicpig.triton_kernels.host_pages import (
    gather_pages,
    gather_pages_reference,
    store_pages,
    store_pages_reference,
)


def test_the_kernels_under_the_interpreter() -> None:
    run_cases("triton_pages_cases.py", interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU")
def test_the_kernels_on_the_gpu() -> None:
    run_cases("triton_pages_cases.py", interpreted=False)


def store_arguments() -> dict[str, object]:
    return {
        "key": torch.zeros(3, 2, 16),
        "value": torch.zeros(3, 2, 16),
        "codes": torch.zeros(3, 2, 5, dtype=torch.uint16),
        "slots": torch.arange(3),
        "pages": torch.zeros(4, 2, 32 * 2 * 16 + 32 * 5 // 2),
        "block_size": 32,
    }


def gather_arguments() -> dict[str, object]:
    return {
        "pages": torch.zeros(4, 2, 32 * 2 * 16),
        "block_table": torch.zeros(2, dtype=torch.int32),
        "start": 30,
        "stop": 33,
        "keys_out": torch.zeros(3, 2, 16),
        "values_out": torch.zeros(3, 2, 16),
        "block_size": 32,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key", torch.zeros(3, 2, 16, dtype=torch.int32), "key is torch.int32"),
        ("key", torch.zeros(3, 2, 12), "key has shape"),
        ("key", torch.zeros(3, 16, 2).mT, "contiguously"),
        ("key", torch.zeros(3, 2, 20)[:, :, :16], "multiples of 8 elements apart"),
        ("value", torch.zeros(97)[1:].view(3, 2, 16), "aligned to 16 bytes"),
        ("value", torch.zeros(3, 1, 16), "must be like key"),
        ("value", torch.zeros(3, 2, 16, dtype=torch.bfloat16), "must be like key"),
        ("codes", torch.zeros(3, 2, 5, dtype=torch.int16), "codes is torch.int16"),
        ("codes", torch.zeros(2, 2, 5, dtype=torch.uint16), "codes is torch.uint16 of shape"),
        ("slots", torch.zeros(3, dtype=torch.int32), "slots is torch.int32"),
        ("slots", torch.zeros(4, dtype=torch.int64), "slots is torch.int64 of shape"),
        ("pages", torch.zeros(4, 2, 2048, dtype=torch.bfloat16), "pages are torch.bfloat16"),
        ("pages", torch.zeros(4, 1, 2048), "2 kv heads"),
        ("pages", torch.zeros(4, 2, 32 * 2 * 16 + 79), "at least 4416 bytes"),
        ("pages", torch.zeros(4, 2, 2048)[:, :, ::2], "strides"),
        ("block_size", 48, "block_size is 48"),
        ("block_size", 0, "block_size is 0"),
    ],
)
@pytest.mark.parametrize("function", [store_pages, store_pages_reference])
def test_wrong_rows_are_refused(function, name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{**store_arguments(), name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keys_out", torch.zeros(3, 2, 16, dtype=torch.bfloat16), "values_out is torch.float32"),
        ("keys_out", torch.zeros(3, 16, 2).mT, "contiguously"),
        ("values_out", torch.zeros(2, 2, 16), "must be like keys_out"),
        ("pages", torch.zeros(4, 2, 1023), "at least 4096 bytes"),
        ("block_table", torch.zeros(2, dtype=torch.int64), "block_table is torch.int64"),
        ("block_table", torch.zeros(1, dtype=torch.int32), "block table of 32 tokens"),
        ("start", -1, "rows -1 to 33"),
        ("start", 34, "rows 34 to 33"),
        ("stop", 34, "holds 3"),
        ("block_size", 16, "block_size is 16"),
    ],
)
@pytest.mark.parametrize("function", [gather_pages, gather_pages_reference])
def test_wrong_pieces_are_refused(function, name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{**gather_arguments(), name: value})


def test_a_launch_without_a_gpu_says_so() -> None:
    with pytest.raises(ValueError, match=r"store_pages_kernel got tensors on cpu, .* CUDA device"):
        store_pages(**store_arguments())
    with pytest.raises(ValueError, match=r"gather_pages_kernel got tensors on cpu, .* CUDA device"):
        gather_pages(**gather_arguments())
