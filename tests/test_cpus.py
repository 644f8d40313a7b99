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


def test_more_threads_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {6, 7, 8})
    monkeypatch.setattr(cpus, "_siblings", lambda cpu: "6,7" if cpu < 8 else "8,9")
    assert cpus.kernel_cpus(2) == [6, 8]
    assert cpus.kernel_cpus(1) == [6]
    with pytest.raises(ValueError) as caught:
        cpus.kernel_cpus(4096)
    assert str(caught.value) == (
        "magicpig option threads is 4096, but must be 1 to 2, the physical cores that this worker may "
        "use, or null; correct it in --additional-config."
    )


def test_segments_are_built_where_the_kernel_is_not_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert cpus.builder_cpus([0, 1]) == [2, 3]
    assert cpus.builder_cpus([0, 1, 2, 3]) == [4, 5]
    assert cpus.builder_cpus([0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4], "one would be too slow for five"
    assert cpus.builder_cpus(list(range(6))) == list(range(6))


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs 0-7 on node 0 and 8-15 on node 1, no hyperthreads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(cpus, "_siblings", str)
    monkeypatch.setattr(cpus, "_node_cpus", lambda node: list(range(8 * node, 8 * node + 8)))


@pytest.mark.usefixtures("sixteen_cpus")
def test_a_rank_takes_the_cores_of_its_devices_node_and_leaves_one_to_vllm() -> None:
    assert cpus.rank_cpus(None, 0, 1, [1]) == list(range(9, 16))
    assert cpus.rank_cpus(None, 0, 2, [0, 1]) == list(range(1, 8))
    assert cpus.rank_cpus(None, 1, 2, [0, 1]) == list(range(9, 16))


@pytest.mark.usefixtures("sixteen_cpus")
def test_ranks_of_one_node_and_ranks_of_unknown_nodes_share_cores_without_overlap() -> None:
    assert cpus.rank_cpus(None, 0, 2, [0, 0]) == [1, 2, 3]
    assert cpus.rank_cpus(None, 1, 2, [0, 0]) == [5, 6, 7]
    shares = [cpus.rank_cpus(None, rank, 4, None) for rank in range(4)]
    assert shares == [[1, 2, 3], [5, 6, 7], [9, 10, 11], [13, 14, 15]]


@pytest.mark.usefixtures("sixteen_cpus")
def test_more_ranks_than_cores_share_them_but_a_rank_has_no_more_threads_than_cores() -> None:
    assert cpus.rank_cpus(None, 19, 20, None) != []
    assert cpus.rank_cpus(4, 1, 4, None) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="threads is 6, but must be 1 to 4, the physical cores"):
        cpus.rank_cpus(6, 1, 4, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8", [0, 1, 2, 3, 8]), ("5", [5]), ("", []), ("0,2-3", [0, 2, 3])],
)
def test_cpu_lists_as_linux_writes_them(text: str, expected: list[int]) -> None:
    assert cpus.parse_cpu_list(text) == expected
