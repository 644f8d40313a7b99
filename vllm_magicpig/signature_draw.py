"""The list of a step of signatures in integers, as the kernels repeat it bit for bit.

    step = ScanStep(query_units(queries, scale), static_keys, encoded, bits, signs, middle, source)
    chosen = choose(step, Budget(rows))       the list, and the chance of each token of the middle

The logarithm of a chance is an integer M in the units of signature_scores.py, and a token is listed
where M + noise > 0: the noise is the -log of a uniform number in the same units, from a table. Whatever
the scores are, the chance of a token is exactly what its M says: errors below cost rows, never bias.

    1  exact logits of sink, window and open block; q.mu of the blocks; the tables of the queries
    2  scores of some tiles at equal distances: b and log Z of each head
    3  A_i = max over heads of (score + base - log Z), 16 bits a token, of all tiles
    4  log C, such that the chances of some A_i of each tile add up to their part of the budget
    5  M_i = max(floor, A_i + log C), and the list

Steps 3 and 5 may be divided among threads anywhere between tiles. A log C from the tiles of step 2
would save keeping the A_i, but tiles are clusters: from 16, rows are 7 to 10 % above the budget.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from vllm_magicpig.reference import split_mix
from vllm_magicpig.signature_blocks import TILE_TOKENS, EncodedBlocks, in_order, place
from vllm_magicpig.signature_reference import (
    BLOCK_TOKENS,
    FLOOR_SHARE,
    LEAST_SHRINKAGE,
    step_word,
)
from vllm_magicpig.signature_scores import (
    adds,
    dot,
    log2_units,
    mulhrs,
    power,
    rounded,
    scores,
    sum_of_powers,
    table_sums,
    tables,
)

NOISE_ENTRIES = 1 << 16

LINEAR_EXCESS = 1 / (2 * math.log(2) ** 2)
"""Mean of (1 + f) / 2^f over f in [0, 1]: what powers that are linear between powers of two exceed."""

LEAST_SAMPLED_TILES = 16

SAMPLED_PART = 32
"""One tile in so many is scored for b and log Z, LEAST_SAMPLED_TILES at least."""

COUNTED_PLACES = ((4096, 64), (16384, 32))
"""In middles below so many tokens, step 4 adds up the chances at so many of a tile's 64 places; at 16
in longer ones. The fewer, the more rows beyond the budget on average: C is convex in what they ask."""


@dataclass(frozen=True)
class DrawSource:
    """Where a step's draw comes from, as in `step_word`."""

    seed: int
    layer: int
    kv_head: int
    position: int

    def word(self, part: int) -> int:
        return step_word(self.seed, self.layer, self.kv_head, self.position, part)


@dataclass(frozen=True)
class ScanStep:
    """queries: float32 [g, d], in units (`query_units`); static_keys: float32 [s, d], of the sink, then
    open block and window, by position, s >= 1; encoded: all full blocks; signs: of the rotation;
    middle: of `signature_reference.middle`, not empty."""

    queries: torch.Tensor
    static_keys: torch.Tensor
    encoded: EncodedBlocks
    bits: int
    signs: torch.Tensor
    middle: range
    source: DrawSource


@dataclass(frozen=True)
class Budget:
    """The sum of chances: rows of the middle, above 0."""

    rows: float


@dataclass(frozen=True)
class Gain:
    """Chances by equal marginal gain. log_weights: int64 [g], round(UNITS log(w_h)); bounds in rows."""

    gain: float
    log_weights: torch.Tensor
    least_rows: float
    most_rows: float


@dataclass(frozen=True)
class Chosen:
    """Of the middle's m tokens. log_chances: M, int64 [m]; listed: bool [m]."""

    log_chances: torch.Tensor
    listed: torch.Tensor

    @property
    def pi(self) -> torch.Tensor:
        """float64 [m]: exact."""
        return chances(self.log_chances).double() / NOISE_ENTRIES


