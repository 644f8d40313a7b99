"""Ragged dense attention with its LSE, and merging of parts, against attention over everything."""

from __future__ import annotations

import pytest
import torch

from vllm_magicpig import reference
from vllm_magicpig.flash import Ragged, flash_for, merge_into

CPU = torch.device("cpu")


def ragged(*lens: int) -> Ragged:
    return Ragged(lens, torch.tensor([0, *lens]).cumsum(0).to(torch.int32))


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference, query by query: out [n, heads, head_size] and lse [heads, n], float64."""
    outs, lses = [], []
    for i in range(query.shape[0]):
        seen = slice(0, i + 1) if causal else slice(None)
        out, lse = reference.exact_attention(
            query[i], key[seen].transpose(0, 1), value[seen].transpose(0, 1), 0.125
        )
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses, dim=1)


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_of_a_span_see_only_themselves(causal: bool) -> None:
    torch.manual_seed(0)
    q_lens = (1, 17, 5)
    k_lens = q_lens if causal else (130, 3, 64)
    query, out = torch.randn(23, 6, 64), torch.empty(23, 6, 64)
    key, value = (torch.randn(sum(k_lens), 2, 64) for _ in range(2))
    queries, keys = ragged(*q_lens), ragged(*k_lens)
    flash = flash_for(CPU, torch.float32, 64)
    lse = flash(query, key, value, queries, keys, out, 0.125, causal)
    for i in range(3):
        q, k = (slice(int(r.starts[i]), int(r.starts[i + 1])) for r in (queries, keys))
        wanted, wanted_lse = expected(query[q], key[k], value[k], causal)
        assert (out[q].double() - wanted).abs().max() < 1e-5
        assert (lse[:, q].double() - wanted_lse).abs().max() < 1e-5


def test_a_single_sequence_starts_at_zero() -> None:
    one = Ragged.single(7, CPU)
    assert one.lens == (7,)
    assert one.starts.tolist() == [0, 7]
    assert one.starts.dtype == torch.int32


@pytest.mark.parametrize("part_dtype", [torch.float32, torch.bfloat16])
def test_merging_in_place_is_the_references_merge(part_dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    out, part = torch.randn(9, 4, 64), torch.randn(9, 4, 64).to(part_dtype)
    lse, part_lse = torch.randn(4, 9) * 20, torch.randn(4, 9) * 20
    wanted, wanted_lse = reference.merge(
        out.double(), lse.t().double(), part.double(), part_lse.t().double()
    )
    merge_into(out, lse, part, part_lse)
    # Weights are exponentials of differences of size 100 with float32's relative error.
    assert (out.double() - wanted).abs().max() < 100 * 4 * 2.0**-23
    assert (lse.t().double() - wanted_lse).abs().max() < 100 * 2.0**-23
