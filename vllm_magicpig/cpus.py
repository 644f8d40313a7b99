"""Which CPUs the decode kernel's threads run on."""

from __future__ import annotations

import os
import re
from pathlib import Path


def kernel_cpus(threads: int | None) -> list[int]:
    """CPU ids, one per physical core that this process may use; `threads` of them if given.

    More threads than cores wrap around: they share cores rather than fail.
    """
    cpus = one_per_core(_allowed_cpus())
    if threads is None:
        return cpus
    return [cpus[i % len(cpus)] for i in range(threads)]


def one_per_core(cpus: list[int]) -> list[int]:
    """The first of each set of hyperthreads that share a core, in order."""
    seen: set[str] = set()
    chosen = []
    for cpu in cpus:
        siblings = _siblings(cpu)
        if siblings not in seen:
            seen.add(siblings)
            chosen.append(cpu)
    return chosen


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:  # no topology in some containers: take every CPU for a core
        return str(cpu)


def _allowed_cpus() -> list[int]:
    """What vLLM gave this worker's OpenMP threads, else the affinity of the process.

    vLLM tells a worker its cores through these variables and OpenMP then binds the main thread to
    the first of them, so that the affinity seen here is one core only.
    """
    kmp = re.search(r"proclist=\[([\d,]+)\]", os.environ.get("KMP_AFFINITY", ""))
    candidates = [
        os.environ.get("GOMP_CPU_AFFINITY", ""),
        kmp.group(1) if kmp else "",
        os.environ.get("OMP_PLACES", ""),
    ]
    for text in candidates:
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        # Only plain lists such as "0 1 2" or "{0,1,2}", which vLLM writes; ranges are a user's own.
        if numbers and re.fullmatch(r"[{]?\d+(?:[ ,]\d+)*[}]?", text):
            return numbers
    return sorted(os.sched_getaffinity(0))
