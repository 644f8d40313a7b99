"""Set-up shows a line per step, and a command's output only where the command fails."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import setup_env
from logged_steps import SHOWN_LINES, LoggedSteps, StepFailed

PYTHON = sys.executable


@pytest.fixture
def steps(tmp_path: Path) -> LoggedSteps:
    return LoggedSteps(2, tmp_path / "logs" / "setup.log", heartbeat_s=0.2)


def test_a_step_that_succeeds_is_two_lines(
    steps: LoggedSteps, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps.begin("installing a thing")
    steps.run(PYTHON, "-c", "print('WARNING: noise')", cwd=tmp_path)
    steps.done()
    shown = capfd.readouterr()
    assert re.fullmatch(
        r"\[setup 1/2\] installing a thing\n\[setup 1/2\] done in \d+ s\n", shown.out
    )
    assert shown.err == ""
    assert "WARNING: noise" in (tmp_path / "logs" / "setup.log").read_text()


def test_a_failure_shows_the_end_of_the_log_and_its_path(
    steps: LoggedSteps, tmp_path: Path
) -> None:
    steps.begin("installing a thing")
    program = "import sys\nfor i in range(100): print('line', i)\nsys.exit(3)"
    with pytest.raises(StepFailed) as failure:
        steps.run(PYTHON, "-c", program, cwd=tmp_path)
    shown = str(failure.value).splitlines()
    assert shown[SHOWN_LINES - 1] == "line 99"
    assert f"line {100 - SHOWN_LINES}" == shown[0]
    assert shown[-1] == (
        "[setup] installing a thing failed with exit code 3; the lines above end the log "
        f"{tmp_path / 'logs' / 'setup.log'}."
    )


def test_a_program_that_is_missing_is_named(steps: LoggedSteps, tmp_path: Path) -> None:
    steps.begin("installing a thing")
    with pytest.raises(StepFailed, match="installing a thing failed: no-such-pip does not start"):
        steps.run("no-such-pip", cwd=tmp_path)


def test_a_long_step_says_what_it_does(
    steps: LoggedSteps, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps.begin("installing a thing")
    program = (
        "import time\n"
        "print('Downloading a wheel', flush=True)\n"
        "print('WARNING: noise', flush=True)\n"
        "time.sleep(1)"
    )
    steps.run(PYTHON, "-c", program, cwd=tmp_path)
    assert re.search(r"\[setup 1/2\] \d+ s so far: Downloading a wheel\n", capfd.readouterr().out)


def test_an_interrupt_ends_the_command(steps: LoggedSteps, tmp_path: Path) -> None:
    # A shell's background job ignores it, and so would this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt_a_command(steps, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_a_command(steps: LoggedSteps, tmp_path: Path) -> None:
    steps.begin("installing a thing")
    pid_file = tmp_path / "pid"
    program = (
        "import os, sys, time\n"
        "open(sys.argv[1] + '.new', 'w').write(str(os.getpid()))\n"
        "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "time.sleep(60)"
    )

    def interrupt() -> None:
        while not pid_file.exists():
            stop.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    stop = threading.Event()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        steps.run(PYTHON, "-c", program, str(pid_file), cwd=tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_what_is_cut_short_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp holds only once the last command of its step has ended."""
    monkeypatch.setattr(setup_env, "LOG", tmp_path / "setup.log")
    stamp = setup_env.Stamp(tmp_path / "stamp", "digest")

    def work(steps: LoggedSteps) -> None:
        assert stamp.is_stale()
        steps.run(PYTHON, "-c", program, cwd=tmp_path)

    step = setup_env.Step("installing a thing", work, (stamp,))
    program = "pass"
    setup_env.run_all([step])
    assert not stamp.is_stale()
    program = "raise SystemExit(1)"
    with pytest.raises(StepFailed):
        setup_env.run_all([step])
    assert stamp.is_stale()


def test_a_venv_without_pip_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "PYTHON", tmp_path / "python")
    assert not setup_env.venv_works()
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    assert not setup_env.venv_works()
    monkeypatch.setattr(setup_env, "PYTHON", Path(PYTHON))
    assert setup_env.venv_works()


def test_a_venv_that_is_made_again_is_filled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the stamps in the old one were current."""
    monkeypatch.setattr(setup_env, "VENV", tmp_path)
    works = True
    monkeypatch.setattr(setup_env, "venv_works", lambda: works)
    for step in setup_env.plan("cpu", []):
        for stamp in step.finishes:
            stamp.write()
    assert setup_env.plan("cpu", []) == []
    works = False
    titles = [step.title for step in setup_env.plan("cpu", [])]
    assert titles[0] == "making .venv"
    assert titles[-1] == "installing the build tools"
    assert [step.title for step in setup_env.plan("cpu", ["g++"])] == ["installing g++", *titles]
