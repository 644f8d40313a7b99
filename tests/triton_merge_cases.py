"""merge_into against reference.merge; run by test_triton_merge.py."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import DEVICE, synchronize

from vllm_magicpig import reference
from vllm_magicpig.triton_kernels.merge import merge_into, merge_into_reference

EMPTY = float("-inf")


@pytest.mark.parametrize("function", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_size"), [(1, 1, 16), (3, 5, 64), (33, 8, 80), (9, 4, 128)]
)
def test_it_is_the_references_merge(
    num_tokens: int, num_heads: int, head_size: int, dtype: torch.dtype, function: str
) -> None:
    torch.manual_seed(num_tokens)
    # Views of larger buffers, as prefill has them.
    out = torch.randn(num_tokens + 2, num_heads, head_size)
    lse = torch.randn(num_heads, num_tokens + 2) * 20
    part = torch.randn(num_tokens, num_heads, head_size).to(dtype)
    part_lse = torch.randn(num_heads, num_tokens) * 20
    lse[0, 1], part_lse[-1, -1] = EMPTY, EMPTY
    out[1, 0], part[-1, -1] = 0.0, 0.0
    rows = slice(1, 1 + num_tokens)
    wanted, wanted_lse = reference.merge(
        out[rows].double(), lse[:, rows].t().double(), part.double(), part_lse.t().double()
    )
    around = out.clone()

    merge = merge_into if function == "kernel" else merge_into_reference
    out, lse, part, part_lse = (x.to(DEVICE) for x in (out, lse, part, part_lse))
    merge(out[rows], lse[:, rows], part, part_lse)
    synchronize()
    # Weights are exponentials of differences up to 100 in float32, values are of size 5.
    assert (out[rows].cpu().double() - wanted).abs().max() < 5 * 100 * 4 * 2.0**-23
    assert torch.allclose(lse[:, rows].cpu().t().double(), wanted_lse, rtol=0, atol=100 * 2.0**-22)
    assert torch.equal(out.cpu()[[0, -1]], around[[0, -1]]), "the rows around are not touched"


@pytest.mark.parametrize("function", [merge_into, merge_into_reference])
def test_two_empty_parts_stay_empty(function) -> None:
    out, part = (torch.zeros(2, 3, 16, device=DEVICE) for _ in range(2))
    lse, part_lse = (torch.full((3, 2), EMPTY, device=DEVICE) for _ in range(2))
    function(out, lse, part, part_lse)
    synchronize()
    assert not out.any()
    assert (lse == EMPTY).all()


@pytest.mark.parametrize("function", [merge_into, merge_into_reference])
def test_merging_one_part_after_another_is_the_union(function) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(h, n, 64) for h, n in ((4, 1), (2, 90), (2, 90)))
    whole, whole_lse = reference.exact_attention(query[:, 0], keys, values, 0.125)
    out = torch.zeros(1, 4, 64, device=DEVICE)
    lse = torch.full((4, 1), EMPTY, device=DEVICE)
    for piece in (slice(0, 1), slice(1, 50), slice(50, 90)):
        part, part_lse = reference.exact_attention(
            query[:, 0], keys[:, piece], values[:, piece], 0.125
        )
        on_device = (part.float()[None].to(DEVICE), part_lse.float()[:, None].to(DEVICE))
        function(out, lse, *on_device)
    synchronize()
    assert (out[0].cpu().double() - whole).abs().max() < 1e-5
    assert (lse[:, 0].cpu().double() - whole_lse).abs().max() < 1e-5
