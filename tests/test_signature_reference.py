"""The laws of signatures: scores, shares, chances, lists, estimate and error bar, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from signature_worlds import WINDOW, dominated, world

from vllm_magicpig import signature_reference as reference
from vllm_magicpig.signature_reference import BLOCK_TOKENS, FLOOR_SHARE

NUM_STEPS = 300
LEVEL = 1e-3  # chance that a right method would have been refused when the seeds were chosen
HEAD_SIZES = [16, 24, 64, 80, 128, 256]


def starts(seed: int = 0, kv_head: int = 0) -> list[float]:
    """Of NUM_STEPS decode steps."""
    words = [reference.step_word(seed, 3, kv_head, 5000 + step) for step in range(NUM_STEPS)]
    return [word / 2**64 for word in words]


def assert_unbiased(found: torch.Tensor, expected: torch.Tensor) -> None:
    """found: [draws, figures]; every mean within its band."""
    error = found.std(0) / math.sqrt(len(found))
    z = ((found.mean(0) - expected) / error).abs().max().item()
    assert math.erfc(z / math.sqrt(2)) > LEVEL / expected.numel(), z


def binomial_tail(counts: torch.Tensor, draws: int, chance: torch.Tensor) -> torch.Tensor:
    """P of a count as far from the middle on its side, for each."""
    k = torch.arange(draws + 1, dtype=torch.float64)
    choose = math.lgamma(draws + 1) - torch.lgamma(k + 1) - torch.lgamma(draws - k + 1)
    p = chance[:, None].clamp(1e-300, 1 - 1e-16)
    pmf = (choose + k * p.log() + (draws - k) * torch.log1p(-p)).exp()
    below = (pmf * (k <= counts[:, None])).sum(1)
    above = (pmf * (k >= counts[:, None])).sum(1)
    return torch.minimum(below, above)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotations_keep_products(head_size: int) -> None:
    R = reference.rotation(head_size, 5)
    identity = torch.eye(head_size, dtype=torch.float64)
    torch.testing.assert_close(R.T @ R, identity, rtol=0, atol=1e-12)
    assert not torch.equal(R, reference.rotation(head_size, 6))
    assert torch.equal(R, reference.rotation(head_size, 5))
    assert len(R) == 1 << (head_size - 1).bit_length()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_half_integers_of_the_best_step(bits: int) -> None:
    w = world(256)
    signatures, R = w.encoded(bits)
    allowed = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + 0.5
    assert torch.equal(signatures.codes.unique(), allowed.double())
    x = (w.keys - signatures.base_means) @ R.T
    mean = w.keys.reshape(2, 128, 64).mean(1)
    assert ((signatures.means - mean).abs() <= 2**-8 * mean.abs()).all()  # half a step of bfloat16
    cosine = torch.cosine_similarity(x, signatures.codes)
    rms = x.pow(2).mean(1, keepdim=True).sqrt()
    for factor in reference.STEP_FACTORS:
        step = reference.QUANTISER_STEP[bits] * factor * rms
        tried = (x / step).floor().clamp(allowed[0] - 0.5, allowed[-1] - 0.5) + 0.5
        assert (cosine >= torch.cosine_similarity(x, tried) - 1e-12).all()
    projected = signatures.factors * (signatures.codes * x).sum(1)
    torch.testing.assert_close(projected, x.pow(2).sum(1))


def test_more_bits_leave_less_error() -> None:
    """Uniform quantisers lose D = .363, .1188 and .0115 of a normal's variance (Max, 1960), and e2 is
    |x|^2 D / (1 - D) / (p - 1); 64 dimensions and the best of three steps do a little better."""
    w = world(1024)
    for bits, lost in ((1, 0.3634), (2, 0.1188), (4, 0.01154)):
        signatures, _ = w.encoded(bits)
        x2 = (w.keys - signatures.base_means).pow(2).sum(1)
        relative = (signatures.error_variances * 63 / x2).mean().item()
        assert 0.75 < relative / (lost / (1 - lost)) < 1.05


def test_a_block_of_equal_keys_is_its_mean() -> None:
    R = reference.rotation(64, 0)
    keys = torch.full((128, 64), 1.5, dtype=torch.float64)
    signatures = reference.encode(keys, R, 2)
    assert signatures.factors.tolist() == [0.0] * 128
    assert signatures.error_variances.tolist() == [0.0] * 128
    base, residual = reference.scores(torch.ones(1, 64, dtype=torch.float64), signatures, R)
    assert torch.equal(base, torch.full((1, 128), 96.0, dtype=torch.float64))
    assert torch.equal(residual, torch.zeros_like(base))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("head_size", [64, 80])
def test_scores_are_unbiased_with_the_variance_that_is_stored(bits: int, head_size: int) -> None:
    """Over rotations, of which the error is |q across x| sqrt(e2): the part of q along x has none."""
    w = world(128, head_size, group=2)
    errors, ratios = [], []
    for seed in range(NUM_STEPS):
        signatures, R = w.encoded(bits, seed)
        base, residual = reference.scores(w.queries, signatures, R)
        error = base + residual - w.logits
        x = w.keys - signatures.base_means
        along = torch.cosine_similarity(w.queries[:, None], x[None], dim=2).pow(2)
        across = w.queries.pow(2).sum(1, keepdim=True) * (1 - along)
        errors.append(error[:, ::8].flatten())
        ratios.append((error.pow(2) / (across * signatures.error_variances)).mean())
    assert_unbiased(torch.stack(errors), torch.zeros(32, dtype=torch.float64))
    # Two queries' errors over 128 keys of one block and rotation are nearly independent: 256 squares of
    # normals a rotation have a mean of 1 and a standard error of sqrt(2 / 256 / 300) = .005.
    assert abs(torch.stack(ratios).mean().item() - 1) < 0.025


def test_the_middle_ends_where_blocks_are_full() -> None:
    for n in (0, 3, 4, 127, 128, 129, 191, 192, 200, 255, 256, 300, 320):
        found = reference.middle(n, 4, WINDOW)
        for i in range(n):
            encoded = i // BLOCK_TOKENS < n // BLOCK_TOKENS
            assert (i in found) == (4 <= i < n - WINDOW and encoded)


def test_shares_are_of_the_whole_softmax() -> None:
    """With true logits, the shares that the softmax gives."""
    w = world(600)
    found = reference.shares(w.logits[:, w.inside], w.static_logits.logsumexp(1))
    torch.testing.assert_close(found, w.logits.log_softmax(1)[:, w.inside])


def test_noise_shrinks_scores() -> None:
    """b is the slope of the true residual logit over its score, as regression finds it."""
    w = world(8192, gain=3.0)
    signatures, R = w.encoded(1)
    base, residual = reference.scores(w.queries, signatures, R)
    true = w.logits - base
    slope = (true * residual).mean(1) / residual.pow(2).mean(1)
    b = reference.shrink(w.queries, residual, signatures.error_variances)
    assert (slope < 0.75).all()
    assert (b - slope).abs().max() < 0.05
    loud = reference.shrink(w.queries, residual, 100 * signatures.error_variances)
    assert loud.tolist() == [reference.LEAST_SHRINKAGE] * 4
    assert reference.shrink(w.queries, residual, 0 * loud).tolist() == [1.0] * 4


@pytest.mark.parametrize("group", [1, 4, 64])
@pytest.mark.parametrize("fraction", [0.003, 0.02, 0.3, 1.0])
def test_the_budget_is_the_sum_of_chances(group: int, fraction: float) -> None:
    w = world(group=group)
    log_shares = w.log_shares()
    m = log_shares.shape[1]
    pi = reference.budget_inclusion(log_shares, fraction * m)
    assert pi.sum().item() == pytest.approx(fraction * m, rel=1e-9)
    assert pi.min() >= FLOOR_SHARE * fraction * (1 - 1e-12)
    assert pi.max() <= 1
    a = log_shares.amax(0).exp()
    free = (pi < 1) & (pi > FLOOR_SHARE * fraction * 1.001)
    if free.any():
        ratio = pi[free] / a[free]
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


def test_heads_with_equal_shares_add_nothing() -> None:
    """The list is of the largest share among the heads."""
    log_shares = world(group=1).log_shares()
    alone = reference.budget_inclusion(log_shares, 20)
    torch.testing.assert_close(
        reference.budget_inclusion(log_shares.repeat(5, 1), 20), alone, rtol=0, atol=0
    )
    weaker = torch.cat([log_shares, log_shares - 30])
    torch.testing.assert_close(reference.budget_inclusion(weaker, 20), alone, rtol=0, atol=0)


def test_gain_takes_rows_until_one_more_is_not_worth_it() -> None:
    w = world(4000, group=2)
    log_shares = w.log_shares()
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    m = log_shares.shape[1]
    pi = reference.gain_inclusion(log_shares, weights, 0.009, 1, m)
    asked = (log_shares.exp() * weights[:, None]).amax(0) / 0.009
    phi = FLOOR_SHARE * asked.clamp(max=1).sum() / m
    torch.testing.assert_close(pi, asked.clamp(min=phi, max=1))
    # the derivative of w^2 p^2 (1 / pi - 1) in pi is gain^2, for the head that asked
    p = (log_shares + weights.log()[:, None]).amax(0).exp()
    free = (pi < 1) & (pi > 1.001 * phi)
    torch.testing.assert_close((p / pi)[free], torch.full_like(p[free], 0.009))
    for bounds, rows in (((200, m), 200), ((1, 10), 10)):
        bounded = reference.gain_inclusion(log_shares, weights, 0.009, *bounds)
        assert bounded.sum().item() == pytest.approx(rows)


def test_gain_weights_are_the_predicted_error() -> None:
    """A head without noise whose output is the mean value has the values' spread alone."""
    zero, two = torch.zeros(2, 8, dtype=torch.float64), torch.tensor([2.0, 9.0]).double()
    queries = zero.clone()
    queries[:, 0] = two.sqrt()
    found = reference.gain_weights(
        queries,
        torch.ones(2).double(),
        torch.full((5,), 0.5).double(),
        zero,
        zero[0],
        torch.tensor(3.0).double(),
        torch.tensor(1.5).double(),
    )
    expected = [math.sqrt(math.exp(1) * 3 / 1.5), math.sqrt(math.exp(2) * 3 / 1.5)]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("group", [1, 4])
