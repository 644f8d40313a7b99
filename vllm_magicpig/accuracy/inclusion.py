"""The binomial tails behind inclusion probabilities, tabulated over the collision probability."""

from __future__ import annotations

import functools
import math

import torch

from vllm_magicpig.reference import LOG_U_FLOOR

GRID_STEPS = 8192
"""Linear interpolation of a function f between steps h is off by at most h**2 max|f''| / 8, here about
1e-8 t K / p**2 of log u."""


class TailTable:
    """log P[Binomial(L, p**K) >= t] for t from 0 to L + 1, by linear interpolation in p.

    `reference.log_inclusion_probability` sums the tail of every token anew; at 16K tokens that takes
    seconds a step.
    """

    def __init__(self, num_bits: int, num_tables: int) -> None:
        x = torch.linspace(0, 1, GRID_STEPS + 1, dtype=torch.float64) ** num_bits
        log_x, log_rest = torch.log(x)[:, None], torch.log1p(-x)[:, None]
        k = torch.arange(num_tables + 1, dtype=torch.float64)
        log_choose = (
            math.lgamma(num_tables + 1) - torch.lgamma(k + 1) - torch.lgamma(num_tables - k + 1)
        )
        # 0 * log 0 counts as 0, as in the reference.
        successes = torch.where(k > 0, k * log_x, 0.0)
        failures = torch.where(k < num_tables, (num_tables - k) * log_rest, 0.0)
        log_pmf = (log_choose + successes + failures).clamp(min=-1e300)
        nothing = torch.full((len(x), 1), -1e300, dtype=torch.float64)
        at_least = torch.cat([log_pmf.flip(1).logcumsumexp(1).flip(1), nothing], dim=1)
        below = torch.cat([nothing, log_pmf.logcumsumexp(1)], dim=1)
        # Where the tail is most of the mass the other side keeps the precision.
        tails = torch.where(below < math.log(0.5), torch.log1p(-below.exp()), at_least)
        self.log_tails = tails.clamp(min=LOG_U_FLOOR).T.contiguous()
        """float64 [L + 2, GRID_STEPS + 1]; never below LOG_U_FLOOR."""

    def log_tail(self, p: torch.Tensor, min_matches: torch.Tensor) -> torch.Tensor:
        """p: float [...], on any device; min_matches: int64 of a shape that p's broadcasts with, from
        0 to L + 1. Returns float64 [...] on p's device, never below LOG_U_FLOOR."""
        table = self.log_tails.to(p.device).flatten()
        place = p.double().clamp(0, 1) * GRID_STEPS
        step = place.floor().clamp(max=GRID_STEPS - 1)
        first = min_matches * (GRID_STEPS + 1) + step.long()
        return torch.lerp(table[first], table[first + 1], place - step)

    def log_mixed(
        self, p: torch.Tensor, min_matches: torch.Tensor, fraction: torch.Tensor
    ) -> torch.Tensor:
        """log u with u = P[c > t] + r P[c = t], t = min_matches and r = fraction; twin of
        `reference.log_mixed_inclusion_probability`. fraction: float64 in (0, 1]."""
        both = torch.logaddexp(
            self.log_tail(p, min_matches) + torch.log(fraction),
            self.log_tail(p, min_matches + 1) + torch.log1p(-fraction),
        )
        return both.clamp(min=LOG_U_FLOOR)


@functools.cache
def tail_table(num_bits: int, num_tables: int) -> TailTable:
    """One for all layers: it takes 10 MB."""
    return TailTable(num_bits, num_tables)
