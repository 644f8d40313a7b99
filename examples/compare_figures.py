"""What a run of requests is, and the figures that a comparison draws from it.

Times are seconds since the moment that all requests of the run were submitted.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Case:
    """num_requests prompts of `length` tokens each, submitted together."""

    length: int
    num_requests: int


@dataclass(frozen=True)
class Request:
    """token_times: of each generated token."""

    token_times: list[float]
    preemptions: int


@dataclass(frozen=True)
class Step:
    """One engine step. at: when its tokens were there, None where it produced none (a chunk of a
    prompt that is not the last); prompt_*, decode_*: requests and tokens that were scheduled;
    running: requests that hold blocks after it."""

    at: float | None
    new_tokens: int
    prompt_requests: int
    prompt_tokens: int
    decode_requests: int
    decode_tokens: int
    running: int

    @property
    def is_decode(self) -> bool:
        """Nothing but one token for each request. After a preemption vLLM counts the tokens that
        it computes again among the decoded ones, hence the comparison."""
        return self.prompt_requests == 0 and 0 < self.decode_requests == self.decode_tokens


@dataclass(frozen=True)
class Run:
    """One repeat of a case."""

    requests: list[Request]
    steps: list[Step]

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> Run:
        return Run(
            [Request(**request) for request in given["requests"]],
            [Step(**step) for step in given["steps"]],
        )


@dataclass(frozen=True)
class Figures:
    """Of all repeats of a case.

    tpot_ms, decode_tokens_per_s: time per output token (median) and tokens of all requests per
    second, in the steps that only decode, None without one; prefill_tokens_per_s: prompt tokens
    over all the other time, so work that a preemption repeats counts against it;
    output_tokens_per_s: from the submission to the last token; peak_running: requests that hold
    blocks at the same time; preemptions: of all requests and repeats.
    """

    ttft_median_s: float
    ttft_max_s: float
    tpot_ms: float | None
    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float
    output_tokens_per_s: float
    peak_running: int
    preemptions: int
    output_tokens: int


def figures(case: Case, runs: Sequence[Run]) -> Figures:
    requests = [request for run in runs for request in run.requests]
    ttfts = [request.token_times[0] for request in requests]
    output_tokens = sum(len(request.token_times) for request in requests)
    total_s = sum(max(request.token_times[-1] for request in run.requests) for run in runs)
    decoding = [stretch for run in runs for stretch in _decoding(run.steps)]
    decode_s = sum(seconds for seconds, _ in decoding)
    waits = [seconds for seconds, tokens in decoding for _ in range(tokens)]  # of each token
    return Figures(
        ttft_median_s=statistics.median(ttfts),
        ttft_max_s=max(ttfts),
        tpot_ms=1e3 * statistics.median(waits) if waits else None,
        decode_tokens_per_s=len(waits) / decode_s if waits else None,
        prefill_tokens_per_s=case.length * len(requests) / (total_s - decode_s),
        output_tokens_per_s=output_tokens / total_s,
        peak_running=max(step.running for run in runs for step in run.steps),
        preemptions=sum(request.preemptions for request in requests),
        output_tokens=output_tokens,
    )


def _decoding(steps: Sequence[Step]) -> list[tuple[float, int]]:
    """(seconds, tokens) of each stretch between two known times whose steps only decode."""
    start = 0.0
    stretch: list[Step] = []
    found = []
    for step in steps:
        stretch.append(step)
        if step.at is None:
            continue
        if all(part.is_decode for part in stretch):
            found.append((step.at - start, step.new_tokens))
        start, stretch = step.at, []
    return found


@dataclass(frozen=True)
class HostUse:
    """magicpig's memory after a case, all ranks. page_bytes covers every page that some request has
    written since the engine's start, since freed pages keep their rows until they are written anew.
    sampled_fraction: rows read / rows of the middle during the case, None where none was sampled."""

    page_bytes: int
    index_bytes: int
    page_tokens: int
    sampled_fraction: float | None


def host_use(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> HostUse:
    """before, after: magicpig_stats of each rank."""

    def during(name: str) -> int:
        return sum(rank[name] for rank in after) - sum(rank[name] for rank in before)

    middle_rows = during("middle_rows")
    return HostUse(
        page_bytes=sum(rank["page_bytes"] for rank in after),
        index_bytes=sum(rank["index_bytes"] for rank in after),
        page_tokens=max(rank["page_tokens"] for rank in after),
        sampled_fraction=during("sampled_rows") / middle_rows if middle_rows else None,
    )


@dataclass(frozen=True)
class EngineFacts:
    """max_concurrency: requests of max_model_len that the KV cache holds; kv_bytes: of the KV
    tensors on the platform's device, all ranks; start_s: start-up."""

    max_model_len: int
    kv_cache_tokens: int
    num_blocks: int
    block_size: int
    max_concurrency: float
    kv_bytes: int
    start_s: float


@dataclass(frozen=True)
class Result:
    """A case of a backend: figures, or the reason why it cannot be held."""

    backend: str
    case: Case
    refused: str | None = None
    figures: Figures | None = None
    host: HostUse | None = None
    runs: Sequence[Run] = ()
