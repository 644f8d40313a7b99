"""Merging a part of attention into a running result by LSE, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_magicpig import flash
from vllm_magicpig.triton_kernels.launch import (
    STRIDE_UNIT,
    Launch,
    require_rows,
    row_strides,
)

_ROWS_PER_PROGRAM = 8
"""Rows of (token, head): 8 KB of float32 at head size 128 for each of two tensors."""


def merge_into(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Adds a part over other keys to (out, lse), in place.

    out: float32 [n, num_q_heads, head_size], the last dimension contiguous; part: the same shape,
    float32, bfloat16 or float16; lse, part_lse: float32 [num_q_heads, n], natural logarithm, the last
    dimension contiguous; -inf is the empty set. All on one device.
    Runs on the current stream. Raises ValueError before anything is launched.
    """
    launch = merge_into_launch(out, lse, part, part_lse)
    if out.numel() > 0:
        launch.run(out.device)


merge_into_reference = flash.merge_into


def merge_into_launch(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> Launch:
    """What `merge_into` launches."""
    _check(out, lse, part, part_lse)
    num_tokens, num_heads, head_size = out.shape
    out_token_stride, out_head_stride = row_strides(out)
    part_token_stride, part_head_stride = row_strides(part)
    return Launch(
        _merge_kernel,
        (triton.cdiv(num_tokens * num_heads, _ROWS_PER_PROGRAM),),
        {
            "out_ptr": out,
            "lse_ptr": lse,
            "part_ptr": part,
            "part_lse_ptr": part_lse,
            "num_rows": num_tokens * num_heads,
            "num_heads": num_heads,
            "out_token_stride": out_token_stride,
            "out_head_stride": out_head_stride,
            "part_token_stride": part_token_stride,
            "part_head_stride": part_head_stride,
            "lse_head_stride": lse.stride(0),
            "part_lse_head_stride": part_lse.stride(0),
            "HEAD_SIZE": head_size,
            "BLOCK_DIMS": triton.next_power_of_2(head_size),
            "BLOCK_ROWS": _ROWS_PER_PROGRAM,
            "UNIT": STRIDE_UNIT,
            "num_warps": 4,
        },
    )


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "out_token_stride",
        "out_head_stride",
        "part_token_stride",
        "part_head_stride",
        "lse_head_stride",
        "part_lse_head_stride",
    ],
    do_not_specialize_on_alignment=["lse_ptr", "part_lse_ptr"],
)
def _merge_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    num_rows,
    num_heads,
    out_token_stride,
    out_head_stride,
    part_token_stride,
    part_head_stride,
    lse_head_stride,
    part_lse_head_stride,
    HEAD_SIZE: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIMS)
    valid = rows < num_rows
    tokens = (rows // num_heads).to(tl.int64)
    heads = (rows % num_heads).to(tl.int64)

    lse_at = lse_ptr + heads * lse_head_stride + tokens
    a = tl.load(lse_at, mask=valid, other=0.0)
    b = tl.load(part_lse_ptr + heads * part_lse_head_stride + tokens, mask=valid, other=0.0)
    high = tl.maximum(a, b)
    # Both empty: any finite number gives weights of zero.
    high = tl.where(high == float("-inf"), 0.0, high)
    weight, part_weight = tl.exp(a - high), tl.exp(b - high)
    total = weight + part_weight
    # Where both are empty the total is 0: its logarithm is -inf, and 0 / 1 leaves zeros.
    scale = 1.0 / tl.where(total > 0.0, total, 1.0)
    tl.store(lse_at, high + tl.log(total), mask=valid)

    mask = valid[:, None] & (dims < HEAD_SIZE)[None, :]
    out_rows = (tokens * out_token_stride + heads * out_head_stride) * UNIT
    part_rows = (tokens * part_token_stride + heads * part_head_stride) * UNIT
    out_at = out_ptr + out_rows[:, None] + dims
    part_at = part_ptr + part_rows[:, None] + dims
    out = tl.load(out_at, mask=mask, other=0.0)
    part = tl.load(part_at, mask=mask, other=0.0).to(tl.float32)
    merged = out * (weight * scale)[:, None] + part * (part_weight * scale)[:, None]
    tl.store(out_at, merged, mask=mask)


def _check(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    require_rows("out", out)
    require_rows("part", part)
    if out.dtype != torch.float32 or part.shape != out.shape:
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)} and part has shape "
            f"{tuple(part.shape)}, but out must be float32 and both of one shape; pass the rows of "
            "the same tokens."
        )
    for name, logs in (("lse", lse), ("part_lse", part_lse)):
        shape = (out.shape[1], out.shape[0])
        if logs.dtype != torch.float32 or logs.shape != shape or logs.stride(1) != 1:
            raise ValueError(
                f"{name} is {logs.dtype} of shape {tuple(logs.shape)} with strides {logs.stride()}, "
                f"but must be float32 [num_q_heads, n] = {shape}, its rows contiguous; pass what "
                "the attention returned."
            )
