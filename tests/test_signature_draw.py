"""The list in integers: chances that are exact, and near those of the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from signature_worlds import SINK, WINDOW, World, dominated, world
from test_signature_reference import LEVEL, assert_unbiased, binomial_tail

from vllm_magicpig import signature_blocks as blocks
from vllm_magicpig import signature_draw as draw
from vllm_magicpig import signature_reference as reference
from vllm_magicpig import signature_scores as integers

NUM_STEPS = 300


def step_of(w: World, bits: int = 2) -> draw.ScanStep:
    n, d = w.keys.shape
    signs = reference.rotation_signs(d, 0)
    keys = w.keys.float()
    encoded = blocks.encode_blocks(keys[: n // 128 * 128], signs, bits)
    static = torch.cat([keys[: w.middle.start], keys[w.middle.stop :]])
    queries = integers.query_units(w.queries.float(), 1.0)
    source = draw.DrawSource(1, 2, 3, 0)
    return draw.ScanStep(queries, static, encoded, bits, signs, w.middle, source)


def at(step: draw.ScanStep, **changed: int) -> draw.ScanStep:
    return replace(step, source=replace(step.source, **changed))


def test_the_noise_table_has_every_quantile_once() -> None:
    table = draw.noise_table()
    quantiles = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    expected = torch.floor(-quantiles.log2() * 128).long()
    assert torch.equal(table.sort().values, expected.sort().values)
    # each run of 64 has one of each 64th of the range
    bounds = expected.reshape(64, 1024)
    runs = table.reshape(1024, 64).sort(1, descending=True).values
    assert (runs <= bounds[:, 0]).all()
    assert (runs >= bounds[:, -1]).all()
    assert len({tuple(run) for run in table.reshape(1024, 64).tolist()}) == 1024


def test_chances_are_counted_in_the_table() -> None:
    table = draw.noise_table()
    for m in (-5000, -2176, -2000, -300, -1, 0, 1, 9):
        assert draw.chances(torch.tensor(m)) == (table + m > 0).sum()
    for phi in (0.0, 1e-4, 0.002, 0.1, 1.0):
        floor = torch.tensor(draw.floor_of(phi))
        assert 1 <= draw.chances(floor) <= max(1, round(phi * 65536))
        assert draw.chances(floor + 1) >= max(1, round(phi * 65536)) or phi == 1


@pytest.mark.parametrize(("group", "changed"), [(1, "position"), (4, "position"), (4, "seed")])
def test_chances_are_what_they_say_and_sums_unbiased(group: int, changed: str) -> None:
    """Over steps and over seeds; none with pi = 1 is missed."""
    w = world(500, group=group, gain=4.0)
    step = step_of(w)
    e = w.logits[:, w.inside].exp()
    targets = torch.cat([e, e * w.values[w.inside, 0], e * w.values[w.inside, 1]])
    found = [draw.choose(at(step, **{changed: i}), draw.Budget(25)) for i in range(NUM_STEPS)]
    listed = torch.stack([chosen.listed for chosen in found])
    certain = torch.stack([chosen.log_chances > 0 for chosen in found])
    assert certain.any()
    assert listed[certain].all()
    pi = torch.stack([chosen.pi for chosen in found])
    # a binomial of the mean chance is wider, if anything, than what differs a little from step to step
    counts, mean = listed.double().sum(0), pi.mean(0)
    assert binomial_tail(counts, NUM_STEPS, mean).min() > LEVEL / (2 * len(mean))
    assert_unbiased(torch.where(listed, 1 / pi, 0.0) @ targets.T, targets.sum(1))


@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_the_rows_are_the_budgets_on_average(fraction: float) -> None:
    """Z is of 16 of 62 tiles, others at each step, C of every fourth token."""
    w = world(4000, gain=2.0)
    step = step_of(w)
    budget = draw.Budget(fraction * len(w.middle))
    found = [draw.choose(at(step, position=number), budget) for number in range(100)]
    rows = torch.stack([chosen.listed.sum() for chosen in found]).double()
    assert rows.mean().item() == pytest.approx(budget.rows, rel=0.03)
    asked = torch.stack([chosen.pi.sum() for chosen in found])
    assert (rows - asked).abs().max() < 5 * asked.max().sqrt()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group", [1, 3, 64])
def test_chances_are_the_formulas_for_the_same_scores(bits: int, group: int) -> None:
    """With all tiles sampled and all tokens counted, only rounding is left: of the heads' log Z powers
    that are linear (log of 1.0407, or of 1.0616 over that) and 1.5 units, three roundings to a unit, of
    C all of these once more."""
    w = world(1100, group=group)  # 16 tiles
    step = step_of(w, bits)
    rows = 0.05 * len(w.middle)
    chosen = draw.choose(step, draw.Budget(rows))
    table = integers.tables(step.queries, step.signs)
    sums = integers.table_sums(table, step.encoded, bits)
    raw = integers.scores(sums, table.units, step.encoded, bits).double() / integers.UNITS
    errors = step.encoded.errors.double().sum() / len(step.encoded.factors.flatten())
    variance = raw[:, w.inside].pow(2).mean(1)
    b = (1 - w.queries.pow(2).sum(1) * errors / variance).clamp(0.3, 1)
    base = (w.queries @ step.encoded.means.double().T).repeat_interleave(128, 1)
    z = (base + b[:, None] * raw)[:, w.inside]
    log_shares = reference.shares(z, w.static_logits.logsumexp(1))
    expected = reference.budget_inclusion(log_shares, rows)
    floor = reference.FLOOR_SHARE * rows / len(w.middle)
    free = (expected > 1.2 * floor) & (expected < 0.8)
    assert free.sum() > 20
    bound = 2 * (0.04 + 5 / integers.UNITS)
    assert (chosen.pi / expected).log()[free].abs().max() < bound
    assert chosen.pi.sum().item() == pytest.approx(rows, rel=0.02)
    assert chosen.pi.min() >= floor * 0.95


def test_gain_takes_what_it_is_worth_within_bounds() -> None:
    w = world(1100, group=2)  # 16 tiles, all of which are sampled
    step = step_of(w)
    log_weights = torch.tensor([0, -128])
    everything = draw.Gain(0.01, log_weights, 1, len(w.middle))
    weights = 2.0 ** (log_weights / 128).double()
    expected = reference.gain_inclusion(w.log_shares(), weights, 0.01, 1, len(w.middle))
    found = draw.choose(step, everything).pi.sum().item()
    assert found == pytest.approx(expected.sum().item(), rel=0.1)
    half = draw.choose(step, replace(everything, gain=0.02)).pi.sum().item()
    assert half < 0.8 * found
    for bounds in ((400, 600), (20, 30)):
        bounded = replace(everything, least_rows=bounds[0], most_rows=bounds[1])
        rows = draw.choose(step, bounded).pi.sum().item()
        assert bounds[0] * 0.98 <= rows <= bounds[1] * 1.02


@pytest.mark.parametrize("num_tokens", [4096, 16384])
@pytest.mark.parametrize(("cosine", "gain"), [(0.6, 40.0), (0.5, 100.0)])
def test_a_token_that_dominates_at_a_middling_angle_is_always_listed(
    num_tokens: int, cosine: float, gain: float
) -> None:
    """Whichever tiles log Z is found from: in few of the steps is the token's among them."""
    w = dominated(num_tokens, cosine, gain, seed=5)
    step = step_of(w)
    for number in range(5):
        chosen = draw.choose(at(step, position=number), draw.Budget(0.02 * len(w.middle)))
        assert chosen.log_chances[num_tokens // 3 - w.middle.start] > 0


@pytest.mark.parametrize("gain", [1e-3, 1e3, 1e5])
def test_queries_of_any_size_have_a_list(gain: float) -> None:
    """Nothing wraps: flat heads draw evenly, one-hot heads list their token, and the floor holds."""
    w = world(1500, gain=gain, group=1)
    step = step_of(w)
    chosen = draw.choose(step, draw.Budget(100))
    assert chosen.pi.sum().item() <= 100
    assert chosen.pi.min() > 0
    if gain > 1:
        table = integers.tables(step.queries, step.signs)
        sums = integers.table_sums(table, step.encoded, 2)
        scores = integers.scores(sums, table.units, step.encoded, 2)
        assert scores.abs().max() == 32767


def test_a_draw_is_of_seed_layer_kv_head_and_position_alone() -> None:
    w = world(3000)
    step, budget = step_of(w), draw.Budget(60)
    first = draw.choose(step, budget)
    again = draw.choose(step_of(w), budget)
    assert torch.equal(first.listed, again.listed)
    assert torch.equal(first.log_chances, again.log_chances)
    for name in ("seed", "layer", "kv_head", "position"):
        other = draw.choose(at(step, **{name: 77}), budget)
        assert not torch.equal(first.listed, other.listed)


def test_each_65536_tokens_have_noise_of_their_own() -> None:
    source = draw.DrawSource(0, 0, 0, 0)
    noise = draw._noise(source, range(100, 131072))
    assert not torch.equal(noise[:60000], noise[65536 : 65536 + 60000])
    # and a middle that begins elsewhere has the same noise for the same token
    assert torch.equal(noise[900:2000], draw._noise(source, range(1000, 2100)))


def test_the_middle_and_what_is_always_attended_are_all_tokens() -> None:
    w = world(1000)
    step = step_of(w)
    assert len(step.static_keys) + len(w.middle) == 1000
    assert SINK + WINDOW <= len(step.static_keys) < SINK + WINDOW + 128
