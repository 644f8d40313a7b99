"""The law of the sample: tokens are found as often as u says, so that sums over it are unbiased.

Over seeds of the hyperplanes, through the native hashing, lookup and attention. All seeds are
fixed, so the tests pass or fail for good; the level is the chance that a correct kernel would have
been refused when they were written.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_helpers import Layer, Rule, decode_attention, pool

from vllm_magicpig import _C, reference

NUM_SEEDS = 200
HEAD_SIZE = 16
LEVEL = 1e-3  # of all comparisons of one test together (Bonferroni)
SETTINGS = [(10, 150, 2), (6, 40, 3)]
P = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]


def keys_at(p: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A unit query, and unit keys at the angles pi (1 - p) from it, each in a plane of its own."""
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    angles = math.pi * (1 - torch.tensor(p))
    keys = torch.cos(angles)[:, None] * basis[0] + torch.sin(angles)[:, None] * basis[1:][: len(p)]
    return basis[0], keys


class Trials:
    """One request per seed over the same keys; only hyperplanes, and so codes, differ."""

    def __init__(self, setting: tuple[int, int, int], size: float) -> None:
        self.num_bits, self.num_tables, min_matches = setting
        self.isa = _C.resolve_isa("auto")
        self.rule = Rule(min_matches, 0, 0)
        self.unit_query, keys = keys_at(P)
        self.keys, self.query = keys, size * self.unit_query
        self.values = torch.randn(len(P), HEAD_SIZE, generator=torch.Generator().manual_seed(1))
        self.layer = Layer(
            NUM_SEEDS,
            num_tables=self.num_tables,
            num_bits=self.num_bits,
            head_size=HEAD_SIZE,
            levels=[32],
        )
        query_codes = []
        for seed in range(NUM_SEEDS):
            directions = reference.hyperplanes(HEAD_SIZE, self.num_tables, self.num_bits, seed)
            projections = torch.cat([self.query[None], keys]) @ directions
            codes = _C.pack_codes(projections.numpy(), self.num_bits, self.isa, pool())
            query_codes.append(codes[:1])
            self.layer.store_rows([seed], 0, keys[None], self.values[None])
            self.layer.store_codes([seed], 0, torch.from_numpy(codes[1:].astype(np.int32))[None])
        self.query_codes = torch.from_numpy(np.stack(query_codes).astype(np.int32))
        self.tables = np.arange(NUM_SEEDS, dtype=np.int32)[:, None]
        self.lens = np.full(NUM_SEEDS, len(P), np.int32)


def binomial_tails(successes: int, trials: int, log_u: float) -> tuple[float, float]:
    """P[X <= successes] and P[X >= successes] of Binomial(trials, u)."""
    u = math.exp(log_u)
    pmf = [math.comb(trials, k) * u**k * (1 - u) ** (trials - k) for k in range(trials + 1)]
    return sum(pmf[: successes + 1]), sum(pmf[successes:])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_tokens_are_found_as_often_as_u_says(setting: tuple[int, int, int]) -> None:
    trials = Trials(setting, size=1.0)
    found = trials.layer.sample(
        trials.query_codes, trials.tables, trials.lens, trials.rule, trials.isa
    )
    hits = np.zeros(len(P), dtype=int)
    for (ids,) in found:
        hits[ids] += 1
    log_u = reference.log_inclusion_probability(torch.tensor(P), *setting)
    for p, count, expected in zip(P, hits.tolist(), log_u.tolist(), strict=True):
        tails = binomial_tails(count, NUM_SEEDS, expected)
        assert min(tails) > LEVEL / (2 * len(P)), (p, count / NUM_SEEDS, math.exp(expected))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_sums_over_the_sample_are_unbiased(setting: tuple[int, int, int]) -> None:
    """Sum of exp(logit) / u, and the same times V: by the central limit theorem over seeds.

    The denominator is exp(lse), the numerator exp(lse) * out; their ratio alone is biased.
    """
    trials = Trials(setting, size=4.0)
    out = np.empty((NUM_SEEDS, 1, HEAD_SIZE), np.float32)
    lse = np.empty((NUM_SEEDS, 1), np.float32)
    decode_attention(
        trials.layer.pages,
        trials.rule.native(*setting[:2]),
        trials.layer.index,
        trials.query.expand(NUM_SEEDS, 1, HEAD_SIZE).numpy().copy(),
        trials.query_codes.numpy().astype(np.uint16),
        np.zeros((1, HEAD_SIZE), np.float32),
        trials.tables,
        trials.lens,
        out,
        lse,
        scale=1.0,
        exact_below=0,
        isa=trials.isa,
        pool=pool(),
    )
    denominator = np.exp(lse.astype(np.float64))
    sums = np.concatenate([denominator, denominator * out[:, 0]], axis=1)
    weights = torch.exp(trials.keys @ trials.query).double().numpy()
    expected = np.concatenate([[weights.sum()], weights @ trials.values.double().numpy()])
    standard_error = sums.std(axis=0, ddof=1) / math.sqrt(NUM_SEEDS)
    z = np.abs(sums.mean(axis=0) - expected) / standard_error
    # Two-sided normal tails of LEVEL over 17 comparisons.
    assert (standard_error > 0).all()
    assert math.erfc(z.max() / math.sqrt(2)) > LEVEL / len(z), z
