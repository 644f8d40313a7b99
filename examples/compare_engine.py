"""One engine that answers the cases of a comparison: a process of its own.

    python examples/compare_engine.py PLAN.json

compare_flash_attention.py starts it, reads one JSON object a line from the plan's `results` file
while it runs, and keeps its output as the engine's log.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from compare_figures import Case, EngineFacts, Request, Run, Step
from passage import passage_questions

SEED = 20410  # of prompts: arbitrary, the same for both backends


@dataclass(frozen=True)
class Plan:
    """engine_arguments: of vLLM's EngineArgs; tokenizer: whose text the prompts are, None for random
    token ids; results: file to append JSON lines to; parent: process id that wants them."""

    engine_arguments: dict[str, Any]
    cases: list[Case]
    output_tokens: int
    repeats: int
    tokenizer: str | None
    samples: bool  # magicpig, with statistics of its own
    results: str
    parent: int

    @staticmethod
    def read(path: Path) -> Plan:
        given = json.loads(path.read_text("utf-8"))
        return Plan(**given | {"cases": [Case(**case) for case in given["cases"]]})


class KvBytes:
    """Extends the worker by a method for collective_rpc (vLLM's worker_extension_cls)."""

    def kv_tensor_bytes(self) -> int:
        """Of the layers' KV tensors on this rank's device; layers may share one allocation."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()  # type: ignore[attr-defined]
        storages = {}
        for layer in layers:
            if hasattr(layer, "kv_cache"):
                storage = layer.kv_cache.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def make_engine(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """(LLMEngine, recorder): recorder.stats are the SchedulerStats of the latest step, or None.

    A stat logger, since LLM.get_metrics() holds sums and the state of the moment only, and never
    says which steps prefilled.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
            self.stats: Any = None

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            self.stats = scheduler_stats

        def log_engine_initialized(self) -> None:
            pass

    recorder = Recorder()
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            **arguments,
            disable_log_stats=False,
            enable_logging_iteration_details=True,
            worker_extension_cls=f"compare_engine.{KvBytes.__name__}",
        ),
        stat_loggers=[lambda vllm_config, engine_index: recorder],
    )
    return engine, recorder


def engine_facts(engine: Any, start_s: float) -> EngineFacts:
    cache = engine.vllm_config.cache_config
    return EngineFacts(
        max_model_len=engine.model_config.max_model_len,
        kv_cache_tokens=cache.kv_cache_size_tokens,
        num_blocks=cache.num_gpu_blocks,
        block_size=cache.block_size,
        max_concurrency=cache.kv_cache_max_concurrency,
        kv_bytes=sum(engine.collective_rpc("kv_tensor_bytes")),
        start_s=start_s,
    )


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(vocab_size, size=length).tolist()
    return tokens


def text_prompt(tokenizer: Any, length: int, seed: int) -> list[int]:
    """Exactly `length` tokens of English: the text is made longer and loses its beginning."""
    text, _ = passage_questions(tokenizer, length + length // 8 + 64, seed=seed)
    tokens: list[int] = tokenizer.encode(text)
    return tokens[:1] + tokens[len(tokens) - length + 1 :]


def warm_up_cases(cases: list[Case]) -> list[Case]:
    """The longest prompt alone and the most requests at once: Triton compiles anew for a batch of
    one, and chunks with context run other kernels than the first."""
    shortest, longest = min(cases).length, max(cases).length
    return [Case(longest, 1), Case(shortest, max(case.num_requests for case in cases))]


def prompts(
    case: Case, repeat: int, vocab_size: int, tokenizer: Any | None = None
) -> list[list[int]]:
    """The prompts of one run: all different, and the same for both backends. Text where there is a
    tokenizer, else random token ids."""
    batch = []
    for index in range(case.num_requests):
        place = np.random.SeedSequence([SEED, case.length, case.num_requests, repeat, index])
        seed = int(place.generate_state(1)[0])
        batch.append(
            random_prompt(vocab_size, case.length, seed)
            if tokenizer is None
            else text_prompt(tokenizer, case.length, seed)
        )
    return batch


def run_requests(engine: Any, recorder: Any, batch: list[list[int]], output_tokens: int) -> Run:
    """Gives the engine all prompts at the same moment and steps it until they are answered.

    The scheduler sleeps while the requests go in: else the engine, a process of its own, would
    start on as many of them as happened to have arrived. Times are those of the engine core, which
    stamps the outputs of each step, without the delay between processes; that is
    RequestOutput.metrics.last_token_ts, read after each step since it keeps only the first and the
    last time of a request. They can be counted from a moment of this process because both clocks
    are CLOCK_MONOTONIC, the same in every process on Linux. Read in vLLM 0.32.
    """
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    names = [str(index) for index in range(len(batch))]
    token_times: dict[str, list[float]] = {name: [] for name in names}
    preemptions: dict[str, int] = {}
    steps: list[Step] = []
    engine.sleep(level=0)
    for name, prompt in zip(names, batch, strict=True):
        engine.add_request(name, tokens_input(prompt), params)
    start = time.monotonic()
    engine.wake_up(tags=["scheduling"])
    while engine.has_unfinished_requests():
        recorder.stats = None
        at, new_tokens = None, 0
        for output in engine.step():
            at = output.metrics.last_token_ts - start
            count = len(output.outputs[0].token_ids)
            token_times[output.request_id] += [at] * count
            preemptions[output.request_id] = output.metrics.num_preemptions
            new_tokens += count
        details = None if recorder.stats is None else recorder.stats.iteration_details
        if details is not None:  # else nothing was scheduled
            steps.append(
                Step(
                    at=at,
                    new_tokens=new_tokens,
                    prompt_requests=details.num_ctx_requests,
                    prompt_tokens=details.num_ctx_tokens,
                    decode_requests=details.num_generation_requests,
                    decode_tokens=details.num_generation_tokens,
                    running=recorder.stats.num_running_reqs,
                )
            )
    for name, times in token_times.items():
        if len(times) != output_tokens:
            raise RuntimeError(f"request {name} ended after {len(times)} of {output_tokens} tokens")
    return Run([Request(token_times[name], preemptions[name]) for name in names], steps)


def main() -> None:
    plan = Plan.read(Path(sys.argv[1]))
    with open(plan.results, "a", encoding="utf-8", buffering=1) as results:

        def report(**event: Any) -> None:
            if os.getppid() != plan.parent:
                sys.exit("the process that wanted these results is gone")
            results.write(json.dumps(event) + "\n")

        started = time.monotonic()
        engine, recorder = make_engine(plan.engine_arguments)
        report(engine=asdict(engine_facts(engine, time.monotonic() - started)))
        tokenizer: Any = None
        if plan.tokenizer is not None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)

        def run(case: Case, repeat: int, output_tokens: int) -> Run:
            batch = prompts(case, repeat, engine.model_config.get_vocab_size(), tokenizer)
            return run_requests(engine, recorder, batch, output_tokens)

        for case in warm_up_cases(plan.cases):
            run(case, plan.repeats, min(plan.output_tokens, 8))
        report(warmed_up=True)
        for case in plan.cases:
            before = engine.collective_rpc("magicpig_stats") if plan.samples else []
            runs = [asdict(run(case, i, plan.output_tokens)) for i in range(plan.repeats)]
            after = engine.collective_rpc("magicpig_stats") if plan.samples else []
            report(case=asdict(case), runs=runs, before=before, after=after)
        engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
