"""The pinned host memory that holds the pages of a device's sampled layers."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vllm_magicpig.device import Device
from vllm_magicpig.huge_pages import HUGE_PAGE_BYTES, huge_page_bytes, touch


class HostPool:
    """One region of page-aligned, huge-page backed memory per layer, pinned region by region.

    Each is touched first by threads on `cpus`, so that its pages come from their NUMA node. `close`
    gives everything back; until then nothing may outlive the pool.
    """

    def __init__(
        self,
        device: Device,
        layer_bytes: Sequence[int],
        cpus: Sequence[int],
        on_progress: Callable[[int, int], None],
    ) -> None:
        """layer_bytes: of each region; on_progress(done, total) is called with bytes after each one.

        Raises RuntimeError where the system or the driver refuses.
        """
        self._device = device
        starts = [0]
        for size in layer_bytes:
            starts.append(starts[-1] + -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
        self._spans = [slice(at, at + size) for at, size in zip(starts, layer_bytes, strict=False)]
        total = sum(layer_bytes)
        try:
            self._map = mmap.mmap(
                -1, starts[-1] + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except (OSError, ValueError, OverflowError) as error:
            raise RuntimeError(
                f"the host refuses {_gib(total)} of memory for the KV pool ({error}); lower "
                "host_kv_cache_gib."
            ) from error
        self._map.madvise(mmap.MADV_HUGEPAGE)
        # A child of fork would make pages of this process copies once it writes to them, or get
        # copies of them all at once, since they are pinned.
        self._map.madvise(mmap.MADV_DONTFORK)
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE_BYTES
        self._memory = memory[start : start + starts[-1]]
        self._registered: list[torch.Tensor] = []
        done = 0
        for layer, size in enumerate(layer_bytes):
            region = self.layer(layer)
            touch(region.data_ptr(), region.nbytes, cpus)
            try:
                device.register(region)
            except RuntimeError as error:
                self.close()
                raise RuntimeError(
                    f"pinning the host KV pool failed after {_gib(done)} of {_gib(total)} "
                    f"({error}); lower host_kv_cache_gib, or raise the limit on locked memory "
                    "(ulimit -l; --ulimit memlock=-1 for a container)."
                ) from error
            self._registered.append(region)
            done += size
            on_progress(done, total)

    def layer(self, index: int) -> torch.Tensor:
        """uint8 [layer_bytes[index]], zeroed when new."""
        return self._memory[self._spans[index]]

    def huge_page_bytes(self) -> int:
        """How much of the pool the kernel backs with huge pages."""
        return huge_page_bytes([(self._memory.data_ptr(), self._memory.nbytes)])

    def close(self) -> None:
        """Unpins; nothing may be running on the device that uses the pool."""
        while self._registered:
            self._device.unregister(self._registered.pop())


def free_ram_bytes() -> int:
    """What the system and this process's control group can still give out."""
    available = _meminfo("MemAvailable")
    for folder, limit_name, usage_name in _CGROUPS:
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / usage_name).read_text())
            # Files cached by the kernel count as used, but are given up when memory is needed.
            reclaimable = _statistic(folder / "memory.stat", "inactive_file")
        except OSError:
            continue
        if limit != "max":
            available = min(available, max(0, int(limit) - used + reclaimable))
    return available


_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def _statistic(path: Path, name: str) -> int:
    found = (line.split() for line in path.read_text().splitlines())
    return next((int(value) for key, value in found if key == name), 0)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {name}; set host_kv_cache_gib.")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
