"""One engine that answers one job: a process of its own.

python scripts/gpu_check_engine.py NAME JOB.json RESULTS.jsonl
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_check_jobs import (
    E2E,
    EXAMPLES,
    AnswerJob,
    CompiledJob,
    RecallJob,
    Reporter,
    SpeedJob,
    started_child,
)

sys.path += [str(EXAMPLES), str(E2E)]

NUM_LOGPROBS = 5
PROMPT_SEED = 7
RANDOM_WEIGHTS = "gpu_check_random"
MAX_DEVICE_SHARE = 0.92  # of a card that is smaller than the budget: vLLM's default


def answer(job: AnswerJob, folder: Path, report: Reporter) -> None:
    """Reports the attention backend of each layer, then tokens and log-probs of each request."""
    from engines import engine, generate, greedy

    arguments = random_weights(job.config, folder) | job.arguments
    vocab_size = job.config["vocab_size"]
    from compare_engine import random_prompt

    # Ids from 3 up: the first ones are special in the random models.
    prompts = [
        [3 + token for token in random_prompt(vocab_size - 3, length, PROMPT_SEED + index)]
        for index, length in enumerate(job.lengths)
    ]
    with engine(folder, job.backend, job.options, **arguments) as llm:  # type: ignore[arg-type]
        report(backends=layer_backends(llm))
        outputs = generate(
            llm, prompts, greedy(job.tokens, detokenize=False, logprobs=NUM_LOGPROBS)
        )
        for output in outputs:
            (said,) = output.outputs
            assert said.logprobs is not None
            logprobs = [
                [(token, entry.logprob) for token, entry in step.items()] for step in said.logprobs
            ]
            report(answer={"tokens": list(said.token_ids), "logprobs": logprobs})


def random_weights(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """EngineArgs of a model of this config in `folder`, without a tokenizer."""
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    register_random_weights()
    return {"skip_tokenizer_init": True, "load_format": RANDOM_WEIGHTS}


def layer_backends(llm: Any) -> dict[str, str]:
    """Names of the attention backends by layer; of an engine in this process."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {
        name: layer.attn_backend.get_name()
        for name, layer in layers.items()
        if hasattr(layer, "attn_backend")
    }


def register_random_weights() -> None:
    """A load format like vLLM's `dummy`, whose weights are too small to show an error: numbers below
    0.001 give logits of next to nothing, whatever attention computes, and equal in every layer.

    Here activations have unit variance and logits spread, as in tests/e2e/random_models.py. Drawn in
    float32 and rounded to bfloat16, so that engines of either dtype hold the same model.
    """
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(RANDOM_WEIGHTS)
    class RandomWeights(BaseModelLoader):  # type: ignore[misc]
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            for seed, (name, weight) in enumerate(model.named_parameters()):
                if weight.dim() < 2:
                    continue  # norms are ones
                std = 3.0 if "lm_head" in name else 1.5
                std = 1.0 if "embed_tokens" in name else std / weight.shape[1] ** 0.5
                generator = torch.Generator(weight.device).manual_seed(seed)
                drawn = torch.empty_like(weight, dtype=torch.float32)
                drawn.normal_(std=std, generator=generator)
                weight.data.copy_(drawn.to(torch.bfloat16))


def recall(job: RecallJob, folder: Path, report: Reporter) -> None:
    """Reports for each length how many questions and words are right; the first word is not scored.

    The first question goes alone, so that the others find the text in the prefix cache.
    """
    import recall_model
    from engines import engine, greedy

    model = recall_model.build(folder / "recall")

    def stats() -> dict[str, Any] | None:
        return None if job.options is None else llm.collective_rpc("magicpig_stats")[0]

    with engine(model, job.backend, job.options, **job.arguments) as llm:
        for length in job.lengths:
            before = stats()
            text = recall_model.haystack(length, num_chains=job.num_questions, seed=length)
            questions = [text.question(index) for index in range(job.num_questions)]
            prompts = [question.prompt for question in questions]
            outputs = [
                output
                for some in (prompts[:1], prompts[1:])
                for output in llm.generate(some, greedy(len(questions[0].answer)), use_tqdm=False)
            ]
            answers = [output.outputs[0].text.split() for output in outputs]
            report(
                recall={
                    "length": length,
                    "words_right": [
                        sum(
                            word == expected
                            for word, expected in zip(said[1:], asked.answer[1:], strict=False)
                        )
                        for said, asked in zip(answers, questions, strict=True)
                    ],
                    "words_each": len(questions[0].answer) - 1,
                    "before": before,
                    "after": stats(),
                }
            )


