"""scripts/gpu_check_wheel.py: which wheel belongs to a tree, and what is done where none does."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_check_parts as parts
import gpu_check_wheel as wheels
import pytest
from gpu_check_report import FAILED, MEASURED, PASSED
from gpu_check_wheel import Origin, WheelError, sources_digest

PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "vllm_magicpig").mkdir(parents=True)
    (root / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    (root / "vllm_magicpig" / "__init__.py").write_text("NUMBER = 1\n")
    return root


def wheel_of(folder: Path, digest: str, python: str = PYTHON) -> Path:
    number = Origin("abc123", digest).build_number
    path = folder / f"vllm_magicpig-0.1.0-{number}-{python}-{python}-linux_x86_64.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm_magicpig/_C.so", "binary")
        archive.writestr(
            "vllm_magicpig-0.1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nBuild: {number}\n"
        )
        archive.writestr("vllm_magicpig-0.1.0.dist-info/METADATA", "Name: vllm-magicpig\n")
    return path


def test_the_digest_is_of_what_goes_into_the_wheel(tree: Path) -> None:
    before = sources_digest(tree)
    (tree / "README.md").write_text("prose")
    (tree / "vllm_magicpig" / "_C.so").write_text("binary")
    assert sources_digest(tree) == before
    (tree / "vllm_magicpig" / "__init__.py").write_text("NUMBER = 2\n")
    assert sources_digest(tree) != before
    (tree / "vllm_magicpig" / "__init__.py").write_text("NUMBER = 1\n")
    (tree / "vllm_magicpig" / "__init__.py").rename(tree / "vllm_magicpig" / "other.py")
    assert sources_digest(tree) != before


def test_a_wheel_of_this_tree_and_python_is_unpacked(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit, site = tmp_path / "kit", tmp_path / "site"
    wheel_of(kit, "0" * 12)
    wheel_of(kit, sources_digest(tree), "cp39")
    (kit / "vllm_magicpig-0.1.0.whl").touch()
    right = wheel_of(kit, sources_digest(tree))
    earlier = site / "vllm_magicpig-0.0.9.dist-info"
    earlier.mkdir(parents=True)
    (earlier / "METADATA").write_text("Name: vllm-magicpig\n")
    assert wheels.find(kit, tree)[0] == right
    monkeypatch.syspath_prepend(site)
    wheels.install(kit, site, tree)
    assert (site / "vllm_magicpig" / "_C.so").read_text() == "binary"
    assert not earlier.exists()
    assert wheels.installed_origin() == Origin("abc123", sources_digest(tree))


def test_without_a_wheel_of_this_tree_it_is_compiled(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kit, site = tmp_path / "kit", tmp_path / "site"
    wheel_of(kit, "0" * 12)
    site.mkdir()
    compiled: list[tuple[str | None, ...]] = []

    def compile_wheel(root: Path, folder: Path, number: str | None, *options: str) -> Path:
        compiled.append((str(root), number, *options))
        return wheel_of(folder, sources_digest(root))

    monkeypatch.setattr(wheels, "compile_wheel", compile_wheel)
    monkeypatch.syspath_prepend(site)
    wheels.install(kit, site, tree)
    number = Origin("0", sources_digest(tree)).build_number
    assert compiled == [(str(tree), number, "--no-build-isolation")]
    assert "none of these sources" in capsys.readouterr().out
    assert (site / "vllm_magicpig" / "_C.so").exists()


def test_a_target_that_python_does_not_search_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(WheelError, match="is not on Python's path; add it to PYTHONPATH"):
        wheels.install(tmp_path, tmp_path / "site", tree)


def test_a_wheel_is_built_of_the_last_commit(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what has been edited since."""
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)[:12]
    digest = sources_digest(tree)
    (tree / "setup.py").write_text("edited")
    built: list[tuple[str, str]] = []

    def compile_wheel(root: Path, folder: Path, number: str) -> Path:
        built.append(((root / "setup.py").read_text(), number))
        return folder

    monkeypatch.setattr(wheels, "compile_wheel", compile_wheel)
    monkeypatch.setattr(wheels, "ROOT", tree)
    wheels.build(tmp_path)
    ((setup, number),) = built
    assert "edited" not in setup
    assert Origin.parse(number) == Origin(commit, digest)


@pytest.mark.parametrize(
    ("origin", "result"),
    [(None, MEASURED), (Origin("abc", "123"), PASSED), (Origin("abc", "456"), FAILED)],
)
def test_the_report_says_whether_the_wheel_is_this_trees(
    origin: Origin | None, result: str
) -> None:
    assert parts.wheel_row(origin, "123").result == result


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["install", str(tmp_path), "--target", str(tmp_path / "site")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
