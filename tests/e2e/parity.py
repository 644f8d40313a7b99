"""The workload that exact mode is checked with, and how two backends' answers to it are compared."""

from __future__ import annotations

import random
from dataclasses import dataclass

from engines import generate, greedy, metric
from random_models import VOCAB_SIZE
from vllm import LLM
from vllm.outputs import RequestOutput

MIXED_LENGTHS = (3, 17, 130, 700, 2100, 6000)
BLOCK_SIZE = 32
NUM_BLOCKS = 300  # the 29 prompts of 300 tokens take 290, and then each grows by 3
SERVE = {
    "skip_tokenizer_init": True,
    "max_model_len": 6100,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": NUM_BLOCKS,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 32,
}

# Two tokens whose float32 log-probs are closer than this may change places between two correct
# implementations: logits of size 10 carry an error of about 10 * 2**-24 * sqrt(operations) = 1e-4.
TIE = 1e-4


@dataclass(frozen=True)
class Run:
    mixed: list[RequestOutput]
    repeated: list[RequestOutput]
    crowded: list[RequestOutput]
    cached_tokens: float
    preemptions: float


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def run_workload(llm: LLM) -> Run:
    params = greedy(16, detokenize=False, logprobs=5)
    mixed_prompts = prompts(list(MIXED_LENGTHS), seed=1)
    mixed = generate(llm, mixed_prompts, params)
    generate(llm, mixed_prompts[2:5], greedy(1))  # the long prompt may have evicted them
    hits = metric(llm, "vllm:prefix_cache_hits")
    repeated = generate(llm, mixed_prompts[2:5], params)
    cached_tokens = metric(llm, "vllm:prefix_cache_hits") - hits
    before = metric(llm, "vllm:num_preemptions")
    crowded = generate(llm, prompts([300] * 29, seed=2), greedy(96, detokenize=False, logprobs=5))
    return Run(
        mixed, repeated, crowded, cached_tokens, metric(llm, "vllm:num_preemptions") - before
    )


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def logprob(output: RequestOutput, step: int, token: int) -> float | None:
    """Of a token among the five likeliest of a step, else None."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    entry = logprobs[step].get(token)
    return None if entry is None else entry.logprob


def assert_equal_tokens(ours: list[RequestOutput], dense: list[RequestOutput]) -> int:
    """Returns the number of requests that part at a tie."""
    ties = 0
    for request, (a, b) in enumerate(zip(ours, dense, strict=True)):
        for step, (token, expected) in enumerate(zip(tokens(a), tokens(b), strict=True)):
            if token == expected:
                continue
            first, second = logprob(b, step, expected), logprob(b, step, token)
            assert first is not None
            assert second is not None
            assert first - second < TIE, (
                f"request {request} differs at token {step}: {token} for {expected}, whose "
                f"log-probs under CPU_ATTN are {second} and {first}"
            )
            ties += 1
            break  # from here on the two continue different texts
    return ties


def errors(run: list[RequestOutput], truth: list[RequestOutput]) -> list[float]:
    """Errors of log-probs against the float32 model's, as long as both say the same text."""
    errors = []
    for output, exact in zip(run, truth, strict=True):
        for step, (token, expected) in enumerate(zip(tokens(output), tokens(exact), strict=True)):
            ours, right = logprob(output, step, expected), logprob(exact, step, expected)
            if ours is None or right is None:
                break
            errors.append(abs(ours - right))
            if token != expected:
                break
    return errors
