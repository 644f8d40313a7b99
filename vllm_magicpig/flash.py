"""Dense attention that also returns its log-sum-exp, by whatever well-kept kernel the device has.

Merging partial results by LSE is exact, so a chunk can attend itself and its context in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch


@dataclass(frozen=True)
class Ragged:
    """Sequences that lie one after another in a flat tensor.

    lens: tokens of each; starts: int32 [num_seqs + 1] on the tensors' device, their running sum.
    """

    lens: tuple[int, ...]
    starts: torch.Tensor

    @classmethod
    def single(cls, num_tokens: int, device: torch.device) -> Ragged:
        # arange and a product: a tensor made from a Python list would be copied synchronously.
        return cls((num_tokens,), torch.arange(2, dtype=torch.int32, device=device) * num_tokens)


class Flash(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: Ragged,
        keys: Ragged,
        out: torch.Tensor,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Attention of each sequence of queries over the sequence of keys at the same place.

        query, out: [num_queries, num_q_heads, head_size], out is written; key, value: [num_keys,
        num_kv_heads, head_size], all of one dtype; causal only where both lengths are equal.
        Returns the LSE, float32 [num_q_heads, num_queries], natural logarithm.
        """


def flash_for(device: torch.device, dtype: torch.dtype, head_size: int) -> Flash:
    if device.type == "cpu":
        return _PerSequence(flash_on_cpu)
    if dtype == torch.float32:  # FlashAttention has no float32 kernel
        return _PerSequence(_efficient_on_cuda)
    return _VllmFlash(head_size)


class _VllmFlash:
    """vLLM's FlashAttention, the version that its own backend takes on this device."""

    def __init__(self, head_size: int) -> None:
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        self._varlen = flash_attn_varlen_func
        self._version = get_flash_attn_version(head_size=head_size)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: Ragged,
        keys: Ragged,
        out: torch.Tensor,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        _, lse = self._varlen(
            q=query,
            k=key,
            v=value,
            out=out,
            max_seqlen_q=max(queries.lens),
            cu_seqlens_q=queries.starts,
            max_seqlen_k=max(keys.lens),
            cu_seqlens_k=keys.starts,
            softmax_scale=scale,
            causal=causal,
            return_softmax_lse=True,
            fa_version=self._version,
        )
        result: torch.Tensor = lse
        return result


class _OneSequence(Protocol):
    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class _PerSequence:
    """Ragged attention by a kernel for one sequence."""

    def __init__(self, attend: _OneSequence) -> None:
        self._attend = attend

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: Ragged,
        keys: Ragged,
        out: torch.Tensor,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        lses = []
        for q_span, k_span in zip(_spans(queries.lens), _spans(keys.lens), strict=True):
            q, k, v = (x.transpose(0, 1) for x in (query[q_span], key[k_span], value[k_span]))
            result, lse = self._attend(q, k, v, scale, causal)
            out[q_span] = result.transpose(0, 1)
            lses.append(lse)
        return torch.cat(lses, dim=1)


def _spans(lens: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lens))
    return [slice(end - size, end) for end, size in zip(ends, lens, strict=True)]


def flash_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [num_q_heads, n, head_size]; k, v: [num_kv_heads, m, head_size]. Returns out like q and the
    LSE, float32 [num_q_heads, n].

    The op that scaled_dot_product_attention runs on the CPU, which alone returns the LSE. It takes
    grouped heads and strided rows; its causal mask is aligned to the top left, hence two calls for a
    chunk with context.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, scale=scale
    )[:2]
    return out[0], lse[0]


def _efficient_on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32, for tests of correctness; this op takes no grouped heads and pads the LSE's rows."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q[None], k[None], v[None], None, True, 0.0, causal, scale=scale
    )[:2]
    return out[0], lse[0, :, : q.shape[1]]


def merge_into(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Adds a part over other keys to (out, lse), in place; reference.merge says what it computes.

    out: float32 [n, num_q_heads, head_size]; part: the same shape, any float dtype; lse, part_lse:
    float32 [num_q_heads, n], -inf is the empty set.
    """
    merged = torch.logaddexp(lse, part_lse)
    finite = torch.where(merged.isfinite(), merged, 0.0)
    weight, part_weight = ((x - finite).exp().t()[..., None] for x in (lse, part_lse))
    out.mul_(weight)
    out.addcmul_(part, part_weight)
    lse.copy_(merged)
