"""Candidates for magicpig's next estimator, in reference form.

    estimator = make_estimator("G", rows=0.02, options=options, layer_index=1, scale=128**-0.5, seed=0)
    out, rows = estimator.attend(q, k, v)

    native      tokens that match in min_matches tables, weighted by 1 / u: the paper
    B           the same within a row budget: the engine's option `rows`
    norm-aware  a threshold on matches that asks less of long keys, and a uniform floor
    B+G         B, corrected by a regression on the middle's moments
    G0          norm-aware, corrected by the middle's mean value
    G           norm-aware, corrected by the regression

q, k, v are those of a decode step, as `capture` gives them; every estimator is a `Method`.
Symbols: K bits per table, L tables, c matching tables of a token, T its threshold, u the probability
that it is gathered, w = 1 / u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_magicpig.accuracy.inclusion import tail_table
from vllm_magicpig.accuracy.methods import MagicPig, MethodSettings, Step
from vllm_magicpig.config import MagicPigOptions

FLOOR_SHARE = 0.25
"""eta: the part of the row budget that is drawn uniformly; without it flat heads get worse."""

BISECTIONS = 40  # of tau: to 1e-12 of its range

CLIPPED_QUANTILE = 0.98
"""Weights of the regression's target beyond this quantile of the sample are clipped in the fit."""

MIN_UNCERTAIN_ROWS = 12
"""Gathered rows with w > 1.5 that a fit needs; below, the plain weights are as good."""

UNCERTAIN_WEIGHT = 1.5


class NormAware(MagicPig):
    """Includes a token with probability pi = clip(c + 1 - T, 0, 1), where T is what a token of its norm
    matches on average if its centred logit is tau; tau follows from the row budget. A part
    FLOOR_SHARE of the budget goes to all tokens alike."""

    def sample_weights(self, step: Step) -> torch.Tensor:
        bounds = self.logit_bounds(step).double()
        p = self.collision_probability(step, bounds).double()
        counts = self.matches(step, self.keys.hash_queries(step.queries)).double()
        target = (1 - FLOOR_SHARE) * step.limit
        thresholds = _thresholds(counts, bounds, self.options, target)
        pi = (counts + 1 - thresholds).clamp(0, 1)
        # Only where more tokens than the budget match in all tables, beyond which no threshold reaches.
        share = (target / pi.sum(1, keepdim=True).clamp(min=target)).clamp(max=1)
        pi = share * pi
        left_out = (1 - pi).sum(1, keepdim=True).clamp(min=1e-9)
        floor = (FLOOR_SHARE * step.limit / left_out).clamp(max=1)
        start = torch.rand(len(p), 1, generator=self.generator(p.device), device=p.device)
        mask = systematic_sample(pi + (1 - pi) * floor, start)
        # u0 = E[clip(c + 1 - T, 0, 1)]: all that match in more than floor(T) tables, and a part of
        # those that match in floor(T).
        least = thresholds.floor()
        table = tail_table(self.options.K, self.options.L, step.logits.device)
        u0 = share * table.log_mixed(p, least.long(), 1 - (thresholds - least)).exp()
        u = u0 + (1 - u0) * floor
        return torch.where(mask, -torch.log(u), -math.inf).to(step.logits.dtype)


def _thresholds(
    counts: torch.Tensor, bounds: torch.Tensor, options: MagicPigOptions, target: float
) -> torch.Tensor:
    """T: float64 [num_q_heads, m], such that the sum of clip(c + 1 - T, 0, 1) is `target` rows.

    counts: c; bounds: scale |q| |k - mu|; both float64 [num_q_heads, m].
    """
    high = bounds.amax(1, keepdim=True).clamp(min=1e-9)
    low = -high

    def at(tau: torch.Tensor) -> torch.Tensor:
        cosine = (tau / bounds.clamp(min=1e-12)).clamp(-1, 1)
        return options.L * (1 - torch.arccos(cosine) / math.pi) ** options.K

    for _ in range(BISECTIONS):
        tau = (low + high) / 2
        too_many = (counts + 1 - at(tau)).clamp(0, 1).sum(1, keepdim=True) > target
        low, high = torch.where(too_many, tau, low), torch.where(too_many, high, tau)
    return at(high)


