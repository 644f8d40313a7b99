"""Dense attention of a chunk over earlier pages, against attention over everything at once."""

from __future__ import annotations

import pytest
import torch

from vllm_magicpig.prefill import attend_chunk


def whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """float64 causal attention of the last len(query) tokens: [num_tokens, num_q_heads, head_size]."""
    group = query.shape[1] // key.shape[1]
    q = query.double().transpose(0, 1)
    k, v = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
    logits = scale * q @ k.transpose(1, 2)
    context = key.shape[0] - query.shape[0]
    future = torch.ones(query.shape[0], key.shape[0]).triu(context + 1).bool()
    return (logits.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_a_chunk_sees_itself_causally_and_all_of_its_context(
    dtype: torch.dtype, head_size: int, group: int
) -> None:
    torch.manual_seed(head_size + group)
    context_len, num_tokens, num_kv_heads = 150, 37, 2
    scale = head_size**-0.5
    query = torch.randn(num_tokens, num_kv_heads * group, head_size).to(dtype)
    key, value = (
        torch.randn(context_len + num_tokens, num_kv_heads, head_size).to(dtype) for _ in range(2)
    )
    pieces = [
        (key[s].transpose(0, 1), value[s].transpose(0, 1)) for s in (slice(0, 64), slice(64, 150))
    ]
    out = attend_chunk(query, key[context_len:], value[context_len:], pieces, scale)
    truth = whole(query, key, value, scale)
    # Two partial results and the probabilities inside the op are rounded to the rows' dtype, with
    # values of size 4 at most: 3 roundings of 4 * epsilon / 2, epsilon that of the dtype.
    bound = 3 * 4 * torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 1e-5
    assert (out.double() - truth).abs().max() <= bound


@pytest.mark.parametrize("num_tokens", [1, 2, 129])
def test_a_chunk_without_context(num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    query, key, value = (torch.randn(num_tokens, heads, 64) for heads in (4, 2, 2))
    out = attend_chunk(query, key, value, [], 0.125)
    assert (out.double() - whole(query, key, value, 0.125)).abs().max() < 1e-5
