"""Processes with a time limit: what one does wrong is a result, and nothing of it stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_check_report import FAILED, NOT_RUN

LOG_LINES = 15
GRACE_S = 8.0  # after SIGINT: pytest writes its report, an engine unpins its memory
POLL_S = 0.1
DONE = "done"
GUARD = Path(__file__).with_name("gpu_check_guard.py")


@dataclass(frozen=True)
class Child:
    name: str
    command: Sequence[str]
    environment: Mapping[str, str]  # beside this process's


@dataclass(frozen=True)
class Ended:
    """state: DONE, FAILED or NOT_RUN (to its end); reason: one line, empty when done."""

    name: str
    state: str
    reason: str
    seconds: float
    log_end: str


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    log: Path
    started: float


def run_children(
    children: Sequence[Child], logs: Path, budget_s: float, at_once: int = 1
) -> dict[str, Ended]:
    """All of them, by name; those that are not done budget_s seconds from now are ended.

    logs: folder of their output, NAME.log each. Interrupted, it ends them all.
    """
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_s
    waiting, ended = deque(children), {}
    running: list[_Running] = []
    try:
        while waiting or running:
            over = time.monotonic() >= deadline
            while waiting and not over and len(running) < at_once:
                running.append(_start(waiting.popleft(), logs))
            for one in list(running):
                if one.process.poll() is not None:
                    running.remove(one)
                    ended[one.child.name] = _end(one, cut=False)
            if over:
                _interrupt(running)
                ended |= {one.child.name: _end(one, cut=True) for one in running}
                running = []
                ended |= {
                    child.name: Ended(
                        child.name, NOT_RUN, "there was no time left to start it", 0.0, ""
                    )
                    for child in waiting
                }
                waiting.clear()
            elif running:
                time.sleep(POLL_S)
    finally:
        for one in running:
            _kill(one.process)
    return ended


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt: else the children, in sessions of their own, would live on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(child: Child, logs: Path) -> _Running:
    log = logs / f"{child.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(GUARD), str(os.getpid()), *child.command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | child.environment,
            start_new_session=True,
            # A shell's background job ignores it, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    return _Running(child, process, log, time.monotonic())


def _interrupt(running: Sequence[_Running]) -> None:
    """SIGINT, and up to GRACE_S for all of them together to end by it."""
    for one in running:
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(one.process.poll() is None for one in running):
        time.sleep(POLL_S)


def _end(one: _Running, cut: bool) -> Ended:
    _kill(one.process)
    seconds = time.monotonic() - one.started
    text = one.log.read_text("utf-8", errors="replace")
    code = one.process.returncode
    if cut:
        state, reason = NOT_RUN, f"cut after {seconds:.0f} s"
    elif code == 0:
        return Ended(one.child.name, DONE, "", seconds, "")
    else:
        state, reason = FAILED, f"exit code {code}: {error_of(text)}"
    log_end = "\n".join(text.splitlines()[-LOG_LINES:])
    return Ended(one.child.name, state, reason, seconds, log_end)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started: they share its session's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def error_of(log: str) -> str:
    """The message of the first exception, the cause of those that follow; else the last line."""
    # Pydantic puts the sentence on a line of its own: "  Value error, <sentence> [type=...".
    wrapped = re.search(r"Value error, (.*?)(?: \[type=|$)", log, re.MULTILINE)
    plain = re.search(
        r"^.*?\b(\w*(?:Error|Exception): (?!.*validation error).*)", log, re.MULTILINE
    )
    found = [match for match in (wrapped, plain) if match is not None]
    if found:
        return min(found, key=re.Match.start).group(1).strip()
    lines = log.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
