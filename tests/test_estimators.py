"""The candidate estimators: their samples, weights and corrections, against what can be known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vllm_magicpig import reference
from vllm_magicpig.accuracy.estimators import (
    ESTIMATORS,
    FLOOR_SHARE,
    Moments,
    make_estimator,
    regression_sums,
    systematic_sample,
)
from vllm_magicpig.accuracy.methods import MethodSettings, Step, make_method
from vllm_magicpig.config import MagicPigOptions

SCALE = 0.2
OPTIONS = MagicPigOptions(
    K=4, L=30, sink_tokens=3, window_tokens=8, exact_below=0, center="first_prompt"
)
NUM_SEEDS = 300
LEVEL = 1e-3  # chance that a right estimator would have been refused when the seeds were chosen


def world(num_tokens: int = 600, query_size: float = 1.0) -> tuple[torch.Tensor, ...]:
    """q [6, 32], k and v [2, n, 32] in float64; keys lean towards the queries more or less, and their
    norms differ."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(6, 32), normal(2, num_tokens, 32), normal(2, num_tokens, 32)
    k += torch.rand(2, num_tokens, 1, generator=generator) ** 4 * q[::3, None]
    k *= torch.exp(0.3 * normal(2, num_tokens, 1))
    return query_size * q, k, v + 0.5


def step_of(q: torch.Tensor, k: torch.Tensor, limit: int) -> Step:
    middle = reference.middle(k.shape[1], 3, 8)
    inner = k.repeat_interleave(3, 0)[:, middle.start : middle.stop]
    logits = SCALE * torch.einsum("hd,hnd->hn", q, inner)
    return Step(q, k, logits, SCALE, middle, limit)


def test_native_and_b_are_the_engines_estimator() -> None:
    q, k, v = world()
    for name, rows in (("native", 0.0), ("B", 0.05)):
        settings = MethodSettings("magicpig", rows, OPTIONS)
        expected = make_method(settings, 2, SCALE).attend(q, k, v)
        found = make_estimator(name, 0.05, OPTIONS, 2, SCALE).attend(q, k, v)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "native"])
@pytest.mark.parametrize("setting", [(4, 30), (10, 150), (1, 128)], ids=str)
@pytest.mark.parametrize("rows", [0.01, 0.1])
def test_the_budget_is_met(name: str, setting: tuple[int, int], rows: float) -> None:
    """By the norm-aware sample to one row; B takes less where less matches."""
    q, k, v = world(1000)
    options = replace(OPTIONS, K=setting[0], L=setting[1])
    _, gathered = make_estimator(name, rows, options, 2, SCALE).attend(q, k, v)
    limit = int(rows * 989)
    assert (gathered <= limit + 1).all()
    if name not in ("B", "B+G"):
        assert (gathered >= limit - 1).all()


def test_the_budget_is_met_where_all_tokens_match_in_all_tables() -> None:
    """Keys along the query: whatever the threshold, all would be taken. Their weights are right."""
    q, k, v = world(1000)
    q = q[::3].repeat_interleave(3, 0)
    k = q[::3, None] * torch.linspace(1, 1.5, 1000)[:, None].double()
    estimator = make_estimator("norm-aware", 0.1, replace(OPTIONS, center="none"), 0, SCALE)
    _, gathered = estimator.attend(q, k, v)
    assert (gathered - 98).abs().max() <= 1
    step = step_of(q, k, 98)
    weights = estimator.log_weights(step)
    total = weights.exp().sum(1)  # of equal chances: an estimate of the number of tokens
    torch.testing.assert_close(total, torch.full_like(total, 989), rtol=0.011, atol=0)


