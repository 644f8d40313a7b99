"""Settings of every test process, made before vLLM is imported."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import sanitized_extension

# Engines run inside the test process (tests/e2e/engines.py), so that a start costs seconds.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# vLLM compiles a few sampler functions even in eager mode, a quarter of a minute for each process.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

# vLLM binds every CPU engine to the same cores, so processes of pytest-xdist take one each.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker is not None:
    cpus = sorted(os.sched_getaffinity(0))
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", str(cpus[int(worker.removeprefix("gw")) % len(cpus)])
    )

# `make vllm-contract` fetches the sources that it is about; pytest runs it when it is named.
collect_ignore = ["contract"]

sanitized_extension.load()

_COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
_collecting = True
_compiled: list[str] = []


def _note_compilers(event: str, arguments: tuple[Any, ...]) -> None:
    """Of subprocess.Popen's audit event: (executable, arguments, folder, environment)."""
    if _collecting and event == "subprocess.Popen":
        program = Path(os.fsdecode(arguments[0])).name
        if program.rsplit("-", 1)[0] in _COMPILERS or program in _COMPILERS:
            _compiled.append(program)


sys.addaudithook(_note_compilers)


def pytest_collection_finish() -> None:
    global _collecting
    _collecting = False


@pytest.fixture
def compiled_at_collection() -> list[str]:
    """Compilers that importing the tests started."""
    return _compiled