@functools.cache
def noise_table() -> torch.Tensor:
    """int64 [65536]: floor(-log2((i + 1/2) / 65536) 128) of every i, in the order of a fixed shuffle.

    Each run of 64 has one entry of each 64th of the range, so that as many tokens of a tile are listed
    as their chances add up to, or nearly.
    """
    strata, runs = TILE_TOKENS, NOISE_ENTRIES // TILE_TOKENS
    entries = [
        math.floor(-math.log2((i + 0.5) / NOISE_ENTRIES) * 128) for i in range(NOISE_ENTRIES)
    ]
    words = iter(range(1 << 20))

    def shuffled(values: list[int]) -> list[int]:
        """Fisher and Yates, from the last place down; word n is split_mix(n)."""
        for i in range(len(values) - 1, 0, -1):
            j = split_mix(next(words)) % (i + 1)
            values[i], values[j] = values[j], values[i]
        return values

    of_stratum = [shuffled(entries[s * runs : (s + 1) * runs]) for s in range(strata)]
    table = [of_stratum[s][run] for run in range(runs) for s in shuffled(list(range(strata)))]
    return torch.tensor(table)


@functools.cache
def _above() -> torch.Tensor:
    """Entries of the noise table above k, for k = 0 to the largest."""
    counts = noise_table().bincount()
    return NOISE_ENTRIES - counts.cumsum(0)


def chances(log_chances: torch.Tensor) -> torch.Tensor:
    """How many of the 65,536 noises list a token, int64: all above M = 0."""
    above = _above()
    found = above[(-log_chances).clamp(0, len(above) - 1)]
    return torch.where(log_chances > 0, NOISE_ENTRIES, found)


def floor_of(phi: float) -> int:
    """The M of the floor: the largest whose chance is at most phi, and 1 in 65,536 at least."""
    asked = max(1, round(phi * NOISE_ENTRIES))
    reached = int((_above() > asked).sum())
    least = int((_above() > 0).sum()) - 1
    return -min(reached, least)


def choose(step: ScanStep, rule: Budget | Gain) -> Chosen:
    """The list of one step and kv head."""
    middle = step.middle
    table = tables(step.queries, step.signs)
    base = rounded(dot(step.queries, step.encoded.means.float())).repeat_interleave(BLOCK_TOKENS, 1)
    tokens = _sampled_tokens(middle, step.source)
    inside = (tokens >= middle.start) & (tokens < middle.stop)
    sums = table_sums(table, step.encoded, step.bits)
    sampled = scores(sums, table.units, step.encoded, step.bits)[:, tokens]
    b = _shrinkage(step, sampled[:, inside])
    rescaled = mulhrs(sampled, (b * 32768).round().clamp(max=32767).long()[:, None])
    log_z = _log_normaliser(step, rescaled, base[:, tokens], inside)
    if isinstance(rule, Gain):
        log_z = log_z - rule.log_weights
    offset = (base - log_z[:, None]).clamp(-32768, 32767)
    shrunk = scores(sums, table.units * b, step.encoded, step.bits)
    asked = adds(shrunk, offset).amax(0)[middle.start : middle.stop]
    log_c, phi = _scale(asked[_counted(middle)], rule, len(middle))
    log_chances = adds(asked, torch.tensor(log_c)).clamp(min=floor_of(phi))
    return Chosen(log_chances, log_chances + _noise(step.source, middle) > 0)


def _counted(middle: range) -> torch.Tensor:
    """bool [m]: the tokens whose chances are added up."""
    places = next((places for below, places in COUNTED_PLACES if len(middle) < below), 16)
    return place(torch.arange(middle.start, middle.stop) % TILE_TOKENS) < places


