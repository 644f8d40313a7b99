"""The fuzz of the bindings: it is quiet where nothing is wrong, and only there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def fuzz(*arguments: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own; with a function of that body among those that it finds."""
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
import sanitized_extension
sanitized_extension.load()
from vllm_magicpig import _C

def planted(num_bits):
    "planted(num_bits: int) -> None"
    {planted}

if {planted!r}:
    _C.planted = planted
import fuzz_bindings
if {planted!r}:
    fuzz_bindings.HANG_S = 2
sys.exit(fuzz_bindings.main({list(arguments)!r}))
"""
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, timeout=300
    )


def test_some_hundred_cases_reach_every_function_and_are_accepted_and_refused() -> None:
    result = fuzz("--cases", "300", "--seconds", "200")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "300 cases, no failure" in result.stdout
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines if re.search(r" \d+ ", line)]
    columns = next(line.split() for line in lines if not line.startswith("[fuzz]"))  # its progress
    counts = {row[0]: row[1:] for row in rows}
    assert columns[:2] == ["calls", "accepted"]
    for name in ("sample", "DecodeLayer.attend", "LshIndex.seal", "StreamLayer.launch_decode"):
        calls, accepted = map(int, counts[name][:2])
        assert calls // 3 < accepted < calls, name


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("raise KeyError(num_bits)", "exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("time.sleep(60)", "signal SIGALRM"),
    ],
    ids=["another exception", "a crash", "a hang"],
)
def test_a_bad_function_is_reported_and_the_case_repeats_it(body: str, how: str) -> None:
    result = fuzz("--seed", "3", "--cases", "1000", planted=body)
    assert result.returncode == 1
    assert f"by {how}" in result.stdout
    again = re.search(r"--seed 3 --case \d+", result.stdout)
    assert again is not None
    result = fuzz(*again[0].split(), planted=body)
    assert result.returncode == 1
    assert "  planted(num_bits=" in result.stdout


def test_a_new_argument_is_asked_for() -> None:
    program = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import fuzz_bindings as f; "
    program += (
        "f.Call('sample', print, ['row_budget_of_tomorrow'], []).builder('row_budget_of_tomorrow')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "sample has an argument row_budget_of_tomorrow; give it a line" in result.stderr
