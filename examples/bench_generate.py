"""End to end: time per output token through vLLM's engine, magicpig against CPU_ATTN.

    python examples/bench_generate.py                     8K and 32K tokens, batch 1 and 4
    python examples/bench_generate.py --quick
    python examples/bench_generate.py --lengths 8192 --batches 1 --layers 4

The model is a random Llama whose attention has an 8B model's shape (32 query heads, 8 kv heads, head
size 128) in few layers, all of them sampled (`dense_layers` is []), with a small hidden size, MLP and
vocabulary: dense prefill of a long prompt on a CPU leaves no time for more. So attention weighs more in
a step than in an 8B model; both shares of the bytes that a step reads are printed, and a speed-up here
is one of attention, not of an 8B model.

Both engines are up at the same time, each in a process that holds its KV cache, and take turns. A
prompt is prefilled once; after that it is a prefix-cache hit, and a batch is n samples of it, which
read the same pages. Time per token is the mean of the tokens that follow the first few of a generation,
so that what is left of the prefill drops out; of the repeats the median counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from argument_types import json_object, positive, positives
from bench_report import Report, cores, median, parser, tokens_name
from compare_flash_attention import process_group
from compare_setup import SHAPES
from serving import first_error

from vllm_magicpig.config import parse_options

ENGINE_SCRIPT = Path(__file__).with_name("bench_engine.py")
BACKENDS = ("magicpig", "CPU_ATTN")
POLL_S = 0.02
START_TIMEOUT_S = 600
BF16 = 2
BLOCK_SIZE = 128
TOKEN_BYTES_SPARE = 2.0
"""A page of a sampled layer holds codes beside its rows: 300 bytes to 512 at L = 150."""


@dataclass(frozen=True)
class Result:
    """tpot_ms: per output token of each request; share_*: attention's part of the bytes that a dense
    decode step reads, weights and KV, in this model and in an 8B one; runs_ms: tpot of each repeat."""

    num_tokens: int
    batch: int
    tpot_ms: dict[str, float]
    tpot_p25_ms: dict[str, float]
    tokens_per_s: dict[str, float]
    ratio: float
    ratio_p25: float
    sampled_fraction: float | None
    prefill_s: dict[str, float]
    share_here: float
    share_8b: float
    runs_ms: dict[str, list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--lengths", type=positives, default=[8192, 32768])
    options.add_argument("--batches", type=positives, default=[1, 4])
    options.add_argument("--layers", type=positive, default=2)
    options.add_argument("--hidden-size", type=positive, default=256)
    options.add_argument("--intermediate-size", type=positive, default=512)
    options.add_argument("--repeats", type=positive, default=5)
    options.add_argument(
        "--tokens",
        type=positives,
        default=[8, 72],
        help="tokens to generate: not timed, and in all; 8,72 by default",
    )
    options.add_argument("--options", type=json_object, default={}, help="JSON, magicpig's own")
    given = options.parse_args(argv)
    if len(given.tokens) != 2 or given.tokens[0] >= given.tokens[1]:
        options.error("--tokens takes two ascending numbers, such as 8,72")
    try:
        parse_options({"magicpig": given.options})
    except ValueError as error:
        options.error(f"--options: {error}")
    if given.quick:
        given.lengths, given.batches, given.repeats = [4096], [1], 3
    cpus = cores()
    report = Report("bench_generate", given.output, argv, [len(cpus)])
    longest = max(given.lengths) + given.tokens[1]
    config = model_config(given, longest)
    report.add("model", config)
    results: list[Result] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="magicpig-bench-")))
        model = scratch / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config), "utf-8")
        engines = {
            backend: Engine(backend, engine_arguments(given, backend, model, longest), scratch)
            for backend in BACKENDS
        }
        # One after another: two that start at once would share the cores with their compilers.
        for engine in engines.values():
            engine.start(stack, cpus)
        for num_tokens in given.lengths:
            prompt = _prompt(num_tokens, config["vocab_size"])
            prefill = {}
            for backend, engine in engines.items():
                prefill[backend] = engine.generate(prompt, 1, 1, 1)["seconds"]
                note(f"{backend}: {num_tokens} tokens prefilled in {prefill[backend]:.1f} s")
            for batch in given.batches:
                results.append(measure(engines, prompt, batch, prefill, given, config))
                report.add("results", results)
    print_results(report, results, given.layers)
    report.plot("bench_generate", 8, lambda axis: draw(axis, results))
    report.finish()
    return 0


def model_config(given: Any, longest: int) -> dict[str, Any]:
    return SHAPES["llama-3.1-8b"] | {
        "num_hidden_layers": given.layers,
        "hidden_size": given.hidden_size,
        "intermediate_size": given.intermediate_size,
        "vocab_size": 1024,
        "max_position_embeddings": longest,
    }


def engine_arguments(given: Any, backend: str, model: Path, longest: int) -> dict[str, Any]:
    """The KV cache holds the largest batch of the longest prompt as if nothing were shared, in either
    layout: memory of the index is planned for what the cache holds, and each sample of a prompt wants
    a segment of its own where it parts from the others."""
    shape = SHAPES["llama-3.1-8b"]
    tokens = max(given.batches) * (max(given.lengths) + given.tokens[1] + 2 * BLOCK_SIZE)
    kv_bytes = _kv_bytes(shape | {"num_hidden_layers": given.layers}, tokens)
    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "attention_backend": backend,
        "max_model_len": longest,
        "max_num_seqs": max(given.batches),
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": int(TOKEN_BYTES_SPARE * kv_bytes),
        "seed": 0,
    }
    if backend == "magicpig":
        magicpig = {"dense_layers": []} | given.options
        arguments["additional_config"] = {"magicpig": magicpig}
    return arguments


class Engine:
    def __init__(self, backend: str, arguments: dict[str, Any], scratch: Path) -> None:
        self.backend = backend
        self._plan = scratch / f"{backend}.json"
        self._results_path = scratch / f"{backend}.results"
        self._log = scratch / f"{backend}.log"
        self._plan.write_text(json.dumps(arguments), "utf-8")

    def start(self, stack: ExitStack, cpus: Sequence[int]) -> None:
        """Both engines get all cores: the one whose turn it is not sleeps. The engine runs inside the
        process, so that no second one polls while the other engine is timed."""
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            # vLLM compiles parts of its sampler even in eager mode, which no figure here needs.
            "TORCH_COMPILE_DISABLE": "1",
        }
        output = stack.enter_context(self._log.open("wb"))
        command = [sys.executable, str(ENGINE_SCRIPT), str(self._plan), str(self._results_path)]
        self._results_path.touch()
        self._process = stack.enter_context(
            process_group(command, output, stdin=subprocess.PIPE, env=environment)
        )
        self._results = stack.enter_context(self._results_path.open(encoding="utf-8"))
        started = time.monotonic()
        self._answer()
        note(f"{self.backend}: started in {time.monotonic() - started:.0f} s")

    def generate(
        self, prompt: list[int], samples: int, untimed: int, tokens: int
    ) -> dict[str, Any]:
        assert self._process.stdin is not None
        order = {"prompt": prompt, "samples": samples, "untimed": untimed, "tokens": tokens}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_TIMEOUT_S
        line = ""
        while not line.endswith("\n"):
            line += self._results.readline()
            if line.endswith("\n"):
                break
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the engine of {self.backend} failed: {first_error(self._log)}")
            time.sleep(POLL_S)
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(
    engines: dict[str, Engine],
    prompt: list[int],
    batch: int,
    prefill: dict[str, float],
    given: Any,
    config: dict[str, Any],
) -> Result:
    few, many = given.tokens
    runs_ms: dict[str, list[float]] = {name: [] for name in engines}
    fractions: list[float] = []
    for repeat in range(-1, given.repeats):
        names = list(engines) if repeat % 2 else list(reversed(engines))
        for name in names:
            answer = engines[name].generate(prompt, batch, few, many)
            if repeat >= 0:  # the first one warms up
                runs_ms[name].append(1e3 * answer["seconds_per_token"])
                if answer["sampled_fraction"] is not None:
                    fractions.append(answer["sampled_fraction"])
    tpot = {name: median(times) for name, times in runs_ms.items()}
    tpot_p25 = {name: float(np.percentile(times, 25)) for name, times in runs_ms.items()}
    note(
        f"{len(prompt)} tokens x {batch}: "
        + ", ".join(f"{name} {ms:.1f} ms per token" for name, ms in tpot.items())
    )
    ours, dense = BACKENDS
    return Result(
        num_tokens=len(prompt),
        batch=batch,
        tpot_ms=tpot,
        tpot_p25_ms=tpot_p25,
        tokens_per_s={name: 1e3 * batch / ms for name, ms in tpot.items()},
        ratio=tpot[dense] / tpot[ours],
        ratio_p25=tpot_p25[dense] / tpot_p25[ours],
        sampled_fraction=median(fractions) if fractions else None,
        prefill_s=prefill,
        share_here=attention_share(config, len(prompt), batch),
        share_8b=attention_share(SHAPES["llama-3.1-8b"], len(prompt), batch),
        runs_ms=runs_ms,
    )


def attention_share(config: dict[str, Any], num_tokens: int, batch: int) -> float:
    """Part of the bytes of a dense decode step that is KV: each request reads its rows, all requests
    share one read of the weights. Embeddings are looked up, not read; the output layer is read."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    layer = hidden * heads * head + 3 * hidden * config["intermediate_size"]
    weights = BF16 * (config["num_hidden_layers"] * layer + hidden * config["vocab_size"])
    rows = batch * _kv_bytes(config, num_tokens)
    return rows / (rows + weights)


