"""Memory on huge pages, and on the NUMA node of who reads it.

A sampled row is 512 bytes at a random place: on small pages each costs a miss of the TLB as well.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20
_TOUCH_BYTES = 256 << 20  # per task, some 50 ms


def renew_on_huge_pages(start: int, size: int, cpus: Sequence[int]) -> int:
    """Gives the zeroed memory [start, start + size) back to the system and takes it anew, on huge pages
    where the system grants them, first touched by threads on `cpus`. What it holds is lost.

    For memory that another library has allocated and zeroed on small pages: those would become huge
    ones at some 2 MiB a second. Whole huge pages only; returns how many bytes these are, 0 where the
    system refuses, in which case nothing has changed.
    """
    first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    inside = (start + size - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if inside <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED):
        if madvise(first, inside, advice) != 0:
            return 0
    touch(first, inside, cpus)
    return inside


def touch(start: int, size: int, cpus: Sequence[int]) -> None:
    """Writes zeros to [start, start + size) from threads on these CPUs."""

    def pin(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})

    def zero(at: int) -> None:
        # Without the interpreter lock.
        ctypes.memset(start + at, 0, min(_TOUCH_BYTES, size - at))

    starts = range(0, size, _TOUCH_BYTES)
    waiting = iter(cpus)
    with ThreadPoolExecutor(len(cpus), initializer=lambda: pin(next(waiting))) as threads:
        list(threads.map(zero, starts))


def huge_page_bytes(spans: Sequence[tuple[int, int]]) -> int:
    """How much of these (start, size) is on huge pages: AnonHugePages of the mappings that overlap
    them, from /proc/self/smaps, and no more than the sizes add up to."""
    return min(sum(size for _, size in spans), sum(_huge_pages_of_mappings(spans)))


def _huge_pages_of_mappings(spans: Sequence[tuple[int, int]]) -> Iterator[int]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = any(low < start + size and high > start for start, size in spans)
        elif inside and head == "AnonHugePages:":
            yield int(line.split()[1]) * 1024
