"""Error bars of native steps against signature_reference, on every instruction set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from native_helpers import each_isa, pool
from signature_paging import Paged

from vllm_magicpig import _C
from vllm_magicpig import signature_draw as draw
from vllm_magicpig import signature_reference as reference

SCALE = 2.0**-4  # exact in float32, as the native side takes it
ROUNDING = 2.0**-24
STEPS = 16  # of which a kv head has its error bar in one


def a_query(paged: Paged, group: int, size: float = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    heads = paged.num_kv_heads * group
    return size * torch.randn(len(paged.seq_lens), heads, paged.head_size, generator=generator)


def bars_of(
    paged: Paged, query: torch.Tensor, budget: float, isa: _C.Isa, threads: int = 2
) -> npt.NDArray[np.float32]:
    bars = np.zeros(query.shape[:2], dtype=np.float32)
    paged.attend(query, budget, SCALE, isa, threads, bars)
    return bars


def is_due(n: int, kv_head: int) -> bool:
    return (n - 1 + kv_head) % STEPS == 0


def check(paged: Paged, query: torch.Tensor, budget: float, isa: _C.Isa) -> int:
    """Squares within what rounding can do at worst; returns how many kv heads have a bar.

    A logit is off by d roundings of its products; a share by twice the logits' worst and what
    e^x has, 2e-7; 1 - pi by 3e-7; out by its shares; the three sums by a rounding for each term.
    """
    group = query.shape[1] // paged.num_kv_heads
    bars = bars_of(paged, query, budget, isa)
    lists = paged.lists(query, budget, SCALE, isa)
    num_due = 0
    for request, n in enumerate(paged.seq_lens):
        middle = reference.middle(n, paged.sink, paged.window)
        for head in range(paged.num_kv_heads):
            heads = slice(head * group, (head + 1) * group)
            if not is_due(n, head) or not len(middle):
                assert np.isnan(bars[request, heads]).all()
                continue
            num_due += 1
            tokens, chances = lists[request][head]
            pi = torch.ones(n, dtype=torch.float64)
            pi[middle.start : middle.stop] = 0
            listed = draw.chances(torch.from_numpy(chances.astype(np.int64))).double() / 65536
            pi[torch.from_numpy(tokens).long()] = listed
            read = pi > 0
            keys, values = (
                part[request][head].double()[read] for part in (paged.keys, paged.values)
            )
            pi, q = pi[read], query[request, heads].double()
            logits = SCALE * q @ keys.T
            out, lse = reference.estimate(logits, values, pi)
            expected = reference.error_bar(logits, values, pi, out, lse)

            weighted = (logits - lse[:, None]).exp() / pi  # shares of the estimate, whose sum is 1
            c = weighted.pow(2) * (1 - pi)
            distance = torch.cdist(out, values)
            of_logit = paged.head_size * ROUNDING * SCALE * (q.abs() @ keys.abs().T).amax(1)
            of_share = 2 * (of_logit + 2e-7)
            of_out = of_share * distance.amax(1)
            terms = 2 * (len(values) + paged.head_size) * ROUNDING
            lengths = values.norm(dim=1) + out.norm(dim=1, keepdim=True)
            bound = (
                2 * of_share * (c * distance.pow(2)).sum(1)
                + 3e-7 * (weighted.pow(2) * distance.pow(2) * (pi < 1)).sum(1)
                + 2 * of_out * (c * distance).sum(1)
                + terms * (c * lengths.pow(2)).sum(1)
            ) / out.pow(2).sum(1) + 2 * expected.pow(2) * of_out / out.norm(dim=1)
            found = torch.from_numpy(bars[request, heads]).double()
            assert (bound < 0.01 * expected.pow(2) + 1e-5).all(), "the bound says something"
            assert ((found.pow(2) - expected.pow(2)).abs() <= bound).all()
    return num_due


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("head_size", "group"), [(72, 7), (64, 1)])
def test_bars_are_the_references_on_the_same_list(
    isa: _C.Isa, dtype: torch.dtype, head_size: int, group: int
) -> None:
    """9,009 tokens are two parts; of 97 none is sampled."""
    paged = Paged(dtype, head_size, 2, 2, (9009, 1008, 97))
    assert check(paged, a_query(paged, group), 0.03, isa) == 2


@each_isa
def test_what_cannot_err_has_no_bar(isa: _C.Isa) -> None:
    """A list of everything, exactly; equal values, but for rounding."""
    paged = Paged(torch.float32, 64, 2, 1, (1009,))
    query = a_query(paged, 4)
    assert (bars_of(paged, query, 1.0, isa) == 0).all()
    paged.values[0][:] = 1.5
    paged.store(0, 0, 1009)
    assert check(paged, query, 0.05, isa) == 1


def test_each_kv_head_has_its_bar_in_one_step_of_sixteen() -> None:
    """The same whatever the batch and the threads."""
    lengths = tuple(range(1200, 1200 + STEPS))
    paged = Paged(torch.float32, 16, 2, 2, lengths)
    query = a_query(paged, 2)
    isa = _C.resolve_isa("auto")
    bars = bars_of(paged, query, 0.05, isa)
    assert (np.isfinite(bars).sum(0) == 1).all()
    assert len(np.isfinite(bars).any(1).nonzero()[0]) == 2, "kv heads take turns"
    np.testing.assert_array_equal(bars_of(paged, query, 0.05, isa, threads=1), bars)
    whole = paged.seq_lens, paged.tables
    for row in np.isfinite(bars).any(1).nonzero()[0]:
        paged.seq_lens, paged.tables = (lengths[row],), whole[1][row : row + 1]
        alone = bars_of(paged, query[row : row + 1], 0.05, isa)
        np.testing.assert_array_equal(alone, bars[row : row + 1])


def test_the_record_adds_bars_up_to_one() -> None:
    """Of values of one dimension and either sign, whose sum may be as small as it likes."""
    paged = Paged(torch.float32, 64, 2, 1, (4001, 4003))
    paged.values[0] -= paged.values[0].mean(1, keepdim=True)
    paged.values[0][..., 1:] = 0
    paged.store(0, 0, 4001)
    query = a_query(paged, 8, size=1)
    isa = _C.resolve_isa("auto")
    layer = _C.DecodeLayer.of_signatures(
        paged.signatures, paged.rule(0.02), scale=SCALE, exact_below=1, isa=isa, pool=pool()
    )
    batch = _C.DecodeBatch(paged.pages, paged.tables, paged.lengths)
    bars = np.empty((2, 8), dtype=np.float32)
    layer.attend(query, batch, torch.empty_like(query), None, None, None, bars)
    assert np.isnan(bars[1]).all()
    assert 0 < (bars[0] > 1).sum() < 8
    assert layer.counters.error_bars == 8
    assert layer.counters.error_bar_sum == pytest.approx(bars[0].clip(max=1).sum(), rel=1e-6)
    layer.forget_steps()
    assert layer.counters.error_bars == layer.counters.error_bar_sum == 0