def test_tokens_are_listed_as_often_as_their_chance_says(group: int) -> None:
    """Over steps, and over seeds; none with pi = 1 is ever missed, and the rows are the budget's."""
    w = world(group=group, gain=6.0)
    pi = reference.budget_inclusion(w.log_shares(), 0.02 * len(w.middle))
    assert (pi == 1).any()
    of_seeds = [reference.step_word(seed, 0, 0, 1) / 2**64 for seed in range(NUM_STEPS)]
    for draws in (starts(), of_seeds):
        listed = torch.stack([reference.systematic(pi, start) for start in draws])
        assert listed[:, pi == 1].all()
        counts = listed.double().sum(0)
        assert binomial_tail(counts, NUM_STEPS, pi).min() > LEVEL / (2 * len(pi))
        rows = listed.sum(1).double()
        assert (rows - pi.sum()).abs().max() < 1 + 1e-6
        assert rows.mean().item() == pytest.approx(0.02 * len(w.middle), rel=0.03)


def test_systematic_samples_have_the_asked_chances() -> None:
    pi = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    taken = torch.stack([reference.systematic(pi, start) for start in grid])
    # A grid of starts meets each interval of length pi within one step of 1 / 1000.
    assert (taken.double().mean(0) - pi).abs().max() < 0.0011


