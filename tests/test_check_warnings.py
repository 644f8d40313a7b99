"""Warnings are found on any machine, also those that its own instruction set does not show."""

from __future__ import annotations

import os
from pathlib import Path

import check_warnings
import pytest
from check_warnings import ROOT, Job

COMPILER = os.environ.get("CXX", "c++")

WIDE_VECTOR = """
typedef unsigned long Words __attribute__((vector_size(64)));
Words twice(Words words) { return words + words; }
"""


def test_a_vector_that_one_level_lacks_is_a_warning_there_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_warnings, "ROOT", tmp_path)
    source = tmp_path / "wide.cpp"
    source.write_text(WIDE_VECTOR)
    jobs = [Job(source, level) for level in check_warnings.LEVELS]
    failed = check_warnings.check(jobs, COMPILER, 2)
    assert [job.level for job in failed] == ["x86-64", "x86-64-v3"]


def test_all_cpp_of_the_project_is_compiled() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in check_warnings.sources()}
    assert "examples/bench_native.cpp" in names
    assert {f"cpu_kernels/{path.name}" for path in (ROOT / "cpu_kernels").glob("*.cpp")} < names


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(Exception, match="level 'x86-64-v9' is unknown; name some of x86-64, "):
        check_warnings.levels("x86-64,x86-64-v9")


def test_nothing_is_compiled_while_tests_are_collected(compiled_at_collection: list[str]) -> None:
    """An error there would end the collection of all tests."""
    assert compiled_at_collection == []
