"""Runs the commands of a set-up: a line of progress per step on the terminal, their output in a log.

Standard library only, as setup_env.py.
"""

from __future__ import annotations

import subprocess
import time
from collections import deque
from pathlib import Path

HEARTBEAT_S = 15.0
"""A step that takes longer says every so often that it is alive, and what its log says last."""

SHOWN_LINES = 40
"""Lines of the log that a failure shows."""


class StepFailed(Exception):
    """A command of a step ended with an error; the message is for the terminal."""


class LoggedSteps:
    """Steps 1 to `total`, each begun by `begin` and made of commands that `run` runs."""

    def __init__(self, total: int, log: Path, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._total, self._number, self._log, self._heartbeat_s = total, 0, log, heartbeat_s
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def begin(self, title: str) -> None:
        self._number += 1
        self._title, self._started = title, time.monotonic()
        self._say(title)

    def done(self) -> None:
        self._say(f"done in {time.monotonic() - self._started:.0f} s")

    def run(self, *command: str, cwd: Path) -> None:
        """Raises StepFailed with the end of the log. An interrupt ends the command, too."""
        with self._log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            try:
                child = subprocess.Popen(
                    command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            except OSError as error:
                raise StepFailed(
                    f"{self._title} failed: {command[0]} does not start ({error})."
                ) from error
            try:
                code = self._wait(child)
            except BaseException:
                child.terminate()
                child.wait()
                raise
        if code:
            lines = "\n".join(self._last_lines(SHOWN_LINES))
            raise StepFailed(
                f"{lines}\n[setup] {self._title} failed with exit code {code}; the lines above end "
                f"the log {self._log}."
            )

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return child.wait(timeout=self._heartbeat_s)
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - self._started
                # pip's warnings say nothing of how far it is.
                told = [line for line in self._last_lines(SHOWN_LINES) if "WARNING" not in line]
                self._say(f"{elapsed:.0f} s so far: {''.join(told[-1:]).strip()[:70]}")

    def _last_lines(self, count: int) -> deque[str]:
        with self._log.open(errors="replace") as log:
            return deque((line.rstrip("\n") for line in log), maxlen=count)

    def _say(self, message: str) -> None:
        print(f"[setup {self._number}/{self._total}] {message}", flush=True)