def compiled(job: CompiledJob, folder: Path, report: Reporter) -> None:
    """Reports start-up, then for each prompt the times of its steps and of each layer's attention."""
    from compare_engine import make_engine, random_prompt, run_requests

    arguments = random_weights(job.config, folder) | job.arguments
    started = time.monotonic()
    engine, recorder = make_engine({"model": str(folder), **arguments})
    report(started_s=time.monotonic() - started)
    clocks = time_layers(engine)
    vocab_size = job.config["vocab_size"]
    for seed, length in enumerate(job.lengths):
        for clock in clocks.values():
            clock.clear()
        before = engine.collective_rpc("magicpig_stats")[0]
        run = run_requests(engine, recorder, [random_prompt(vocab_size, length, seed)], job.tokens)
        report(
            compiled={
                "length": length,
                "run": run,
                "layers": {name: clock.decode_us(job.tokens - 1) for name, clock in clocks.items()},
                "before": before,
                "after": engine.collective_rpc("magicpig_stats")[0],
            }
        )
    engine.engine_core.shutdown()


def time_layers(engine: Any) -> dict[str, LayerClock]:
    """Clocks around the attention of each sampled layer; of an engine in this process. Attention runs
    between the pieces that are compiled, so that it can be wrapped."""
    context = engine.vllm_config.compilation_config.static_forward_context
    clocks = {}
    for name, layer in context.items():
        sampled = getattr(getattr(layer, "impl", None), "sampled", None)
        if sampled is not None:
            clocks[name] = LayerClock(sampled)
    return clocks


class LayerClock:
    """Times each call of a layer's `forward`: by events of the stream on a GPU, else by the clock."""

    def __init__(self, sampled: Any) -> None:
        import torch

        self._on_gpu = torch.cuda.is_available()
        self._forward = sampled.forward
        self._calls: list[tuple[Any, Any]] = []
        sampled.forward = self._timed

    def _timed(self, *args: Any) -> Any:
        start = self._now()
        result = self._forward(*args)
        self._calls.append((start, self._now()))
        return result

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def clear(self) -> None:
        self._calls.clear()

    def decode_us(self, steps: int) -> list[float]:
        """Of the last `steps` calls, us each."""
        if not self._on_gpu:
            return [1e6 * (end - start) for start, end in self._calls[-steps:]]
        import torch

        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in self._calls[-steps:]]


def device_share(gib: float | None) -> dict[str, Any]:
    """EngineArgs for so much device memory, weights included; none on a CPU."""
    if gib is None:
        return {}
    from vllm.platforms import current_platform

    total: int = current_platform.get_device_total_memory()
    return {"gpu_memory_utilization": min(gib * (1 << 30) / total, MAX_DEVICE_SHARE)}


def speed(job: SpeedJob, folder: Path, report: Reporter) -> None:
    """Reports the engine's capacity, then each case as it is done."""
    from compare_engine import engine_facts, make_engine, random_prompt, run_requests
    from cost_model import segment_tokens_of

    (folder / "config.json").write_text(json.dumps(job.config), "utf-8")
    started = time.monotonic()
    arguments = job.arguments | device_share(job.device_gib)
    engine, recorder = make_engine({"model": str(folder), **arguments})
    report(engine=engine_facts(engine, time.monotonic() - started))
    report(segment_tokens=segment_tokens_of(None))
    vocab_size, seed = job.config["vocab_size"], 0

    def run(length: int, num_requests: int, output_tokens: int) -> Any:
        nonlocal seed
        seeds = range(seed, seed + num_requests)
        seed = seeds.stop
        prompts = [random_prompt(vocab_size, length, s) for s in seeds]
        return run_requests(engine, recorder, prompts, output_tokens)

    # Chunks with context run other kernels than the first, and so does a batch of one.
    chunk = job.arguments["max_num_batched_tokens"]
    shortest = min(length for length, _ in job.cases)
    run(min(chunk + 512, shortest), 1, 4)
    run(min(512, shortest), max(number for _, number in job.cases), 4)
    report(warmed_up=True)
    for length, num_requests in job.cases:
        before = engine.collective_rpc("magicpig_stats")[0] if job.samples else None
        done = run(length, num_requests, job.output_tokens)
        after = engine.collective_rpc("magicpig_stats")[0] if job.samples else None
        report(
            case={
                "length": length,
                "num_requests": num_requests,
                "run": done,
                "before": before,
                "after": after,
            }
        )
    engine.engine_core.shutdown()


WORK = {AnswerJob: answer, RecallJob: recall, CompiledJob: compiled, SpeedJob: speed}


def main() -> None:
    job, report = started_child()
    with tempfile.TemporaryDirectory(prefix="gpu-check-model-") as folder:
        WORK[type(job)](job, Path(folder), report)


if __name__ == "__main__":
    main()
