"""Figures of a worker that no longer runs are nobody's, and are swept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_magicpig.process_identity import identity, is_running, own_identity
from vllm_magicpig.published_stats import StatsFile, read_ranks, sweep

WRITER = """
import sys, time, tempfile
from vllm_magicpig.published_stats import StatsFile
tempfile.tempdir = sys.argv[1]
StatsFile("killed", 0, 0).write({"threads": 4})
print("written", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"vllm-magicpig-{os.getuid()}"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker that has written its file."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        yield process
        process.kill()


def test_a_killed_workers_file_is_ignored_and_swept(
    writer: subprocess.Popen[str], folder: Path
) -> None:
    assert [each.stats for each in read_ranks("killed")] == [{"threads": 4}]
    StatsFile("next", 0, 0)  # sweeps, and leaves what a running worker wrote
    assert len(read_ranks("killed")) == 1
    writer.kill()
    writer.wait()
    assert read_ranks("killed") == []
    StatsFile("next", 0, 0)
    assert not (folder / "killed").exists()


def test_another_process_with_the_same_id_is_another() -> None:
    pid, start, boot = own_identity().split()
    assert is_running(own_identity())
    assert not is_running(f"{pid} {int(start) - 1} {boot}")
    assert not is_running(f"{pid} {start} another-boot")
    assert not is_running("nonsense")


def test_a_process_that_ended_has_no_identity() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until it is waited for
    assert identity(child.pid) is None
    child.wait()
    assert identity(child.pid) is None


def test_half_written_and_foreign_files_are_no_figures(folder: Path) -> None:
    StatsFile("mine", 0, 0).write({"threads": 1})
    (folder / "mine" / "0-1.json").write_text('{"process": ')
    (folder / "mine" / "0-2.json").write_text(json.dumps({"threads": 2}))  # of an older version
    (folder / "mine" / "0-3.999999999").write_text("")  # its writer was killed while writing
    assert [each.rank for each in read_ranks("mine")] == [0]
    sweep()
    assert [path.name for path in (folder / "mine").iterdir()] == ["0-0.json"]


def test_a_link_in_the_place_of_the_folder_is_refused_and_not_swept(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "instance").mkdir(parents=True)
    (other / "instance" / "0-0.json").write_text("precious")
    folder.symlink_to(other)
    file = StatsFile("instance", 0, 1)
    assert (other / "instance" / "0-0.json").read_text() == "precious"
    with pytest.raises(OSError, match="is not a folder of this user; remove it"):
        file.write({})
