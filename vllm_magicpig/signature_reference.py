"""Signatures in plain PyTorch: rows listed by predicted logits, corrected by the chances of the list.

    signatures = encode(keys, rotation(head_size, seed), bits)        once a block of 128 keys
    base, residual = scores(queries, signatures, R)                   a step: every logit, predicted
    log_shares = shares(base + shrink(...) * residual, log_static)    of the whole softmax
    pi = budget_inclusion(log_shares, rows)                           one list for the group
    listed = systematic(pi, start)
    out, lse = estimate(...), bar = error_bar(...)                    reads the listed rows alone

The oracle of the method, in the dtype of its input (float64 in tests); everything is of one kv head and
the g query heads of its group. Queries are scaled: they hold the softmax scale, so that q.k is a logit.
signature_blocks.py has the bytes of a block, signature_scores.py and signature_draw.py the integers of
a step, which the kernels repeat bit for bit.

Symbols: d head size, p the power of two from it up, n tokens; x = R (k - mu) a rotated residual, c its
code, r their cosine; z a predicted logit, a a share of the softmax, pi the chance of being listed.

The scores are those of RaBitQ (Gao and Long, arXiv 2405.12497; several bits: 2409.09913).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_magicpig.reference import hadamard, split_mix

BLOCK_TOKENS = 128
"""Keys that share a mean. Blocks of 32 are no better; the mean of all keys doubles the errors."""

QUANTISER_STEP = {1: 1.0, 2: 0.9957, 4: 0.335}
"""Step of the uniform quantiser of a unit normal with the least square error (Max, 1960), by bits; with
1 bit the sign is all."""

STEP_FACTORS = (0.85, 1.0, 1.15)
"""Of the step, tried for each key: rotated keys are nearly normal, not quite. Six factors from .7 to
1.5 leave .05 % less error at 2 bits and 1.5 % less at 4; the step alone, 1.3 % and 17 % more."""

FLOOR_SHARE = 0.1
"""Of the rows, what the floor phi = FLOOR_SHARE m / n would take alone: no weight is above 1 / phi."""

LEAST_SHRINKAGE = 0.3

MOST_NOISE = 2.0
"""The score noise that counts in a head's weight, nats squared: e^noise is clipped at e^2."""


def rotation_signs(head_size: int, seed: int) -> torch.Tensor:
    """D1 and D2 of R = H D2 H D1 / p: int8 [2, p], 1 or -1, on the CPU; the same in every process."""
    size = 1 << (head_size - 1).bit_length()
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randint(0, 2, (2, size), generator=generator, dtype=torch.int8) - 1


def rotation(head_size: int, seed: int) -> torch.Tensor:
    """R: float64 [p, head_size] with orthonormal columns; vectors count as padded with zeros to p."""
    first, second = rotation_signs(head_size, seed).double()
    h = hadamard(len(first))
    turned: torch.Tensor = (h * second) @ (h * first) / len(first)
    return turned[:, :head_size]


@dataclass(frozen=True)
class Signatures:
    """Of n keys, whole blocks. means: float [blocks, d], as stored (bfloat16); codes: float [n, p],
    half-integers; factors: float [n]; error_variances: float [n], of the score of a unit query."""

    means: torch.Tensor
    codes: torch.Tensor
    factors: torch.Tensor
    error_variances: torch.Tensor

    @property
    def base_means(self) -> torch.Tensor:
        """[n, d]: of each token its block's."""
        return self.means.repeat_interleave(BLOCK_TOKENS, 0)


