"""The user's comparison: magicpig against the platform's dense attention.

    python examples/compare_flash_attention.py --model NAME --lengths 8192,32768 --requests 1,2,4
    python examples/compare_flash_attention.py --shape llama-3.1-8b --gpu-memory-gib 24 \\
        --lengths 32768,98304                            random weights, nothing to download
    python examples/compare_flash_attention.py           a small random Llama, for a CPU

Each backend (FLASH_ATTN on a GPU, CPU_ATTN on vLLM's CPU platform) has an engine of its own, one
after another, with the same weights, prompts and device memory. For every prompt length and number
of requests: time to first token, time per output token, throughput of decode and prefill, requests
that ran at once, preemptions, memory. A length that a backend cannot hold is a result. comparison.json,
.md and .png and the engines' logs go to --output; finished cases stay there when a run is ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from compare_arguments import parse
from compare_engine import Plan
from compare_figures import Case, EngineFacts, Result, Run, figures, host_use
from compare_report import Comparison, machine_facts, plot
from compare_setup import (
    DENSE_BACKENDS,
    Device,
    Settings,
    engine_arguments,
    with_budget,
    write_model,
)
from serving import first_error as first_error

ENGINE_SCRIPT = Path(__file__).with_name("compare_engine.py")
POLL_S = 0.2
STOP_TIMEOUT_S = 20
LOG_LINES = 15  # of a failed engine


class EngineFailed(Exception):
    """The engine's process ended before it had answered everything."""


@dataclass(frozen=True)
class Refusal:
    """Why an engine did not start; max_tokens: the longest request that the KV cache would hold."""

    reason: str
    max_tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse(argv)
    device = find_device()
    try:
        settings, budget = with_budget(settings, device)
        check_tokenizer(settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    can_plot = importlib.util.find_spec("matplotlib") is not None
    if not can_plot:
        note("matplotlib is not installed, so there will be no plot; pip install matplotlib.")
    settings.output.mkdir(parents=True, exist_ok=True)
    plot_path = settings.output / "comparison.png"
    plot_path.unlink(missing_ok=True)
    # By default SIGTERM would leave the engine's processes behind.
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)

    comparison = Comparison(
        command=sys.argv if argv is None else [Path(__file__).name, *argv],
        machine=machine_facts(device.description),
        settings=asdict(settings),
        backends=("magicpig", device.dense_backend),
    )
    comparison.write(settings.output)
    try:
        with tempfile.TemporaryDirectory(prefix="magicpig-compare-") as scratch:
            model = write_model(settings, Path(scratch) / "model")
            for backend in comparison.backends:
                run_backend(backend, settings, budget, model, comparison, Path(scratch))
    except EngineFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    comparison.finished = True
    comparison.write(settings.output)
    if can_plot:
        plot(comparison.results, comparison.backends, plot_path)
    print(comparison.markdown())
    note(f"written to {settings.output}")
    return 0


def end(number: int, _: object) -> NoReturn:
    sys.exit(f"ended by {signal.Signals(number).name}; finished cases are kept")


