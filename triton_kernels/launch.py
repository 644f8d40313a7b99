"""What the launchers share: a launch as data, so that it can be compiled where there is no GPU.

Triton compiles a kernel anew for arguments that differ in type, in whether they are 1, or in whether a
pointer or number is a multiple of 16. A server must not compile while it serves, so nothing that
changes from step to step may differ in these: lengths, strides of views and pointers into the middle
of a tensor are declared `do_not_specialize` or `do_not_specialize_on_alignment`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime import JITFunction

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

STRIDE_UNIT = 8
"""Elements. Kernels take the strides of rows in such units: from their product with 8 Triton knows that
rows can be moved 16 bytes at a time, without compiling for this very stride."""

_ROW_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Launch:
    """A Triton kernel, its grid, and its arguments by name, options such as num_warps included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Enqueues the kernel on the current stream of `device`.

        Raises ValueError for a device that is no GPU, unless Triton's interpreter runs the kernel.
        """
        if device.type != "cuda" and isinstance(self.kernel, JITFunction):
            raise ValueError(
                f"{self.kernel.__name__.strip('_')} got tensors on {device}, but runs on a CUDA "
                "device; move them there, or call the function's _reference twin."
            )
        self.kernel[self.grid](**self.arguments)


def require_rows(name: str, rows: torch.Tensor) -> None:
    """Vectors of attention heads: [n, heads, head_size], the last dimension contiguous, tokens and
    heads multiples of 8 elements apart, the first one aligned to 16 bytes."""
    if rows.dtype not in ROW_DTYPES:
        raise ValueError(
            f"{name} is {rows.dtype}, but must be float32, bfloat16 or float16; convert it."
        )
    if rows.dim() != 3 or not 16 <= rows.shape[2] <= 256 or rows.shape[2] % 8:
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}, but must be [n, heads, head_size] with a head "
            "size of 16 to 256 that is a multiple of 8; reshape it."
        )
    if rows.stride(2) != 1:
        raise ValueError(
            f"{name} has strides {rows.stride()}, but heads must lie contiguously; call "
            ".contiguous()."
        )
    if any(stride % STRIDE_UNIT for stride in _strides(rows)):
        raise ValueError(
            f"{name} has strides {rows.stride()}, but tokens and heads must lie multiples of "
            f"{STRIDE_UNIT} elements apart; call .contiguous()."
        )
    if rows.numel() > 0 and rows.data_ptr() % _ROW_ALIGNMENT_BYTES:
        raise ValueError(
            f"{name} starts at address {rows.data_ptr():#x}, but rows must be aligned to "
            f"{_ROW_ALIGNMENT_BYTES} bytes; call .clone()."
        )


def row_strides(rows: torch.Tensor) -> tuple[int, int]:
    """Of tokens and of heads, in units of STRIDE_UNIT, of rows that `require_rows` has checked."""
    token, head = _strides(rows)
    return token // STRIDE_UNIT, head // STRIDE_UNIT


def _strides(rows: torch.Tensor) -> tuple[int, int]:
    """PyTorch leaves the stride of a dimension of size 1 open."""
    return (
        rows.stride(0) if rows.shape[0] > 1 else 0,
        rows.stride(1) if rows.shape[1] > 1 else 0,
    )


def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A contiguous tensor of exactly this dtype and shape."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}, but must be {dtype} of shape {shape}, contiguous; pass such a tensor."
        )
