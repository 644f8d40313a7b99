"""Dense attention of a chunk of a prompt: itself causally, then the pages before it, merged by LSE."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm_magicpig.flash import flash_on_cpu, merge_into

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
    before it, all in one dtype. Returns [num_tokens, num_q_heads, head_size] float32, so that a chunk
    is rounded once.
    """
    q = query.transpose(0, 1)
    own, lse = flash_on_cpu(q, key.transpose(0, 1), value.transpose(0, 1), scale, causal=True)
    out = own.transpose(0, 1).float()
    for context_keys, context_values in context:
        part, part_lse = flash_on_cpu(q, context_keys, context_values, scale, causal=False)
        merge_into(out, lse, part.transpose(0, 1), part_lse)
    return out
