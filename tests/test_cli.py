"""The console script: what it offers, and how little it loads."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from vllm_magicpig.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: vllm-magicpig {command}")
    assert {"tune": "--prompts FILE", "stats": "URL"}[command] in shown


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["tun"]])
def test_no_or_another_command_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_script_is_installed() -> None:
    (script,) = (
        entry for entry in entry_points(group="console_scripts") if entry.name == "vllm-magicpig"
    )
    assert script.load() is main


@pytest.mark.parametrize("module", ["vllm_magicpig.server_stats", "vllm_magicpig.tune"])
def test_a_command_loads_neither_torch_nor_vllm_before_it_runs(module: str, tmp_path: Path) -> None:
    code = (
        f"import sys, {module}; "
        "sys.exit(str(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules))))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert loaded.stderr.strip() == "[]"


def test_tune_is_a_module_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_magicpig.tune", "model", "--prompts", "none.txt"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == (
        "vllm-magicpig tune: prompt file none.txt cannot be read (No such file or directory); give "
        "text files.\n"
    )


def test_an_interrupt_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_magicpig.server_stats.run", interrupt)
    assert main(["stats", "http://127.0.0.1:1"]) == 130
    assert capsys.readouterr().err == "\nvllm-magicpig stats: interrupted.\n"