def encode(keys: torch.Tensor, R: torch.Tensor, bits: int) -> Signatures:
    """keys: float [n, d], n a multiple of BLOCK_TOKENS; R: of `rotation`; bits: 1, 2 or 4.

    c_j = clip(floor(x_j / delta), -2^(bits - 1), 2^(bits - 1) - 1) + 1/2 for the best of three deltas,
    and f = |x|^2 / <x, c>, so that f <R q, c> is q.(k - mu) on average over rotations: f c is x and an
    error at a right angle to x, which R turns anywhere. A key that is its block's mean has f = 0.
    """
    blocks = keys.reshape(-1, BLOCK_TOKENS, keys.shape[1])
    means = blocks.mean(1).bfloat16().to(keys.dtype)
    x = (blocks - means[:, None]).flatten(0, 1) @ R.to(keys.dtype).T
    squares = x.pow(2).sum(1)
    rms = (squares / x.shape[1]).sqrt()
    codes, best = torch.zeros_like(x), torch.full_like(rms, -1.0)
    for factor in STEP_FACTORS:
        delta = (QUANTISER_STEP[bits] * factor * rms).clamp(min=torch.finfo(x.dtype).tiny)
        levels = (x / delta[:, None]).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        tried = levels + 0.5
        cosine = (x * tried).sum(1) / (tried.norm(dim=1) * squares.sqrt())
        better = cosine > best
        codes = torch.where(better[:, None], tried, codes)
        best = torch.where(better, cosine, best)
    alike = (x * codes).sum(1)
    factors = torch.where(squares > 0, squares / alike, 0.0)
    lost = (1 - best**2).clamp(min=0) / (best**2 * (x.shape[1] - 1))
    return Signatures(means, codes, factors, torch.where(squares > 0, squares * lost, 0.0))