def systematic_sample(pi: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Each token with its probability, evenly over the positions: bool [num_q_heads, m].

    pi: float64 [num_q_heads, m], from 0 to 1; start: [num_q_heads, 1], uniform in [0, 1). The number
    that is taken is that of the integers between start and start + sum(pi). Source: Madow (1949).
    """
    ends = start + pi.cumsum(1)
    passed = torch.cat([start, ends], 1).floor()
    return passed.diff(dim=1) > 0


@dataclass(frozen=True)
class Moments:
    """Of one kv head's middle; the engine would keep them as tokens leave the window.

    mean_key, mean_value: float64 [head_size]; covariance: mean (v - vbar)(k - kbar)^T, float64
    [head_size, head_size]; num_tokens: of the middle.
    """

    num_tokens: int
    mean_key: torch.Tensor
    mean_value: torch.Tensor
    covariance: torch.Tensor

    @staticmethod
    def of(keys: torch.Tensor, values: torch.Tensor) -> Moments:
        """keys, values: float [m, head_size]."""
        k, v = keys.double(), values.double()
        mean_key, mean_value = k.mean(0), v.mean(0)
        covariance = (v - mean_value).T @ (k - mean_key) / len(k)
        return Moments(len(k), mean_key, mean_value, covariance)


def regression_sums(
    logits: torch.Tensor,
    log_weights: torch.Tensor,
    values: torch.Tensor,
    query: torch.Tensor,
    moments: Moments,
    slope: bool,
    shift: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Z, N): estimates of sum exp(s - shift) and sum exp(s - shift) v over the middle of one query
    head, from the rows gathered of it: the generalised regression estimator (Saerndal, Swensson and
    Wretman, "Model Assisted Survey Sampling", 1992, chapter 6).

    logits: s, float64 [r]; log_weights: log w, float64 [r]; values: float64 [r, head_size]; query:
    float64 [head_size], scale included; slope: False fits the mean alone (b = 0); shift: keeps exp in
    range.
    Where exp(s) were a + b x exactly, with x = s - q.kbar, the result would be exact. The plain
    weighted sums where the sample is too small to fit, or the corrected Z is not positive.
    """
    weights, e = log_weights.exp(), (logits - shift).exp()
    plain = (weights * e).sum(), (weights * e) @ values
    uncertain = weights > UNCERTAIN_WEIGHT
    if int(uncertain.sum()) < MIN_UNCERTAIN_ROWS:
        return plain
    x = logits - query @ moments.mean_key
    y = e.clamp(max=torch.quantile(e[uncertain], CLIPPED_QUANTILE))
    variance = weights * (weights - 1).clamp(min=0)
    total = variance.sum()
    mean_x, mean_y = (variance * x).sum() / total, (variance * y).sum() / total
    b = x.new_zeros(())
    spread = (variance * (x - mean_x) ** 2).sum()
    if slope and spread > 0:
        b = (variance * (x - mean_x) * (y - mean_y)).sum() / spread
    a = mean_y - b * mean_x
    rest = weights * (e - a - b * x)
    n = moments.num_tokens
    z = n * a + rest.sum()
    if z <= 0:
        return plain
    return z, n * a * moments.mean_value + n * b * (moments.covariance @ query) + rest @ values


class Corrected(MagicPig):
    """The weighted sums of the sample, corrected by what is known of all of the middle."""

    slope = True

    def reset(self) -> None:
        super().reset()
        self._moments: list[Moments] = []

    def output(
        self, step: Step, logits: torch.Tensor, values: torch.Tensor, added: torch.Tensor
    ) -> torch.Tensor:
        inside = slice(step.middle.start, step.middle.stop)
        if not self._moments or self._moments[0].num_tokens != len(step.middle):
            pairs = zip(step.keys[:, inside], values[:, inside], strict=True)
            self._moments = [Moments.of(k, v) for k, v in pairs]
        group = len(logits) // len(values)
        shift = logits.amax(1).double()
        static = (logits.double() - shift[:, None]).exp()
        static[:, inside] = 0
        outs = []
        for head, log_weights in enumerate(added.double()):
            kv = head // group
            rows = (log_weights > -math.inf).nonzero().flatten()
            z, n = regression_sums(
                step.logits[head, rows].double(),
                log_weights[rows],
                values[kv, inside][rows].double(),
                step.scale * step.queries[head].double(),
                self._moments[kv],
                self.slope,
                float(shift[head]),
            )
            outs.append((static[head] @ values[kv].double() + n) / (static[head].sum() + z))
        return torch.stack(outs).to(values.dtype)


class MeanCorrected(Corrected, NormAware):
    """G with b = 0: needs the mean value and the number of tokens only."""

    slope = False


class RegressionCorrected(Corrected, NormAware):
    """G."""


ESTIMATORS: dict[str, type[MagicPig]] = {
    "native": MagicPig,
    "B": MagicPig,
    "norm-aware": NormAware,
    "B+G": Corrected,
    "G0": MeanCorrected,
    "G": RegressionCorrected,
}


def make_estimator(
    name: str, rows: float, options: MagicPigOptions, layer_index: int, scale: float, seed: int = 0
) -> MagicPig:
    """name: one of ESTIMATORS; rows: fraction of the middle that a query head may gather, which
    "native" takes no notice of; seed: of the draws beside the hyperplanes. ValueError for another.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is unknown; choose one of {', '.join(ESTIMATORS)}.")
    settings = MethodSettings("magicpig", 0.0 if name == "native" else rows, options, seed)
    return ESTIMATORS[name](settings, layer_index, scale)
