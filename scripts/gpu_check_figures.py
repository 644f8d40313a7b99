"""What one engine's events say of its speed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_check_jobs import EXAMPLES
from gpu_check_parts import Answered

sys.path.append(str(EXAMPLES))
from compare_figures import Case, EngineFacts, Figures, Run, figures


@dataclass(frozen=True)
class HostStep:
    """What magicpig's host callbacks did in a decode step, from two magicpig_stats: us of a step, all
    sampled layers; lookup and attend as time of each thread, the sum over threads divided by
    their number; callback is the whole of it. Rows: those that all query heads sampled."""

    layers: int
    threads: int
    steps: int
    hash_us: float
    lookup_us: float
    attend_us: float
    callback_us: float
    sampled_rows: float
    sampled_fraction: float

    @staticmethod
    def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> HostStep:
        steps = after["decode_steps"] - before["decode_steps"]
        if steps < 1:
            raise ValueError("magicpig counted no decode step during a case")

        def us(name: str) -> float:
            """Of the steps between; the statistics hold means since the start."""
            totals = [
                stats[f"{name}_us_per_step"] * stats["decode_steps"] for stats in (after, before)
            ]
            return (totals[0] - totals[1]) / steps

        rows = after["sampled_rows"] - before["sampled_rows"]
        middle = after["middle_rows"] - before["middle_rows"]
        threads = after["threads"]
        return HostStep(
            layers=after["sampled_layers"],
            threads=threads,
            steps=steps,
            hash_us=us("hash"),
            lookup_us=us("lookup") / threads,
            attend_us=us("attend") / threads,
            callback_us=us("decode"),
            sampled_rows=rows / steps,
            sampled_fraction=rows / middle if middle else 0.0,
        )


@dataclass(frozen=True)
class Measured:
    """A case of one backend. tpot_us: mean time per output token after the first, of all requests,
    which for several holds the prefill of those that came later; host: magicpig's."""

    case: Case
    figures: Figures
    tpot_us: float
    host: HostStep | None

    @staticmethod
    def from_event(given: Mapping[str, Any]) -> Measured:
        case, run = Case(given["length"], given["num_requests"]), Run.from_dict(given["run"])
        spans = [
            (request.token_times[-1] - request.token_times[0]) / (len(request.token_times) - 1)
            for request in run.requests
        ]
        host = HostStep.between(given["before"], given["after"]) if given["after"] else None
        return Measured(case, figures(case, [run]), 1e6 * sum(spans) / len(spans), host)

    @property
    def decode_step_us(self) -> float | None:
        """Of a step with all requests and nothing but decoding; None where there was none."""
        if self.case.num_requests == 1:
            return self.tpot_us
        return None if self.figures.tpot_ms is None else 1e3 * self.figures.tpot_ms


@dataclass(frozen=True)
class Side:
    """What one backend's engine said; facts: None where it did not start."""

    facts: EngineFacts | None
    segment_tokens: int | None
    cases: dict[Case, Measured]

    @staticmethod
    def of(answered: Answered) -> Side:
        facts = answered.first("engine")
        measurements = [Measured.from_event(event) for event in answered.all("case")]
        return Side(
            None if facts is None else EngineFacts(**facts),
            answered.first("segment_tokens"),
            {one.case: one for one in measurements},
        )
