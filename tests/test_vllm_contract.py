"""scripts/vllm_contract.py without a network: what it keeps of a wheel, what it says without one."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import vllm_contract

from vllm_magicpig.vllm_versions import RELEASES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "build" / "contract"
    monkeypatch.setattr(vllm_contract, "ROOT", tmp_path)
    monkeypatch.setattr(vllm_contract, "FOLDER", folder)
    return folder


def pip(monkeypatch: pytest.MonkeyPatch, wheel: dict[str, str] | None) -> list[list[str]]:
    """Stands in for pip; wheel: its files, None = pip fails. Returns the commands that it gets."""
    commands: list[list[str]] = []

    def run(command: list[str], **arguments: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if wheel is not None:
            target = Path(command[command.index("--dest") + 1]) / "vllm-1-cp38-abi3-any.whl"
            with zipfile.ZipFile(target, "w") as archive:
                for name, text in wheel.items():
                    archive.writestr(name, text)
        return subprocess.CompletedProcess(command, 0 if wheel is not None else 1)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_python_files_of_a_wheel_are_kept_and_fetched_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"vllm/__init__.py": "", "vllm/v1/outputs.py": "x = 1", "vllm/_C.abi3.so": "binary"}
    commands = pip(monkeypatch, files)
    for _ in range(2):
        assert vllm_contract.fetch("0.33.0") == folder / "0.33.0"
    assert len(commands) == 1
    assert commands[0][-1] == "vllm==0.33.0"
    kept = {str(p.relative_to(folder / "0.33.0")) for p in folder.rglob("*") if p.is_file()}
    assert kept == {"vllm/__init__.py", "vllm/v1/outputs.py"}
    assert [path.name for path in folder.iterdir()] == ["0.33.0"]


def test_without_the_wheel_there_is_a_sentence_and_nothing_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(monkeypatch, None)
    with pytest.raises(
        SystemExit, match=r"the wheel of vLLM 0\.33\.0 cannot be had from the package"
    ):
        vllm_contract.fetch("0.33.0")
    assert not folder.exists()


def test_a_broken_wheel_leaves_no_half_of_a_release(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(self: zipfile.ZipFile, path: str, members: list[str]) -> None:
        Path(path, "vllm").mkdir()
        raise zipfile.BadZipFile("File is not a zip file")

    pip(monkeypatch, {"vllm/__init__.py": ""})
    monkeypatch.setattr(zipfile.ZipFile, "extractall", extract)
    with pytest.raises(zipfile.BadZipFile):
        vllm_contract.fetch("0.33.0")
    assert list(folder.iterdir()) == []


def test_every_supported_release_is_checked_and_one_that_breaks_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_contract, "check", lambda release, engines: release != RELEASES[-1])
    assert vllm_contract.main([]) == 1
    said = capsys.readouterr().out
    assert f"vLLM {RELEASES[0]}: kept" in said
    assert f"vLLM {RELEASES[-1]}: BROKEN" in said
    assert vllm_contract.main(["--releases", RELEASES[0]]) == 0


def test_another_release_than_the_installed_one_runs_the_hooks_and_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_contract, "fetch", lambda release: tmp_path)
    monkeypatch.setattr(vllm_contract, "link_kernels", lambda sources: None)
    monkeypatch.setattr(vllm_contract, "installed_version", lambda: "0.32.0+cpu")
    monkeypatch.setattr("torch.version.cuda", None)
    ran: list[str] = []
    monkeypatch.setattr(
        vllm_contract, "run_tests", lambda release, sources, tests: ran.extend(tests) is None
    )
    vllm_contract.check("0.32.0", engines=True)
    assert ran == ["tests/contract"]
    ran.clear()
    assert vllm_contract.check("0.33.0", engines=True)
    assert {"tests/contract", "tests/test_plugin.py", "tests/e2e/test_exact_parity.py"} <= set(ran)
    root = Path(__file__).parent.parent
    assert [name for name in ran if name.startswith("tests/") and not (root / name).exists()] == []