def scores(
    queries: torch.Tensor, signatures: Signatures, R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(base, residual), both float [g, n]: q.mu of each token's block, which is exact, and f <R q, c>,
    which is q.(k - mu) but for an error of mean 0 and variance |q|^2 e2."""
    base = (queries @ signatures.means.T).repeat_interleave(BLOCK_TOKENS, 1)
    rotated = queries @ R.to(queries.dtype).T
    return base, rotated @ signatures.codes.T * signatures.factors


def middle(num_tokens: int, sink_tokens: int, window_tokens: int) -> range:
    """Positions that are sampled: those between sink and window whose block is full, and so encoded."""
    full = num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    start = min(sink_tokens, num_tokens)
    return range(start, max(start, min(num_tokens - window_tokens, full)))


def shrink(
    queries: torch.Tensor, residual: torch.Tensor, error_variances: torch.Tensor
) -> torch.Tensor:
    """b: float [g], the slope of E[s | residual score], clipped from LEAST_SHRINKAGE to 1.

    The best of many noisy scores is too high: what is noise of their variance is taken off. A block's
    residuals have mean 0, so that they shrink towards 0. residual: [g, m] and error_variances: [m], of
    the middle.
    """
    noise = queries.pow(2).sum(1) * error_variances.mean()
    variance = residual.pow(2).mean(1).clamp(min=torch.finfo(residual.dtype).tiny)
    return (1 - noise / variance).clamp(LEAST_SHRINKAGE, 1.0)


def shares(z: torch.Tensor, log_static: torch.Tensor) -> torch.Tensor:
    """log p: predicted shares of the whole softmax, float [g, m].

    z: [g, m], predicted logits of the middle; log_static: [g], log of the exact sum of exp(s) over what
    is always attended, which comes first: a head that the sink satisfies asks for few rows.
    """
    return z - torch.logaddexp(z.logsumexp(1), log_static)[:, None]


def budget_inclusion(log_shares: torch.Tensor, rows: float) -> torch.Tensor:
    """pi: [m], one list for the group, with sum `rows`: `row_budget`, as a fraction of the middle.

    a_i = max_h p_hi and pi_i = min(1, max(C a_i, phi)). Every head of the group uses every row of the
    list. rows: above 0 and up to m.
    """
    return _scaled(log_shares.amax(0), rows)


def gain_inclusion(
    log_shares: torch.Tensor,
    weights: torch.Tensor,
    gain: float,
    least_rows: float,
    most_rows: float,
) -> torch.Tensor:
    """pi: [m] by equal marginal gain: `row_gain`.

    pi_i = min(1, max(max_h w_h p_hi / gain, phi)): rows are taken until one more lowers the layer's
    mean square error by less than gain^2, so that a flat head gets more than a sharp one. weights: of
    `gain_weights`, [g]; where sum pi leaves least_rows to most_rows, the bound is the budget.
    """
    asked = (log_shares + weights.log()[:, None]).amax(0)
    rows = float((asked - math.log(gain)).exp().clamp(max=1).sum())
    pi = _with_floor(asked - math.log(gain), rows)
    for bound, beyond in ((least_rows, pi.sum() < least_rows), (most_rows, pi.sum() > most_rows)):
        if beyond:
            return _scaled(asked, bound)
    return pi


def _scaled(log_asked: torch.Tensor, rows: float) -> torch.Tensor:
    """C by bisection."""
    low, high = -log_asked.max() - 5, -log_asked.min() + 5
    for _ in range(60):
        log_c = (low + high) / 2
        too_many = _with_floor(log_asked + log_c, rows).sum() > rows
        low, high = (low, log_c) if too_many else (log_c, high)
    return _with_floor(log_asked + high, rows)


def _with_floor(log_pi: torch.Tensor, rows: float) -> torch.Tensor:
    return log_pi.clamp(min=math.log(FLOOR_SHARE * rows / len(log_pi))).clamp(max=0).exp()


def gain_weights(
    queries: torch.Tensor,
    shrinkage: torch.Tensor,
    error_variances: torch.Tensor,
    predicted: torch.Tensor,
    mean_value: torch.Tensor,
    value_variance: torch.Tensor,
    layer_square: torch.Tensor,
) -> torch.Tensor:
    """w: [g], the square root of what a head's predicted error counts in the layer's.

    Its square error is w^2 sum_i p_i^2 (1 / pi_i - 1): the scores' noise times the spread of the values
    around the output. predicted: [g, d], S N_static / Z_static + (1 - S) vbar, S the predicted share
    of what is always attended; mean_value: vbar [d] and value_variance: mean |v - vbar|^2, of the
    middle; layer_square: mean |predicted|^2 over the layer's heads.
    """
    noise = (shrinkage * queries.pow(2).sum(1) * error_variances.mean()).clamp(max=MOST_NOISE)
    spread = value_variance + (predicted - mean_value).pow(2).sum(1)
    return (noise.exp() * spread / layer_square).sqrt()


def step_word(seed: int, layer: int, kv_head: int, position: int, part: int = 0) -> int:
    """64 bits that a step's draw comes from; batch, threads and instruction set have no part in it.

    position: of the step's query; part: where one word does not do.
    """
    word = split_mix(seed)
    for value in (layer, kv_head, position, part):
        word = split_mix(word ^ value)
    return word


def systematic(pi: torch.Tensor, start: float) -> torch.Tensor:
    """bool [m]: each token with its chance, evenly over the positions (Madow, 1949).

    start: uniform in [0, 1); as many are listed as integers lie between it and start + sum(pi).
    """
    ends = torch.cat([pi.new_zeros(1), pi.cumsum(0)]) + start
    return ends.floor().diff() > 0


def estimate(
    logits: torch.Tensor, values: torch.Tensor, pi: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with logits s - log pi over what was read: (out [g, d], lse [g]).

    logits: s, exact, [g, r] of sink, window, open block (pi = 1) and listed rows; values: [r, d].
    """
    corrected = logits - pi.log()
    return corrected.softmax(1) @ values, corrected.logsumexp(1)


def error_bar(
    logits: torch.Tensor,
    values: torch.Tensor,
    pi: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """The expected relative error |out - exact| / |exact| of each head, float [g].

    The square root of sum w (w - 1) e^2 |v - out|^2 / (Z^2 |out|^2) over the rows that were read, where
    w = 1 / pi and e = exp(s): the Horvitz-Thompson estimate of the variance of a ratio, for
    independent draws. Arguments as `estimate` takes and gives them.
    """
    share = (logits - lse[:, None]).exp()
    spread = torch.cdist(out, values).pow(2)
    variance = (share.pow(2) * spread * (1 / pi) * (1 / pi - 1)).sum(1)
    return (variance / out.pow(2).sum(1)).sqrt()