def test_systematic_samples_have_the_asked_probabilities() -> None:
    pi = torch.rand(1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    taken = systematic_sample(pi.expand(1000, 40), starts)
    # A grid of starts meets each interval of length pi within one step of 1 / 1000.
    assert (taken.double().mean(0) - pi[0]).abs().max() < 0.0011
    assert (taken.sum(1) - pi.sum()).abs().max() < 1


def test_norm_aware_weights_are_unbiased() -> None:
    """u is the chance of being gathered over hyperplanes and draws, tau fixed by the budget."""
    q, k, v = world(query_size=0.3)
    sums = []
    for seed in range(NUM_SEEDS):
        options = replace(OPTIONS, seed=seed, center="none")
        estimator = make_estimator("norm-aware", 0.3, options, 0, SCALE, seed)
        estimator.observe(k)
        step = step_of(q, k, 176)
        mass = (step.logits + estimator.log_weights(step))[0].exp()
        sums.append(torch.cat([mass.sum()[None], mass @ v[0, 3:-8, :4]]))
    found = torch.stack(sums)
    mass = step_of(q, k, 176).logits[0].exp()
    expected = torch.cat([mass.sum()[None], mass @ v[0, 3:-8, :4]])
    z = ((found.mean(0) - expected) / (found.std(0) / math.sqrt(NUM_SEEDS))).abs().max().item()
    assert math.erfc(z / math.sqrt(2)) > LEVEL / len(expected), z


def test_every_token_has_the_floor() -> None:
    """No weight is above 1 / phi, and phi m is at least the floor's share of the budget."""
    q, k, _ = world()
    estimator = make_estimator("norm-aware", 0.05, OPTIONS, 0, SCALE)
    estimator.observe(k)
    step = step_of(q, k, 29)
    assert estimator.log_weights(step).max() <= math.log(len(step.middle) / (FLOOR_SHARE * 29))


def test_a_longer_key_is_asked_for_less() -> None:
    """At equal cosines, so that equally many tables match, the longer half is gathered more often."""
    q, k, _ = world(query_size=2.0)
    k = k / k.norm(dim=-1, keepdim=True) * 5
    k[:, 1::2] *= 2
    estimator = make_estimator("norm-aware", 0.1, replace(OPTIONS, center="none"), 0, SCALE)
    estimator.observe(k)
    gathered = estimator.log_weights(step_of(q, k, 58)) > -math.inf
    long = torch.arange(3, 592) % 2 == 1
    assert gathered[:, long].sum() > 2 * gathered[:, ~long].sum()


def linear_case(slope: bool) -> tuple[torch.Tensor, ...]:
    """Logits so small that exp(s) is 1 + s to 1e-8, or the same for all."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(400, 16, generator=generator).double() for _ in range(2))
    query = 1e-5 * torch.randn(16, generator=generator).double() * slope
    rows = torch.randperm(400, generator=generator)[:60]
    log_weights = torch.log(2 + 4 * torch.rand(60, generator=generator).double())
    return keys, values, query, rows, log_weights


@pytest.mark.parametrize("slope", [False, True])
def test_what_is_linear_is_exact(slope: bool) -> None:
    """Whatever the weights: with b = 0 where all logits are equal, with a slope where exp is linear.
    y is clipped at a quantile, which moves it by no more than the logits' range, 1e-4."""
    keys, values, query, rows, log_weights = linear_case(slope)
    moments, logits = Moments.of(keys, values), keys @ query
    mass = logits.exp()
    z, n = regression_sums(
        logits[rows], log_weights, values[rows], query, moments, slope=slope, shift=0.0
    )
    plain = log_weights.exp() @ values[rows]
    assert (plain - mass @ values).abs().max() > 10
    bound = 1e-9 if not slope else 400 * 1e-4
    assert abs(z - mass.sum()) < bound
    assert (n - mass @ values).abs().max() < bound


def test_a_shift_of_the_logits_scales_the_sums() -> None:
    keys, values, query, rows, log_weights = linear_case(True)
    query = 1e5 * query
    moments, logits = Moments.of(keys, values), keys @ query
    arguments = (logits[rows], log_weights, values[rows], query, moments, True)
    z, n = regression_sums(*arguments, 0.0)
    shifted_z, shifted_n = regression_sums(*arguments, 7.0)
    torch.testing.assert_close(shifted_z * math.exp(7), z)
    torch.testing.assert_close(shifted_n * math.exp(7), n)


def test_few_uncertain_rows_are_weighted_plainly() -> None:
    keys, values, query, rows, log_weights = linear_case(True)
    moments, logits = Moments.of(keys, values), keys @ query
    some = rows[:11]
    z, n = regression_sums(logits[some], log_weights[:11], values[some], query, moments, True, 0.0)
    mass = (log_weights[:11] + logits[some]).exp()
    torch.testing.assert_close(z, mass.sum())
    torch.testing.assert_close(n, mass @ values[some])


def test_moments_are_those_of_the_tokens() -> None:
    keys, values, *_ = linear_case(True)
    moments = Moments.of(keys, values)
    assert moments.num_tokens == 400
    both = torch.cat([values, keys], 1).T
    torch.testing.assert_close(moments.covariance, both.cov(correction=0)[:16, 16:])


@pytest.mark.parametrize("name", ["G0", "G", "B+G"])
def test_corrections_lower_the_error_of_flat_attention(name: str) -> None:
    """Where all tokens count alike, the middle's moments tell the answer."""
    q, k, v = world(query_size=0.2)
    exact, _ = reference.exact_attention(q, k, v, SCALE)
    plain = "B" if name == "B+G" else "norm-aware"
    errors = {
        one: (make_estimator(one, 0.1, OPTIONS, 0, SCALE).attend(q, k, v)[0] - exact).norm()
        for one in (plain, name)
    }
    assert errors[name] < errors[plain] / 3


def test_moments_follow_the_middle() -> None:
    """A token that leaves the window joins them: the result is that of a fresh estimator."""
    q, k, v = world(601)
    running = make_estimator("G", 0.1, OPTIONS, 0, SCALE)
    running.attend(q, k[:, :600], v[:, :600])
    running.reset()
    fresh = make_estimator("G", 0.1, replace(OPTIONS), 0, SCALE)
    fresh.keys.extend(k[:, :600])  # the same centre
    assert torch.equal(running.attend(q, k, v)[0], fresh.attend(q, k, v)[0])


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="'H' is unknown; choose one of native, B"):
        make_estimator("H", 0.1, OPTIONS, 0, SCALE)
