"""Which CPUs the kernel's threads get."""

from __future__ import annotations

import os

import pytest

from vllm_magicpig import cpus


@pytest.fixture(autouse=True)
def no_inherited_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("GOMP_CPU_AFFINITY", "4 5 7"),
        ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[4,5,7]"),
        ("OMP_PLACES", "{4,5,7}"),
    ],
)
def test_the_cores_that_vllm_gave_the_worker(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    monkeypatch.setattr(cpus, "_siblings", str)
    assert cpus.kernel_cpus(None) == [4, 5, 7]


def test_other_settings_are_not_taken_for_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PLACES", "{0:4}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1})
    monkeypatch.setattr(cpus, "_siblings", str)
    assert cpus.kernel_cpus(None) == [1, 3]


def test_one_cpu_of_each_physical_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(cpus, "_siblings", lambda cpu: f"{cpu % 2},{cpu % 2 + 2}")
    assert cpus.kernel_cpus(None) == [0, 1]


def test_more_threads_than_cores_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {6, 8})
    monkeypatch.setattr(cpus, "_siblings", str)
    assert cpus.kernel_cpus(5) == [6, 8, 6, 8, 6]
    assert cpus.kernel_cpus(1) == [6]
