"""Two methods' log-probabilities of the same forced tokens, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from forced_records import Position

BLOCK_TOKENS = 16
"""Neighbouring tokens share their context and so their errors: the units of the interval are blocks."""

# Two-sided 95 % points of Student's t by degrees of freedom; beyond, the largest one below is taken.
STUDENT_T = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.0, 120: 1.98,
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """tokens: compared. difference: mean of method - reference of the log-probability of a forced
    token, in nats, and half the width of its 95 % interval; perplexity_percent: what that adds to the
    reference's perplexity, and the interval's ends; absolute: mean |difference|; agreement_percent:
    of first choices; kl: from the reference to the method, in nats, as `divergence` has it."""

    tokens: int
    difference: float
    difference_half_width: float
    perplexity_percent: float
    perplexity_percent_low: float
    perplexity_percent_high: float
    absolute: float
    agreement_percent: float
    kl_mean: float
    kl_p50: float
    kl_p90: float
    kl_max: float


def compare(
    reference: Sequence[Sequence[Position]], method: Sequence[Sequence[Position]]
) -> Comparison:
    """Both: documents of positions, paired.

    Raises ValueError where they are not of the same tokens.
    """
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(reference, method, strict=True)]
    flat = [pair for document in pairs for pair in document]
    if any(a.token != b.token for a, b in flat):
        raise ValueError("the two methods were forced to other tokens; run both anew.")
    differences = [np.array([b.logprob - a.logprob for a, b in document]) for document in pairs]
    every = np.concatenate(differences)
    mean = float(every.mean())
    half = half_width(differences)
    divergences = np.array([divergence(a, b) for a, b in flat])
    p50, p90 = np.percentile(divergences, [50, 90])
    return Comparison(
        tokens=len(flat),
        difference=mean,
        difference_half_width=half,
        perplexity_percent=_percent(-mean),
        perplexity_percent_low=_percent(-mean - half),
        perplexity_percent_high=_percent(-mean + half),
        absolute=float(np.abs(every).mean()),
        agreement_percent=100
        * sum(a.top_tokens[0] == b.top_tokens[0] for a, b in flat)
        / len(flat),
        kl_mean=float(divergences.mean()),
        kl_p50=float(p50),
        kl_p90=float(p90),
        kl_max=float(divergences.max()),
    )


def half_width(differences: Sequence[npt.NDArray[np.float64]]) -> float:
    """Half the 95 % interval of the mean over all documents, from the means of blocks of BLOCK_TOKENS;
    a document's last block may be shorter. Infinite with a single block."""
    blocks = [
        (document[start : start + BLOCK_TOKENS])
        for document in differences
        for start in range(0, len(document), BLOCK_TOKENS)
    ]
    if len(blocks) < 2:
        return math.inf
    total = sum(len(block) for block in blocks)
    mean = sum(float(block.sum()) for block in blocks) / total
    # Of a ratio: blocks weigh what they hold.
    deviations = [float(block.sum()) - mean * len(block) for block in blocks]
    count = len(blocks)
    variance = count / (count - 1) * sum(d * d for d in deviations) / total**2
    freedom = max(known for known in STUDENT_T if known <= count - 1)
    return STUDENT_T[freedom] * math.sqrt(variance)


def divergence(reference: Position, method: Position) -> float:
    """KL from reference to method in nats, a lower bound of that over the whole vocabulary: tokens that
    both name one by one, all others together."""
    theirs = dict(zip(method.top_tokens, method.top_logprobs, strict=True))
    theirs[method.token] = method.logprob
    ours = dict(zip(reference.top_tokens, reference.top_logprobs, strict=True))
    ours[reference.token] = reference.logprob
    shared = [token for token in ours if token in theirs]
    p = [math.exp(ours[token]) for token in shared]
    q = [math.exp(theirs[token]) for token in shared]
    found = sum(a * (ours[token] - theirs[token]) for token, a in zip(shared, p, strict=True))
    rest_p, rest_q = 1 - sum(p), 1 - sum(q)
    # Rounding takes as much from a rest as it holds where the shared tokens are nearly everything.
    if min(rest_p, rest_q) > 1e-6:
        found += rest_p * math.log(rest_p / rest_q)
    return max(found, 0.0)


def perplexity(documents: Sequence[Sequence[Position]]) -> float:
    return math.exp(-float(np.mean([p.logprob for document in documents for p in document])))


def _percent(nats: float) -> float:
    return 100 * math.expm1(nats) if nats < 700 else math.inf
