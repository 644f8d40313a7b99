"""How the Triton kernels are tested: cases that run interpreted, or on a GPU where there is one.

Whether kernels are interpreted is decided when they are decorated, and the interpreter leaves marks
on triton.language, so the cases (triton_*_cases.py) run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

TESTS = Path(__file__).resolve().parent


def run_cases(name: str, interpreted: bool) -> None:
    """Runs tests/<name> with the pytest of this environment."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    pytest = Path(sys.executable).with_name("pytest")
    command = [pytest, "-q", "-p", "no:cacheprovider", TESTS / name]
    result = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{name} failed:\n{result.stdout}\n{result.stderr}"


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the host that the kernels reach: pinned where they run on a GPU."""
    return tensor if INTERPRETED else tensor.pin_memory()


def synchronize() -> None:
    if not INTERPRETED:
        torch.cuda.synchronize()