def _kv_bytes(config: dict[str, Any], num_tokens: int) -> int:
    row = 2 * BF16 * config["head_dim"]
    return int(config["num_hidden_layers"] * config["num_key_value_heads"] * row * num_tokens)


def _prompt(num_tokens: int, vocab_size: int) -> list[int]:
    tokens: list[int] = (
        np.random.default_rng(num_tokens).integers(vocab_size, size=num_tokens).tolist()
    )
    return tokens


def print_results(report: Report, results: Sequence[Result], layers: int) -> None:
    ours, dense = BACKENDS
    report.print_table(
        f"Time per output token, {layers} layers, all sampled; ratios of medians, of lower "
        "quartiles in brackets. Attention: KV's share of the bytes of a dense step, here and in an "
        "8B model",
        (
            *("prompt tokens", "batch", f"{ours} ms/token", f"{dense} ms/token", f"{dense}/{ours}"),
            *(f"{ours} tokens/s", f"{dense} tokens/s", "sampled %"),
            *(f"prefill {ours} s", f"prefill {dense} s", "attention here", "attention in 8B"),
        ),
        [
            (
                tokens_name(r.num_tokens),
                str(r.batch),
                f"{r.tpot_ms[ours]:.2f}",
                f"{r.tpot_ms[dense]:.2f}",
                f"{r.ratio:.2f} ({r.ratio_p25:.2f})",
                f"{r.tokens_per_s[ours]:.1f}",
                f"{r.tokens_per_s[dense]:.1f}",
                "-" if r.sampled_fraction is None else f"{100 * r.sampled_fraction:.2f}",
                f"{r.prefill_s[ours]:.1f}",
                f"{r.prefill_s[dense]:.1f}",
                f"{100 * r.share_here:.0f} %",
                f"{100 * r.share_8b:.0f} %",
            )
            for r in results
        ],
    )


def draw(axis: Any, results: Sequence[Result]) -> None:
    names = [f"{tokens_name(r.num_tokens)} x {r.batch}" for r in results]
    for offset, backend in zip((-0.2, 0.2), BACKENDS, strict=True):
        at = np.arange(len(results)) + offset
        bars = axis.bar(at, [r.tpot_ms[backend] for r in results], width=0.4, label=backend)
        axis.bar_label(bars, fmt="%.1f", fontsize="small")
    axis.set_xticks(range(len(results)), names)
    axis.set(xlabel="prompt tokens x requests", title="ms per output token")
    axis.legend(fontsize="small")


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