def find_device() -> Device:
    """vLLM's own view of the machine, which creates no CUDA context in this process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return Device("cpu", "vLLM's CPU platform", None)
    if current_platform.is_cuda():
        total = current_platform.get_device_total_memory()
        return Device("cuda", current_platform.get_device_name(), total)
    sys.exit(
        f"vLLM runs on {current_platform.device_name or 'no device'} here, and this comparison "
        f"knows {' and '.join(DENSE_BACKENDS)}; run it on one of those."
    )


def check_tokenizer(settings: Settings) -> None:
    """Raises ValueError where text prompts are wanted and the model has no tokenizer."""
    if settings.prompts != "text":
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {settings.model!r} cannot be loaded "
            f"({str(error).strip().splitlines()[0]}); correct --model, or use --prompts random."
        ) from None


def run_backend(
    backend: str,
    settings: Settings,
    budget: dict[str, Any],
    model: str,
    comparison: Comparison,
    scratch: Path,
) -> None:
    """All cases of one backend; a case that it cannot hold costs one more start of the engine."""
    cases = settings.cases
    while cases:
        max_model_len = max(cases).length + settings.output_tokens
        plan = Plan(
            engine_arguments(settings, budget, backend, model, max_model_len),
            cases,
            settings.output_tokens,
            settings.repeats,
            tokenizer=settings.model if settings.prompts == "text" else None,
            samples=backend == "magicpig",
            results=str(scratch / f"{backend}-{max_model_len}.jsonl"),
            parent=os.getpid(),
        )
        note(f"{backend}: starting an engine for up to {max_model_len} tokens a request")

        def take(event: dict[str, Any]) -> None:
            message = take_event(event, backend, comparison)
            comparison.write(settings.output)
            note(f"{backend}: {message}")

        log = settings.output / f"{backend.lower()}.log"
        refusal = run_engine(plan, log, take)
        if refusal is None:
            return
        held, refused = split_by_capacity(cases, settings.output_tokens, refusal.max_tokens)
        for case in refused:
            note(f"{backend}: {case.length} tokens x {case.num_requests}: {refusal.reason}")
            comparison.results.append(Result(backend, case, refused=refusal.reason))
        comparison.write(settings.output)
        cases = held


def split_by_capacity(
    cases: Sequence[Case], output_tokens: int, max_tokens: int
) -> tuple[list[Case], list[Case]]:
    """(held, refused): the longest is always refused, since vLLM has just refused it."""
    longest = max(cases).length
    held = [
        case
        for case in cases
        if case.length < longest and case.length + output_tokens <= max_tokens
    ]
    return held, [case for case in cases if case not in held]


def take_event(event: dict[str, Any], backend: str, comparison: Comparison) -> str:
    """Puts what an engine reports into the comparison; returns it in words."""
    if "engine" in event:
        facts = EngineFacts(**event["engine"])
        comparison.engines[backend] = facts
        return f"started in {facts.start_s:.0f} s, KV cache for {facts.kv_cache_tokens} tokens"
    if "warmed_up" in event:
        return "warmed up"
    case = Case(**event["case"])
    runs = [Run.from_dict(run) for run in event["runs"]]
    found = figures(case, runs)
    host = host_use(event["before"], event["after"]) if event["after"] else None
    comparison.results.append(Result(backend, case, figures=found, host=host, runs=runs))
    per_token = "no step that only decodes" if found.tpot_ms is None else f"{found.tpot_ms:.1f} ms"
    return (
        f"{case.length} tokens x {case.num_requests}: TTFT {found.ttft_median_s:.2f} s, "
        f"per token {per_token}"
    )


def run_engine(plan: Plan, log: Path, take: Callable[[dict[str, Any]], None]) -> Refusal | None:
    """Runs the plan in a process of its own and hands over its events as they come.

    Returns a Refusal where vLLM's KV cache cannot hold one request of the longest case; raises
    EngineFailed with the end of the log after any other failure.
    """
    results = Path(plan.results)
    results.touch()
    plan_path = results.with_suffix(".plan.json")
    plan_path.write_text(json.dumps(asdict(plan)), "utf-8")
    with (
        log.open("wb") as output,
        results.open(encoding="utf-8") as lines,
        process_group([sys.executable, str(ENGINE_SCRIPT), str(plan_path)], output) as process,
    ):
        ended = False
        pending = ""
        while True:
            pending += lines.read()
            *complete, pending = pending.split("\n")
            for line in complete:
                take(json.loads(line))
            if ended:
                break
            # Ended before the last look at the file, or not ended.
            ended = process.poll() is not None
            if not ended:
                time.sleep(POLL_S)
    if process.returncode == 0:
        return None
    text = log.read_text("utf-8", errors="replace")
    refusal = find_refusal(text)
    if refusal is not None:
        return refusal
    tail = "\n".join(f"  {line}" for line in text.splitlines()[-LOG_LINES:])
    raise EngineFailed(
        f"the engine of {plan.engine_arguments['attention_backend']} ended with exit code "
        f"{process.returncode}: {first_error(log).rstrip('.')}; all of its log is in {log}, which "
        f"ends:\n{tail}"
    )


@contextmanager
def process_group(
    command: list[str], output: Any, **arguments: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards, with all those it started: they share its session.

    arguments: Popen's own.
    """
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **arguments
    )
    try:
        yield process
    finally:
        for sig in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + STOP_TIMEOUT_S
            try:
                os.killpg(process.pid, sig)
                while time.monotonic() < deadline:
                    process.poll()
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
            except ProcessLookupError:
                break
        process.wait()


def find_refusal(log: str) -> Refusal | None:
    """What vLLM 0.32 says where its KV cache is too small (v1/core/kv_cache_utils.py)."""
    short = re.search(
        r"To serve at least one request with the model's max seq len \((\d+)\), \(([\d.]+) GiB KV "
        r"cache is needed, which is larger than the available KV cache memory \(([\d.]+) GiB\)\."
        r"(?: Based on the available memory, the estimated maximum model length is (\d+)\.)?",
        log,
    )
    if short is not None:
        tokens, needed, available, fits = short.groups(default="0")
        return Refusal(
            f"one request of {tokens} tokens needs {needed} GiB of KV cache, {available} GiB are "
            f"there, enough for {fits} tokens",
            int(fits),
        )
    if "No available memory for the cache blocks" in log:
        return Refusal("the memory is full before there is a KV cache", 0)
    return None


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
