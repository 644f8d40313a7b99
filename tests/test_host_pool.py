"""The pinned pool: regions by layer, what it says when something is refused, and giving back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice

from vllm_magicpig import host_pool
from vllm_magicpig.host_pool import HostPool, free_ram_bytes
from vllm_magicpig.huge_pages import HUGE_PAGE_BYTES

CPUS = sorted(os.sched_getaffinity(0))


def make(device: FakeDevice, layers: int = 3, layer_bytes: int = 5_000_000) -> HostPool:
    return HostPool(device, [layer_bytes] * layers, CPUS, lambda done, total: None)


def test_regions_are_zeroed_aligned_pinned_and_apart() -> None:
    device = FakeDevice()
    pool = make(device)
    regions = [pool.layer(i) for i in range(3)]
    for i, region in enumerate(regions):
        assert region.shape == (5_000_000,)
        assert region.data_ptr() % HUGE_PAGE_BYTES == 0
        assert not region.any()
        region.fill_(i + 1)
    assert [int(r.unique()) for r in regions] == [1, 2, 3]
    assert [r.data_ptr() for r in device.registered] == [r.data_ptr() for r in regions]
    pool.close()
    assert device.registered == []
    pool.close()  # a second time does nothing


def test_it_is_backed_by_huge_pages_where_the_system_grants_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has transparent huge pages switched off")
    pool = make(FakeDevice(), layers=1, layer_bytes=32 * HUGE_PAGE_BYTES)
    assert 0 <= pool.huge_page_bytes() <= 32 * HUGE_PAGE_BYTES


def test_a_forked_child_has_nothing_of_it() -> None:
    pool = make(FakeDevice())
    region = pool.layer(1)
    start, stop = region.data_ptr(), region.data_ptr() + region.nbytes
    assert mapped(start, stop)
    child = os.fork()
    if child == 0:
        os._exit(mapped(start, stop))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def mapped(start: int, stop: int) -> bool:
    """Whether this process has a mapping between these addresses."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = (line.split()[0].split("-") for line in lines)
    return any(int(begin, 16) < stop and int(end, 16) > start for begin, end in spans)


def test_progress_is_told_after_each_region() -> None:
    told: list[tuple[int, int]] = []
    HostPool(FakeDevice(), [1000] * 3, CPUS, lambda done, total: told.append((done, total)))
    assert told == [(1000, 3000), (2000, 3000), (3000, 3000)]


def test_a_refused_registration_names_how_far_it_came_and_unpins_that() -> None:
    device = FakeDevice()
    device.refuse_pinning_after = 2
    with pytest.raises(RuntimeError, match=r"failed after 0\.0 GiB of 0\.0 GiB") as e:
        make(device)
    assert "host_kv_cache_gib" in str(e.value)
    assert "ulimit -l" in str(e.value)
    assert device.registered == []


def test_memory_that_the_system_refuses_is_one_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"the host refuses .* GiB .* lower host_kv_cache_gib"):
        make(FakeDevice(), layers=1, layer_bytes=1 << 62)


def test_touching_leaves_the_callers_affinity_alone() -> None:
    before = os.sched_getaffinity(0)
    make(FakeDevice())
    assert os.sched_getaffinity(0) == before


def cgroup(folder: Path, limit: str, used: int, inactive_file: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")


def test_free_memory_is_the_smaller_of_the_systems_and_the_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_pool, "_CGROUPS", ())
    system = free_ram_bytes()
    assert 0 < system < torch.iinfo(torch.int64).max
    monkeypatch.setattr(host_pool, "_CGROUPS", ((tmp_path, "memory.max", "memory.current"),))
    cgroup(tmp_path, str(1 << 20), used=700_000, inactive_file=200_000)
    assert free_ram_bytes() == (1 << 20) - 700_000 + 200_000
    cgroup(tmp_path, "100", used=200, inactive_file=0)
    assert free_ram_bytes() == 0
    cgroup(tmp_path, "max", used=200, inactive_file=0)
    assert free_ram_bytes() > 1 << 20