def test_unnormalised_sums_are_unbiased() -> None:
    w = world(gain=3.0)
    pi = reference.budget_inclusion(w.log_shares(), 0.05 * len(w.middle))
    e = w.logits[:, w.inside].exp()
    targets = torch.cat([e, e * w.values[w.inside, 0], e * w.values[w.inside, 1]])
    sums = [
        (targets * torch.where(reference.systematic(pi, start), 1 / pi, 0.0)).sum(1)
        for start in starts()
    ]
    assert_unbiased(torch.stack(sums), targets.sum(1))


def test_reading_everything_is_exact() -> None:
    w = world(400)
    everything = torch.ones(len(w.middle), dtype=torch.float64)
    out, bar = w.attend(everything, everything > 0)
    torch.testing.assert_close(out, w.exact)
    assert bar.tolist() == [0.0] * 4


def test_the_error_bar_is_the_error() -> None:
    """At 2 % of rows: ranks agree, and few errors are above twice the bar. Heads from flat to those
    whose scores are .9 nats off, outputs from what values cancel out to what they agree on."""
    errors, bars = [], []
    for number in range(60):
        w = world(4000, gain=0.2 + 0.04 * number, mean_value=0.1 * number, seed=7 * number % 60)
        pi = reference.budget_inclusion(w.log_shares(), 0.02 * len(w.middle))
        out, bar = w.attend(pi, reference.systematic(pi, starts(number)[0]))
        errors.append((out - w.exact).norm(dim=1) / w.exact.norm(dim=1))
        bars.append(bar)
    error, bar = torch.cat(errors), torch.cat(bars)
    ranks = torch.stack([error.argsort().argsort(), bar.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    assert (error > 2 * bar).double().mean() < 0.05
    assert 0.7 < (error / bar).median() < 1.3


@pytest.mark.parametrize("num_tokens", [4096, 16384])
@pytest.mark.parametrize(("cosine", "gain"), [(0.6, 40.0), (0.5, 60.0), (0.5, 100.0)])
def test_a_token_that_dominates_at_a_middling_angle_is_always_listed(
    num_tokens: int, cosine: float, gain: float
) -> None:
    """Queries lean on the keys' common direction; the paper's sample misses such a token."""
    for seed in range(4):
        w = dominated(num_tokens, cosine, gain, seed)
        token = num_tokens // 3
        assert w.logits.softmax(1)[0, token] > 0.5
        pi = reference.budget_inclusion(w.log_shares(seed=seed), 0.02 * len(w.middle))
        assert pi[token - w.middle.start] == 1


def test_a_draw_is_of_seed_layer_kv_head_and_position() -> None:
    base = (1, 2, 3, 4, 0)
    word = reference.step_word(*base)
    assert word == reference.step_word(*base)
    assert 0 <= word < 2**64
    changed = [reference.step_word(*base[:i], base[i] + 1, *base[i + 1 :]) for i in range(5)]
    assert len({word, *changed}) == 6
