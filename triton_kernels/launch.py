"""What the launchers share: a launch as data, so that it can be compiled where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime import JITFunction

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """Vectors of attention heads: [n, heads, head_size], the last dimension contiguous."""
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


def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A contiguous tensor of exactly this dtype and shape."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}, but must be {dtype} of shape {shape}, contiguous; pass such a tensor."
        )
