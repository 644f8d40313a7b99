"""K = 0 attends exactly over the same pages, so magicpig must answer as CPU_ATTN does.

float32: equal greedy tokens. bfloat16: the log-probs of both differ from the float32 model's by
rounding; magicpig's error may be at most twice that of vLLM's own backend on the same tokens.
Every architecture runs chunked prefill, prefix-cache hits, preemptions and a batch of 3 to 6,000
tokens; magicpig's layer 0 is dense, so both kinds of layer share one block table.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from engines import engine, generate, greedy, metric
from random_models import CONFIGS, VOCAB_SIZE, write_random_model
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


def _prompts(lengths: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def _run(llm: LLM) -> Run:
    params = greedy(16, detokenize=False, logprobs=5)
    mixed_prompts = _prompts(list(MIXED_LENGTHS), seed=1)
    mixed = generate(llm, mixed_prompts, params)
    generate(llm, mixed_prompts[2:5], greedy(1))  # the long prompt may have evicted them
    hits = metric(llm, "vllm:prefix_cache_hits")
    repeated = generate(llm, mixed_prompts[2:5], params)
    cached_tokens = metric(llm, "vllm:prefix_cache_hits") - hits
    before = metric(llm, "vllm:num_preemptions")
    crowded = generate(llm, _prompts([300] * 29, seed=2), greedy(96, detokenize=False, logprobs=5))
    return Run(
        mixed, repeated, crowded, cached_tokens, metric(llm, "vllm:num_preemptions") - before
    )


def _tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def _logprob(output: RequestOutput, step: int, token: int) -> float | None:
    """Of a token among the five likeliest of a step, else None."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    entry = logprobs[step].get(token)
    return None if entry is None else entry.logprob


def _assert_equal_tokens(ours: list[RequestOutput], dense: list[RequestOutput]) -> int:
    """Returns the number of requests that part at a tie."""
    ties = 0
    for request, (a, b) in enumerate(zip(ours, dense, strict=True)):
        for step, (token, expected) in enumerate(zip(_tokens(a), _tokens(b), strict=True)):
            if token == expected:
                continue
            first, second = _logprob(b, step, expected), _logprob(b, step, token)
            assert first is not None
            assert second is not None
            assert first - second < TIE, (
                f"request {request} differs at token {step}: {token} for {expected}, whose "
                f"log-probs under CPU_ATTN are {second} and {first}"
            )
            ties += 1
            break  # from here on the two continue different texts
    return ties


def _errors(run: list[RequestOutput], truth: list[RequestOutput]) -> list[float]:
    """Errors of log-probs against the float32 model's, as long as both say the same text."""
    errors = []
    for output, exact in zip(run, truth, strict=True):
        for step, (token, expected) in enumerate(zip(_tokens(output), _tokens(exact), strict=True)):
            ours, right = _logprob(output, step, expected), _logprob(exact, step, expected)
            if ours is None or right is None:
                break
            errors.append(abs(ours - right))
            if token != expected:
                break
    return errors


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_exact_mode_answers_as_the_platforms_backend(name: str, tmp_path: Path) -> None:
    model = write_random_model(name, tmp_path / name)
    runs: dict[tuple[str, str], Run] = {}
    for dtype in ("float32", "bfloat16"):
        for backend, options in (("CPU_ATTN", None), ("magicpig", {"K": 0, "dense_layers": [0]})):
            with engine(model, backend, options, dtype=dtype, **SERVE) as llm:
                runs[dtype, backend] = _run(llm)

    for run in runs.values():
        assert run.preemptions >= 4
        assert run.cached_tokens >= 2000
    dense, ours = runs["float32", "CPU_ATTN"], runs["float32", "magicpig"]
    varied = {tuple(_tokens(output)) for output in dense.mixed + dense.crowded}
    assert len(varied) == len(dense.mixed) + len(dense.crowded), "the outputs do not vary"
    ties = _assert_equal_tokens(ours.mixed, dense.mixed)
    ties += _assert_equal_tokens(ours.crowded, dense.crowded)
    ties += _assert_equal_tokens(ours.repeated, dense.repeated)
    ties += _assert_equal_tokens(ours.repeated, dense.mixed[2:5])
    print(f"{name}: {ties} requests part at a float32 tie")
    assert ties <= 1

    for part in ("mixed", "crowded"):
        truth = getattr(dense, part)
        bound = 2 * max(_errors(getattr(runs["bfloat16", "CPU_ATTN"], part), truth))
        error = max(_errors(getattr(runs["bfloat16", "magicpig"], part), truth))
        print(f"{name} {part}: bf16 log-prob error {error:.4f}, bound {bound:.4f}")
        assert error <= bound
