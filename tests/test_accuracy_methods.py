"""The accuracy methods against reference.py and the native kernel: what each must gather and give."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from native_helpers import Layer, Rule, native_codes, pool

from vllm_magicpig import _C, reference, signature_reference
from vllm_magicpig.accuracy.inclusion import TailTable
from vllm_magicpig.accuracy.key_codes import KeyCodes, count_matches, pick_best
from vllm_magicpig.accuracy.methods import (
    METHODS,
    MagicPig,
    Method,
    MethodSettings,
    Step,
    make_method,
)
from vllm_magicpig.accuracy.page_bounds import PageBounds
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.projection import Projection

SCALE = 0.3
OPTIONS = MagicPigOptions(
    index="buckets",
    K=4,
    L=30,
    sink_tokens=3,
    window_tokens=8,
    exact_below=0,
    dense_layers=(),
    center="none",
)
SETTINGS = [(4, 30), (10, 150)]
SAMPLES = [(setting, rows) for setting in SETTINGS for rows in (0.0, 0.02, 0.3, 1.0)]
ESTIMATORS = ["magicpig", "oracle-sampling", "uniform"]  # of a full budget: exact but for sampling


class World:
    """q, k and v of one layer whose keys lean towards the queries more or less; float64."""

    def __init__(self, num_tokens: int, group: int = 3, head_size: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.q = normal(2 * group, head_size)
        self.k = normal(2, num_tokens, head_size)
        self.k += 2 * torch.rand(2, num_tokens, 1, generator=generator) ** 4 * self.q[::group, None]
        self.v = normal(2, num_tokens, head_size)

    def step(self, options: MagicPigOptions, limit: int) -> Step:
        middle = reference.middle(self.k.shape[1], options.sink_tokens, options.window_tokens)
        group = len(self.q) // len(self.k)
        keys = self.k.repeat_interleave(group, 0)[:, middle.start : middle.stop]
        logits = SCALE * torch.einsum("hd,hnd->hn", self.q, keys)
        every = SCALE * torch.einsum("hd,hnd->hn", self.q, self.k.repeat_interleave(group, 0))
        static = torch.cat([every[:, : middle.start], every[:, middle.stop :]], 1).logsumexp(1)
        return Step(self.q, self.k, logits, SCALE, middle, limit, static)

    def exact(self) -> torch.Tensor:
        return reference.exact_attention(self.q, self.k, self.v, SCALE)[0]


def method_of(name: str, rows: float = 0.1, options: MagicPigOptions = OPTIONS) -> Method:
    return make_method(MethodSettings(name, rows, options), layer_index=1, scale=SCALE)


@pytest.mark.parametrize("num_tokens", [1, 3, 11, 12, 200])
def test_exact_is_the_references(num_tokens: int) -> None:
    world = World(num_tokens)
    out, rows = method_of("exact").attend(world.q, world.k, world.v)
    torch.testing.assert_close(out, world.exact(), rtol=1e-12, atol=1e-12)
    assert rows.tolist() == [max(num_tokens - 11, 0)] * 6


@pytest.mark.parametrize("name", ["top-k", "quest", "uniform", "streaming"])
@pytest.mark.parametrize("num_tokens", [12, 27, 28, 100])
def test_a_full_budget_is_exact(name: str, num_tokens: int) -> None:
    world = World(num_tokens)
    out, rows = method_of(name, 1.0).attend(world.q, world.k, world.v)
    torch.testing.assert_close(out, world.exact(), rtol=1e-12, atol=1e-12)
    assert rows.tolist() == [num_tokens - 11] * 6


@pytest.mark.parametrize("name", METHODS)
def test_a_short_middle_is_attended_exactly(name: str) -> None:
    world = World(60)
    method = method_of(name, options=replace(OPTIONS, exact_below=50))
    out, _ = method.attend(world.q, world.k, world.v)
    torch.testing.assert_close(out, world.exact(), rtol=1e-12, atol=1e-12)
    method = method_of(name, options=replace(OPTIONS, exact_below=49))
    _, rows = method.attend(world.q, world.k, world.v)
    assert (rows < 49).all() or name == "exact"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "exact"])
@pytest.mark.parametrize("num_tokens", [28, 129, 500])
def test_the_budget_holds(name: str, num_tokens: int) -> None:
    """Quest takes one page at least; all others one row at least."""
    world = World(num_tokens)
    for rows in (1e-9, 0.03, 0.5):
        method = method_of(name, rows)
        least = 16 if name == "quest" else 1
        limit = max(least, int(rows * (num_tokens - 11)))
        _, gathered = method.attend(world.q, world.k, world.v)
        assert (gathered <= limit).all()
        if name in ("top-k", "uniform", "streaming"):
            assert (gathered == limit).all()


def test_the_middle_is_chosen_as_the_name_says() -> None:
    world = World(111)
    step = world.step(OPTIONS, 10)
    top = method_of("top-k").log_weights(step) > -math.inf
    assert torch.equal(top, step.logits >= step.logits.topk(10).values[:, -1:])
    recent = method_of("streaming").log_weights(step) > -math.inf
    assert recent[:, -10:].all()
    assert recent.sum() == 10 * 6


@pytest.mark.parametrize(("setting", "rows"), SAMPLES, ids=str)
def test_magicpig_is_the_references(setting: tuple[int, int], rows: float) -> None:
    """The sample exactly; the output as far as the table of log u allows."""
    num_bits, num_tables = setting
    options = replace(OPTIONS, K=num_bits, L=num_tables, center="passage", seed=5)
    world = World(700, seed=num_bits)
    method = method_of("magicpig", rows, options)
    out, gathered = method.attend(world.q, world.k, world.v)
    assert isinstance(method, MagicPig)

    center = world.k.mean(1).float()
    directions = reference.hyperplanes(32, num_tables, num_bits, reference.layer_seed(5, 1))
    codes = reference.hash_codes(world.k.float() - center[:, None], directions, num_bits)
    query_codes = reference.hash_codes(world.q.float(), directions, num_bits)
    counts = reference.count_matches(query_codes, codes)
    mask = reference.sample(query_codes, codes, 2, 3, 8)
    thresholds = [(2, 1.0)] * 6
    limit = reference.row_limit(689, rows)
    codes_of_heads = query_codes.tolist()
    for head, sampled in enumerate(mask):
        if limit is not None and sampled.sum() > limit:
            phase = reference.tie_phase(5, 700, head, codes_of_heads[head])
            mask[head], t, r = reference.pick_best(counts[head], sampled, limit, phase)
            thresholds[head] = (t, r)
    expected, _ = reference.sampled_attention(
        *(world.q, world.k, world.v, SCALE, mask, center, num_bits, num_tables, thresholds, 3, 8)
    )
    assert gathered.tolist() == mask.sum(1).tolist()
    assert 0 < mask.sum() < mask.numel()
    found, t, r = method.sample(world.step(options, limit or 689))
    assert torch.equal(found, mask[:, 3:-8])
    assert list(zip(t.tolist(), r.tolist(), strict=True)) == thresholds
    # log u is off by at most an eighth of the table's second difference; a change of all logits by up
    # to e moves a softmax mean by at most 2 e times the largest value. The centre is float32.
    table = TailTable(num_bits, num_tables).log_tails[2 : int(t.max()) + 2, 2000:]
    wrong = table.diff(n=2, dim=1).abs().max() / 8 + 1e-6
    assert (out - expected).abs().max() < 2 * wrong * world.v.abs().max()


def test_the_table_of_tails_is_the_references() -> None:
    p = torch.linspace(0.3, 1, 77, dtype=torch.float64)
    table = TailTable(10, 150)
    for t, r in ((1, 1.0), (2, 1.0), (2, 0.25), (40, 0.5), (150, 0.5)):
        found = table.log_mixed(p, torch.tensor(t), torch.tensor(r, dtype=torch.float64))
        expected = reference.log_mixed_inclusion_probability(p, 10, 150, t, r)
        curvature = table.log_tails[t : t + 2, 2400:].diff(n=2, dim=1).abs().max().item()
        inside = expected > reference.LOG_U_FLOOR + 1  # the table has a kink at its floor
        assert inside.any()
        wrong = (found - expected)[inside].abs().max()
        assert wrong <= curvature / 8 + 1e-9, (t, r)


def test_pick_best_is_the_references_in_every_case() -> None:
    """Counts with many ties, none, too few, and all alike."""
    generator = torch.Generator().manual_seed(0)
    cases = [torch.randint(0, high, (90,), generator=generator) for high in (2, 3, 5, 40)]
    counts = torch.stack([*cases, torch.zeros(90).long(), torch.full((90,), 7)]).short()
    phases = torch.randint(0, 1 << 62, (len(counts),), generator=generator).tolist()
    for limit in (1, 2, 20, 89, 90, 200):
        for least in (1, 2, 6):
            mask, t, r = pick_best(counts, least, limit, phases)
            for head, phase in enumerate(phases):
                sampled = counts[head] >= least
                expected = (sampled, least, 1.0)
                if sampled.sum() > limit:
                    expected = reference.pick_best(counts[head], sampled, limit, phase)
                assert torch.equal(mask[head], expected[0])
                assert (t[head].item(), r[head].item()) == expected[1:]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_codes_made_bit_by_bit_are_those_made_at_once(setting: tuple[int, int]) -> None:
    options = replace(OPTIONS, K=setting[0], L=setting[1], center="passage")
    keys = World(1200).k.float()
    at_once, bit_by_bit = (KeyCodes(options, 3) for _ in range(2))
    at_once.extend(keys[:, :600])  # fixes the same centre
    at_once.reset()
    at_once.extend(keys)
    for n in (100, 600, 601, 602, 1100, 1200):
        bit_by_bit.extend(keys[:, :n])
        assert bit_by_bit.num_tokens == (n if n > 511 else 0)
    assert torch.equal(at_once.center, bit_by_bit.center)
    assert torch.equal(at_once.codes, bit_by_bit.codes)
    assert torch.equal(at_once.norms, bit_by_bit.norms)


@pytest.mark.parametrize(("setting", "rows"), SAMPLES, ids=str)
def test_the_native_kernel_takes_the_same_rows(setting: tuple[int, int], rows: float) -> None:
    """Equal hyperplanes and centre: the engine's codes are these but for bits within rounding, and
    equal codes give equal samples."""
    num_bits, num_tables = setting
    options = replace(
        OPTIONS, K=num_bits, L=num_tables, rows=rows or None, center="passage", seed=9
    )
    num_tokens, isa = 1000, _C.resolve_isa("auto")
    world = World(num_tokens)
    world.q, world.k = world.q.float(), world.k.float()
    method = method_of("magicpig", rows, options)
    method.observe(world.k)
    assert isinstance(method, MagicPig)
    center = method.keys.center
    assert center is not None

    projection = Projection(options, 1, 32, isa, pool())
    for vectors, ours, theirs in (
        (
            (world.k - center[:, None]).transpose(0, 1),
            method.keys.codes.permute(2, 0, 1),
            projection.hash_keys(world.k.transpose(0, 1), center),
        ),
        (world.q, method.keys.hash_queries(world.q), projection.hash_queries(world.q[None])[0]),
    ):
        differ = native_codes(ours.int()) != theirs
        projected = vectors.double() @ projection.directions.double()
        # A sum of 128 products in float32, in either order: 128 roundings of at most |x| |r| each.
        bound = 128 * 2**-23 * vectors.double().norm(dim=-1, keepdim=True) * math.sqrt(128)
        unsure = (projected.abs() < bound).numpy()
        unsure = unsure.reshape(*theirs.shape, -1).any(-1)
        assert not (differ & ~unsure).any()

    layer = Layer(32, 2, num_tables=num_tables, num_bits=num_bits, levels=[256], head_size=32)
    layer.store_codes(range(32), 0, method.keys.codes.transpose(1, 2).int())
    (heads,) = _C.sample(
        layer.pages,
        layer.rule(Rule(2, 3, 8, rows, seed=9)),
        layer.index,
        native_codes(method.keys.hash_queries(world.q).int())[None],
        np.arange(32, dtype=np.int32)[None],
        np.array([num_tokens], np.int32),
        isa=isa,
        pool=pool(),
    )
    mask, t, r = method.sample(world.step(options, reference.row_limit(989, rows) or 989))
    assert mask.any()
    for head, (positions, matches, fraction) in enumerate(heads):
        np.testing.assert_array_equal(positions, 3 + mask[head].nonzero().flatten())
        assert (matches, fraction) == (t[head], pytest.approx(r[head].item(), rel=1e-6))


NUM_SEEDS = 400
LEVEL = 1e-3  # chance that a right method would have been refused when the seeds were chosen


@pytest.mark.parametrize("name", ["magicpig", "oracle-sampling", "uniform"])
def test_sums_over_the_sample_are_unbiased(name: str) -> None:
    """Softmax mass and the same times V, by the central limit theorem over seeds. (Within a budget
    magicpig's threshold follows from the counts, and its weights are not exactly unbiased.)"""
    world = World(60, group=1)
    world.q *= 0.2  # spreads the mass: where u is 1 - 1e-9, no number of seeds shows what is missed
    rows, limit = (0.0, 49) if name == "magicpig" else (0.3, 14)
    step = world.step(OPTIONS, limit)
    sums = []
    for seed in range(NUM_SEEDS):
        settings = MethodSettings(name, rows, replace(OPTIONS, seed=seed), seed)
        method = make_method(settings, 0, SCALE)
        method.observe(world.k)
        mass = (step.logits + method.log_weights(step))[0].exp()
        sums.append(torch.cat([mass.sum()[None], mass @ world.v[0, 3:-8]]))
    found = torch.stack(sums)
    mass = step.logits[0].exp()
    expected = torch.cat([mass.sum()[None], mass @ world.v[0, 3:-8]])
    error = found.std(0) / math.sqrt(NUM_SEEDS)
    if name == "oracle-sampling":  # knows the mass: exact
        torch.testing.assert_close(found[:, 0], expected[:1].expand(NUM_SEEDS))
        found, expected, error = found[:, 1:], expected[1:], error[1:]
    assert (error > 0).all()
    z = ((found.mean(0) - expected) / error).abs().max().item()
    assert math.erfc(z / math.sqrt(2)) > LEVEL / len(expected), z


def test_quests_bound_is_above_every_logit_of_its_page() -> None:
    for num_tokens in (12, 20, 27, 28, 200, 205):
        world = World(num_tokens)
        middle = reference.middle(num_tokens, 3, 8)
        bounds = PageBounds(16, 3)
        for n in (num_tokens // 2, num_tokens):
            bounds.extend(world.k[:, :n])
        found = bounds.logit_bounds(world.q, world.k, middle)
        logits = world.step(OPTIONS, 1).logits / SCALE
        pages = [page.amax(1) for page in logits.split(16, dim=1)]
        assert found.shape == (6, len(pages))
        assert (found >= torch.stack(pages, 1) - 1e-12).all()
        # And no looser than the extremes of a page allow: one token's page is that token's logit.
        if len(middle) % 16 == 1:
            torch.testing.assert_close(found[:, -1], logits[:, -1])


def test_quest_takes_the_pages_of_the_largest_bounds() -> None:
    world = World(3 + 160 + 8)
    step = world.step(OPTIONS, 40)
    method = method_of("quest")
    method.observe(world.k)
    chosen = (method.log_weights(step) > -math.inf).reshape(6, 10, 16)
    assert (chosen.any(2) == chosen.all(2)).all()
    bounds = PageBounds(16, 3)
    bounds.extend(world.k)
    best = bounds.logit_bounds(world.q, world.k, step.middle).topk(2).indices.sort().values
    assert torch.equal(chosen.any(2).nonzero()[:, 1].reshape(6, 2), best)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_seed_tells_the_result(name: str) -> None:
    world = World(300)
    settings = MethodSettings(name, 0.05, OPTIONS)
    method = make_method(settings, 1, SCALE)
    first, second = (method.attend(world.q, world.k, world.v)[0] for _ in range(2))
    method.reset()
    assert torch.equal(method.attend(world.q, world.k, world.v)[0], first)
    # magicpig errs alike in every step, since the hyperplanes are the same.
    assert torch.equal(first, second) == (name == "magicpig")
    other = replace(settings, seed=1, options=replace(OPTIONS, seed=1))
    assert not torch.equal(make_method(other, 1, SCALE).attend(world.q, world.k, world.v)[0], first)


def test_k_of_zero_is_exact() -> None:
    world = World(300)
    out, _ = method_of("magicpig", 0.02, replace(OPTIONS, K=0)).attend(world.q, world.k, world.v)
    torch.testing.assert_close(out, world.exact(), rtol=1e-12, atol=1e-12)


def test_counts_are_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(0, 3, (6, 300), generator=generator).short()
    keys = torch.randint(0, 3, (2, 50, 300), generator=generator).short()
    expected = reference.count_matches(queries, keys)
    assert torch.equal(count_matches(queries, keys.transpose(1, 2)).long(), expected)


def test_bad_settings_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"'topk' is unknown; choose one of exact, .*'top-k'"):
        MethodSettings("topk")
    with pytest.raises(ValueError, match=r"'quest' is 0.0, but must be above 0 and up to 1"):
        MethodSettings("quest", rows=0.0)
    with pytest.raises(ValueError, match=r"'magicpig' is 1.5, but must be 0 "):
        MethodSettings("magicpig", rows=1.5)


def test_the_serving_path_imports_none_of_it() -> None:
    """From the modules that vLLM loads, through what they import, whenever they do."""
    package = Path(reference.__file__).parent
    reached, waiting = set(), ["__init__", "platform", "cuda_platform", "cpu_worker", "cuda_worker"]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        path = package / f"{module.replace('.', '/')}.py"
        if not path.exists():  # a package, the extension
            continue
        text = path.read_text("utf-8")
        waiting += re.findall(r"vllm_magicpig\.([\w.]+)", text)
        for names in re.findall(r"from vllm_magicpig import ([\w, ]+)", text):
            waiting += names.split(", ")
    assert {"backend", "decode", "projection", "reference", "_C"} <= reached
    assert not [module for module in reached if module.startswith("accuracy")]


def test_a_full_budget_of_signatures_is_exact() -> None:
    """And of the middle, which ends with the last full block, all rows are read."""
    world = World(300)
    out, rows = method_of("signatures", 1.0).attend(world.q, world.k, world.v)
    torch.testing.assert_close(out, world.exact(), rtol=1e-9, atol=1e-9)
    assert rows.tolist() == [256 - 3] * 6


def test_signatures_list_the_references_rows() -> None:
    """One list for a group, of the formulas' chances, drawn by seed, layer, kv head and position."""
    world = World(500)
    options = replace(OPTIONS, seed=5)
    method = method_of("signatures", 0.1, options)
    method.observe(world.k)
    step = replace(world.step(options, 38), middle=method.middle(500))
    found = method.log_weights(step)
    rotation = signature_reference.rotation(32, reference.layer_seed(5, 1))
    for kv_head in range(2):
        of_group = slice(3 * kv_head, 3 * kv_head + 3)
        queries = SCALE * world.q[of_group]
        signatures = signature_reference.encode(world.k[kv_head, :384], rotation, 2)
        base, residual = (
            part[:, 3:384] for part in signature_reference.scores(queries, signatures, rotation)
        )
        b = signature_reference.shrink(queries, residual, signatures.error_variances[3:384])
        z = base + b[:, None] * residual
        log_shares = signature_reference.shares(z, step.log_static[of_group])
        pi = signature_reference.budget_inclusion(log_shares, 38)
        word = signature_reference.step_word(5, 1, kv_head, 499)
        listed = signature_reference.systematic(pi, word / 2**64)
        expected = torch.where(listed, -pi.log(), -math.inf)
        torch.testing.assert_close(found[of_group], expected.expand(3, -1))


def test_signatures_read_more_where_a_gain_asks_for_it() -> None:
    """Within bounds: 64 rows at least, 16 % of the middle at most, and no rows of the budget."""
    world = World(3000)
    counts = []
    for gain in (1e-6, 0.006, 0.012, 10.0):
        settings = MethodSettings("signatures", 0.5, OPTIONS, row_gain=gain)
        _, rows = make_method(settings, 1, SCALE).attend(world.q, world.k, world.v)
        counts.append(rows.float().mean().item())
    assert counts[0] == pytest.approx(0.16 * 2941, abs=1)
    assert counts[0] > counts[1] > counts[2] > counts[3]
    assert counts[3] == pytest.approx(64, abs=1)


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("signatures", {"bits": 3}, "bits is 3, but must be 1, 2 or 4"),
        ("signatures", {"row_gain": 0.0}, "row_gain of method 'signatures' is 0.0"),
        ("quest", {"row_gain": 0.01}, "is for signatures alone"),
    ],
)
def test_wrong_settings_of_signatures_are_refused(
    name: str, changed: dict[str, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        MethodSettings(name, **changed)  # type: ignore[arg-type]
