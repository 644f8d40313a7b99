"""Dense attention of a chunk of a prompt: itself causally, then the pages before it, merged by LSE."""

from __future__ import annotations

from collections.abc import Iterable

import torch

CONTEXT_PIECE_TOKENS = 8192
"""Earlier tokens copied out of the pages at once: 32 MB at 8 kv heads of size 128 in bf16."""


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: Iterable[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """query: [num_tokens, num_q_heads, head_size]; key, value: [num_tokens, num_kv_heads, head_size],
    the chunk's own; context: pieces (keys, values), each [num_kv_heads, n, head_size], of the tokens
    before it, all in one dtype. Returns [num_tokens, num_q_heads, head_size], in float32 where there
    is context, so that a chunk is rounded once.
    """
    q = query.transpose(0, 1)
    out, lse = _flash(q, key.transpose(0, 1), value.transpose(0, 1), scale, causal=True)
    for context_keys, context_values in context:
        piece_out, piece_lse = _flash(q, context_keys, context_values, scale, causal=False)
        out, lse = _merge(out, lse, piece_out, piece_lse)
    return out.transpose(0, 1)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    # The op that scaled_dot_product_attention runs on the CPU, which alone returns the LSE (natural
    # logarithm, float32). It takes grouped heads and strided rows; its causal mask is aligned to the
    # top left, hence two calls for a chunk with context.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, scale=scale
    )[:2]
    return out[0], lse[0]


def _merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return out_a.float() * weight_a + out_b.float() * weight_b, lse
