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

    @staticmethod
    def read(path: Path) -> HardwareJob:
        return HardwareJob(**json.loads(path.read_text("utf-8")))


@dataclass(frozen=True)
class AnswerJob:
    """Greedy answers with log-probs of one engine.

    random_model: of tests/e2e/random_models.py, or None where `config`, a config.json, is given
    random weights. backend: None lets vLLM choose; options: magicpig's; arguments: more EngineArgs.
    """

    random_model: str | None
    config: dict[str, Any] | None
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
    `config`; samples: magicpig, with statistics."""

    config: dict[str, Any]
    cases: list[tuple[int, int]]
    output_tokens: int
    samples: bool
    arguments: dict[str, Any]


ENGINE_JOBS: dict[str, type[Any]] = {job.__name__: job for job in (AnswerJob, RecallJob, SpeedJob)}


def read_engine_job(path: Path) -> AnswerJob | RecallJob | SpeedJob:
    given = json.loads(path.read_text("utf-8"))
    return ENGINE_JOBS[given.pop("job")](**given)


class Reporter:
    """Appends events, JSON objects of one key each, to a file, line by line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, **event: Any) -> None:
        self._file.write(json.dumps(event, default=_plain) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


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
        """What it said so far; a killed child may leave half a line at the end."""
        if not self.results.exists():
            return []
        complete = self.results.read_text("utf-8").split("\n")[:-1]
        return [json.loads(line) for line in complete]


def hardware_task(job: HardwareJob, scratch: Path) -> Task:
    return _task("hardware", "gpu_check_hardware.py", asdict(job), OFFLINE, scratch)


def engine_task(
    name: str,
    job: AnswerJob | RecallJob | SpeedJob,
    environment: Mapping[str, str],
    scratch: Path,
) -> Task:
    content = asdict(job) | {"job": type(job).__name__}
    return _task(name, "gpu_check_engine.py", content, environment, scratch)


def _task(
    name: str,
    script: str,
    job: dict[str, Any],
    environment: Mapping[str, str],
    scratch: Path,
) -> Task:
    job_path, results = scratch / f"{name}.json", scratch / f"{name}.jsonl"
    job_path.write_text(json.dumps(job), "utf-8")
    command = [sys.executable, str(SCRIPTS / script), str(job_path), str(results)]
    return Task(Child(name, command, environment), results)