def _sampled_tokens(middle: range, source: DrawSource) -> torch.Tensor:
    """Of tiles at equal distances, the first at random: ((i 2^32 + r) all / k) >> 32 of the middle's,
    with r the low 32 bits of word 0. In the order of their places: int64 [k 64]."""
    first = middle.start // TILE_TOKENS
    all_tiles = (middle.stop - 1) // TILE_TOKENS + 1 - first
    k = min(max(LEAST_SAMPLED_TILES, all_tiles // SAMPLED_PART), all_tiles)
    r = source.word(0) & 0xFFFFFFFF
    tiles = torch.tensor([first + (((i << 32) + r) * all_tiles // k >> 32) for i in range(k)])
    return (tiles[:, None] * TILE_TOKENS + place(torch.arange(TILE_TOKENS)).argsort()).flatten()


def _shrinkage(step: ScanStep, sampled: torch.Tensor) -> torch.Tensor:
    """b: float32 [g], as `signature_reference.shrink`; sampled: unshrunk, inside the middle. The mean
    of e2 is that of all blocks that the middle is in."""
    first, last = step.middle.start // BLOCK_TOKENS, (step.middle.stop - 1) // BLOCK_TOKENS
    errors = step.encoded.errors[first : last + 1]
    mean_error = in_order(errors) / (len(errors) * BLOCK_TOKENS)
    squares = torch.cat([dot(q[None], q[None])[0] for q in step.queries])
    variance = sampled.pow(2).sum(1).float() / sampled.shape[1]
    b = 1 - squares * mean_error / variance
    return torch.where(variance > 0, b, 1.0).clamp(LEAST_SHRINKAGE, 1.0)


def _log_normaliser(
    step: ScanStep, shrunk: torch.Tensor, base: torch.Tensor, inside: torch.Tensor
) -> torch.Tensor:
    """log of the whole softmax's sum in units, int64 [g]: the static keys and the sampled tokens, which
    stand for all of the middle. shrunk, base: int64 [g, sampled tokens]."""
    static = rounded(dot(step.queries, step.static_keys))
    reference = torch.maximum(static.amax(1), base.amax(1))[:, None]
    z = adds(shrunk, (base - reference).clamp(-32768, 32767)).masked_fill(~inside, -32768)
    top, static_top = z.amax(1), static.amax(1) - reference[:, 0]
    most = torch.maximum(top, static_top)
    stands_for = torch.tensor(len(step.middle) / int(inside.sum()), dtype=torch.float32)
    both = sum_of_powers(z - top[:, None]) * power(top - most) * stands_for + sum_of_powers(
        static - static.amax(1, keepdim=True)
    ) * power(static_top - most)
    excess = torch.tensor(1 / LINEAR_EXCESS, dtype=torch.float32)
    return reference[:, 0] + most + log2_units(both * excess)


def _scale(asked: torch.Tensor, rule: Budget | Gain, m: int) -> tuple[int, float]:
    """(log C in units, phi). asked: A of the counted tokens, int64."""
    if isinstance(rule, Budget):
        return _solve(asked, rule.rows, m)
    log_c = -int(log2_units(torch.tensor([rule.gain], dtype=torch.float32)))
    counted = int(chances(adds(asked, torch.tensor(log_c))).sum())
    rows = counted / NOISE_ENTRIES * m / len(asked)
    if rows < rule.least_rows:
        return _solve(asked, rule.least_rows, m)
    if rows > rule.most_rows:
        return _solve(asked, rule.most_rows, m)
    return log_c, FLOOR_SHARE * rows / m


def _solve(asked: torch.Tensor, rows: float, m: int) -> tuple[int, float]:
    """The largest log C whose chances, floor included, add up to no more than the budget's."""
    phi = FLOOR_SHARE * rows / m
    floor, most = floor_of(phi), int(rows / m * len(asked) * NOISE_ENTRIES)
    low, high = -65536, 65536
    while high - low > 1:
        log_c = (low + high) // 2
        log_chances = adds(asked, torch.tensor(log_c)).clamp(min=floor)
        low, high = (log_c, high) if int(chances(log_chances).sum()) <= most else (low, log_c)
    return low, phi


def _noise(source: DrawSource, middle: range) -> torch.Tensor:
    """int64 [m]. A token's noise is at its tile's 64 tile + place from an offset into the table, which
    goes round; the offset is that of the step, and another for each 65,536 tokens."""
    token = torch.arange(middle.start, middle.stop)
    offsets = torch.tensor(
        [
            source.word(1 + part) & (NOISE_ENTRIES - 1)
            for part in range(middle.stop // NOISE_ENTRIES + 1)
        ]
    )
    at = offsets[token // NOISE_ENTRIES] + token // TILE_TOKENS * TILE_TOKENS + place(token % 64)
    return noise_table()[at & (NOISE_ENTRIES - 1)]
