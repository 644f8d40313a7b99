"""Row budgets: the sample is the reference's, whatever way matches are counted.

A budget takes the best matches of the sample, and of the last ones an even share.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from native_helpers import Layer, Rule, decode_attention, each_isa, native_codes, pool

from vllm_magicpig import _C, reference

BOUND = 1e-5  # as in test_native_decode.py
LOG_U_BOUND = (
    1.2e-7  # and per unit of t K, by which the error of p is multiplied (inclusion_table.cpp)
)


class World:
    """One request whose keys lean towards the queries more or less."""

    def __init__(
        self,
        setting: tuple[int, int],
        num_tokens: int,
        group: int = 4,
        segment_tokens: int = 256,
        seed: int = 0,
        native: ModuleType = _C,
    ) -> None:
        num_bits, num_tables = setting
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens = num_tokens
        num_blocks = -(-num_tokens // 32)
        self.layer = Layer(
            num_blocks,
            2,
            num_tables=num_tables,
            num_bits=num_bits,
            levels=[segment_tokens],
            head_size=32,
            native=native,
        )
        self.query = torch.randn(1, 2 * group, 32, generator=generator)
        leaning = torch.rand(2, num_tokens, 1, generator=generator) ** 4
        self.key = torch.randn(2, num_tokens, 32, generator=generator)
        self.key += 3 * leaning * self.query[0, ::group, None]
        self.value = torch.randn(2, num_tokens, 32, generator=generator)
        directions = reference.hyperplanes(32, num_tables, num_bits, seed)
        self.codes = reference.hash_codes(self.key, directions, num_bits)
        self.query_codes = reference.hash_codes(self.query, directions, num_bits)
        self.blocks = torch.randperm(num_blocks, generator=generator).tolist()
        self.layer.store_rows(self.blocks, 0, self.key, self.value)
        self.layer.store_codes(self.blocks, 0, self.codes)

    @property
    def tables(self) -> np.ndarray:
        return np.array([self.blocks], np.int32)

    def seal(self) -> None:
        self.layer.index.seal(self.tables, np.array([self.num_tokens], np.int32), self.layer.pool())

    def expected(self, rule: Rule) -> tuple[torch.Tensor, list[tuple[int, float]]]:
        """bool [num_q_heads, num_tokens] and thresholds."""
        counts = reference.count_matches(self.query_codes[0], self.codes)
        mask = reference.sample(
            self.query_codes[0],
            self.codes,
            rule.min_matches,
            rule.sink_tokens,
            rule.window_tokens,
        )
        middle = reference.middle(self.num_tokens, rule.sink_tokens, rule.window_tokens)
        limit = reference.row_limit(len(middle), rule.row_budget)
        codes = self.query_codes[0].tolist()
        thresholds = [(rule.min_matches, 1.0)] * len(mask)
        for head, sampled in enumerate(mask):
            if limit is None or sampled.sum() <= limit:
                continue
            phase = reference.tie_phase(rule.seed, self.num_tokens, head, codes[head])
            mask[head], *threshold = reference.pick_best(counts[head], sampled, limit, phase)
            thresholds[head] = tuple(threshold)
        return mask, thresholds

    def check_sample(self, rule: Rule, isa: _C.Isa, num_threads: int = 2) -> None:
        mask, thresholds = self.expected(rule)
        for index in (self.layer.index, None):
            (heads,) = self.layer.native.sample(
                self.layer.pages,
                self.layer.rule(rule),
                index,
                native_codes(self.query_codes),
                self.tables,
                np.array([self.num_tokens], np.int32),
                isa=isa,
                pool=self.layer.pool(num_threads),
            )
            for (positions, matches, fraction), row, threshold in zip(
                heads, mask, thresholds, strict=True
            ):
                np.testing.assert_array_equal(positions, row.nonzero().flatten())
                assert (matches, fraction) == (threshold[0], pytest.approx(threshold[1], rel=1e-6))

    def check_decode(self, rule: Rule, isa: _C.Isa) -> None:
        mask, thresholds = self.expected(rule)
        center = torch.zeros(2, 32)
        out = np.full(self.query.shape, np.nan, np.float32)
        lse = np.full(self.query.shape[:2], np.nan, np.float32)
        rows, _ = decode_attention(
            self.layer.pages,
            self.layer.rule(rule),
            self.layer.index,
            self.query.numpy(),
            native_codes(self.query_codes),
            center.numpy(),
            self.tables,
            np.array([self.num_tokens], np.int32),
            out,
            lse,
            scale=0.2,
            exact_below=0,
            isa=isa,
            pool=self.layer.pool(),
            native=self.layer.native,
        )
        expected_out, expected_lse = reference.sampled_attention(
            self.query[0],
            self.key,
            self.value,
            0.2,
            mask,
            center,
            self.layer.num_bits,
            self.layer.num_tables,
            thresholds,
            rule.sink_tokens,
            rule.window_tokens,
        )
        np.testing.assert_array_equal(rows[0], mask.sum(-1))
        bound = BOUND + LOG_U_BOUND * max(t for t, _ in thresholds) * self.layer.num_bits
        np.testing.assert_allclose(lse[0], expected_lse, rtol=0, atol=bound)
        np.testing.assert_allclose(out[0], expected_out, rtol=0, atol=bound)


LENGTHS = [1, 15, 17, 31, 32, 33, 127, 128, 129, 223, 4095, 4097, 5000]


@each_isa
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("setting", [(2, 255), (4, 30)], ids=str)
def test_groups(isa: _C.Isa, setting: tuple[int, int], group: int) -> None:
    world = World(setting, 1000, group=group, seed=group)
    world.seal()
    for budget in (0.0, 0.02):
        world.check_sample(Rule(setting[1] // 2, row_budget=budget), isa)


@each_isa
@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("setting", [(2, 255), (4, 30), (10, 150)], ids=str)
def test_a_budget_takes_the_best(isa: _C.Isa, setting: tuple[int, int], num_tokens: int) -> None:
    world = World(setting, num_tokens, seed=num_tokens)
    for budget in (1e-9, 0.005, 0.013, 0.1, 0.9, 1.0):
        for rule in (Rule(2, row_budget=budget), Rule(3, 40, 70, budget, seed=7)):
            world.check_sample(rule, isa)
    world.seal()
    world.check_sample(Rule(2, row_budget=0.013), isa, num_threads=3)


@each_isa
@pytest.mark.parametrize("setting", [(2, 255), (4, 30), (10, 150)], ids=str)
def test_rows_within_a_budget_are_weighted_by_their_marginal_probability(
    isa: _C.Isa, setting: tuple[int, int]
) -> None:
    world = World(setting, 5000)
    world.seal()
    for budget in (0.002, 0.01, 0.3):
        world.check_decode(Rule(2, row_budget=budget), isa)


@each_isa
def test_no_head_takes_more_than_its_budget(isa: _C.Isa) -> None:
    """Not even where all tokens match equally well; and each is as likely to be taken."""
    world = World((2, 128), 3000)
    world.codes[:] = world.codes[:, :1]
    world.layer.store_codes(world.blocks, 0, world.codes)
    taken = np.zeros(3000, int)
    for seed in range(40):
        rule = Rule(2, 0, 0, row_budget=0.1, seed=seed)
        world.check_sample(rule, isa)
        taken[world.expected(rule)[0][0].numpy()] += 1
    assert taken.sum() == 40 * 300
    assert taken.max() < 16  # Binomial(40, 0.1): P[>= 16] is 1e-6


@each_isa
def test_the_choice_is_the_requests_own(isa: _C.Isa) -> None:
    """Neither its row in the batch nor its neighbours nor the number of threads change it."""
    world = World((2, 128), 3000)
    rule = Rule(2, row_budget=0.01, seed=3)
    native = rule.native(2, 128)
    codes = native_codes(world.query_codes)
    lens = np.array([3000, 2000, 3000], np.int32)
    for num_threads in (1, 2, 3):
        arguments = {"isa": isa, "pool": pool(num_threads)}
        pages = world.layer.pages
        (alone,) = _C.sample(
            pages, native, None, codes, world.tables, np.array([3000], np.int32), **arguments
        )
        batch = _C.sample(
            *(pages, native, None, codes.repeat(3, 0), world.tables.repeat(3, 0), lens), **arguments
        )
        for row in (0, 2):
            for one, other in zip(alone, batch[row], strict=True):
                np.testing.assert_array_equal(one[0], other[0])
