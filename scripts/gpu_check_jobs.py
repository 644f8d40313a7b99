"""What gpu-check asks of its child processes: job files, and results that outlive a killed child."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from gpu_check_children import Child

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
EXAMPLES = ROOT / "examples"
E2E = ROOT / "tests" / "e2e"
# Never ROOT itself on sys.path: vLLM would take the folder triton_kernels/ for OpenAI's package.

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
# In the child itself: a start costs less, and an exception is in its log.
IN_PROCESS = OFFLINE | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# As users run it: the engine core in a process of its own, which the front end does not slow.
SERVING = OFFLINE | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
# vLLM compiles a few sampler functions even in eager mode.
EAGER = {"TORCH_COMPILE_DISABLE": "1"}
# Triton would round the operands of float32 products to 10 bits (tf32), and TRITON_ATTN would be no
# reference for float32 attention.
EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}


@dataclass(frozen=True)
class HardwareJob:
    host_buffer_bytes: int
    device_buffer_bytes: int
    gathered_bytes: int


@dataclass(frozen=True)
class ProbesJob:
    """registered_bytes: sizes of host memory that are touched and pinned; callback_ms: how long a host
    function works while others are launched beside it."""

    registered_bytes: list[int]
    latency_rounds: int
    callback_ms: float


@dataclass(frozen=True)
class AnswerJob:
    """Greedy answers with log-probs of one engine over random weights.

    config: a config.json; backend: None lets vLLM choose; options: magicpig's; arguments: more
    EngineArgs.
    """

    config: dict[str, Any]
    backend: str | None
    options: dict[str, Any] | None
    lengths: list[int]
    tokens: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class RecallJob:
    """The built-in recall model, num_questions of each length."""

    backend: str
    options: dict[str, Any] | None
    lengths: list[int]
    num_questions: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class SpeedJob:
    """cases: (tokens, requests); arguments: all EngineArgs but the model, whose config.json is
    `config`; samples: magicpig, with statistics; device_gib: device memory that vLLM may use, weights
    included, None on a CPU."""

    config: dict[str, Any]
    cases: list[tuple[int, int]]
    output_tokens: int
    samples: bool
    device_gib: float | None
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CompiledJob:
    """A sampled engine as it serves: prompts of these lengths one after another, each with `tokens`
    steps, whose attention ops are timed layer by layer."""

    config: dict[str, Any]
    lengths: list[int]
    tokens: int
    arguments: dict[str, Any]


JOBS: dict[str, type[Any]] = {
    job.__name__: job
    for job in (AnswerJob, RecallJob, SpeedJob, CompiledJob, HardwareJob, ProbesJob)
}


def read_job(path: Path) -> Any:
    """Of one of the kinds above."""
    given = json.loads(path.read_text("utf-8"))
    return JOBS[given.pop("job")](**given)


def started_child() -> tuple[Any, Reporter]:
    """Of a script's command line, NAME JOB.json RESULTS.jsonl."""
    name, job, results = sys.argv[1:4]
    return read_job(Path(job)), Reporter(Path(results), name)


class Reporter:
    """Appends events, JSON objects of one key each beside the child's name, to a file that all
    children share: whole lines, whoever writes at the same time or is killed."""

    def __init__(self, path: Path, child: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._child = child

    def __call__(self, **event: Any) -> None:
        line = json.dumps({"child": self._child, **event}, default=_plain) + "\n"
        os.write(self._file, line.encode())
        os.fsync(self._file)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is not JSON")


@dataclass(frozen=True)
class Task:
    """A child with the file that it reports to."""

    child: Child
    results: Path

    def events(self) -> list[dict[str, Any]]:
        """What it said so far; a killed child may leave half a line."""
        if not self.results.exists():
            return []
        events = []
        for line in self.results.read_text("utf-8").split("\n"):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if event.pop("child", None) == self.child.name:
                events.append(event)
        return events


def script_task(
    name: str, script: str, job: Any, environment: Mapping[str, str], scratch: Path, results: Path
) -> Task:
    """script: of this folder; job: a dataclass, which the child reads from JOB.json."""
    job_path = scratch / f"{name}.json"
    job_path.write_text(json.dumps(asdict(job) | {"job": type(job).__name__}), "utf-8")
    command = [sys.executable, str(SCRIPTS / script), name, str(job_path), str(results)]
    return Task(Child(name, command, environment), results)
