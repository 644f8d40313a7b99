"""Which CPUs the decode kernel's threads run on."""

from __future__ import annotations

import os
import re
from pathlib import Path


def kernel_cpus(threads: int | None) -> list[int]:
    """CPU ids, one per physical core that this process may use; `threads` of them if given.

    Raises ValueError for more threads than cores: the kernel's threads wait for each other, and two of
    them on one core would take turns.
    """
    cores = one_per_core(_allowed_cpus())
    return cores if threads is None else _first(cores, threads)


def builder_cpus(kernel: list[int]) -> list[int]:
    """CPU ids for building segments beside a kernel on these: others, if this process may use at
    least half as many others, else the kernel's own."""
    spare = [cpu for cpu in _allowed_cpus() if cpu not in kernel]
    return spare[: len(kernel)] if 2 * len(spare) >= len(kernel) else kernel


def rank_cpus(
    threads: int | None, local_rank: int, local_ranks: int, numa_nodes: list[int] | None
) -> list[int]:
    """CPU ids for one of several ranks on this machine, one per physical core.

    numa_nodes: NUMA node of each rank's device, None where unknown. Ranks on one node share its
    cores; without nodes all ranks share all cores. A rank with four cores or more leaves one to
    vLLM's own thread, unless `threads` asks for all. Raises ValueError for more threads than cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    peers = list(range(local_ranks))
    if numa_nodes is not None and len(numa_nodes) >= local_ranks:
        node = numa_nodes[local_rank]
        here = sorted(set(allowed) & set(_node_cpus(node)))
        if here:
            allowed = here
            peers = [rank for rank in peers if numa_nodes[rank] == node]
    cores = one_per_core(allowed)
    place, count = peers.index(local_rank), len(peers)
    share = cores[len(cores) * place // count : len(cores) * (place + 1) // count]
    share = share or [cores[place % len(cores)]]
    if threads is not None:
        return _first(share, threads)
    return share[1:] if len(share) >= 4 else share


def _first(cores: list[int], threads: int) -> list[int]:
    if threads > len(cores):
        raise ValueError(
            f"magicpig option threads is {threads}, but must be 1 to {len(cores)}, the physical cores "
            "that this worker may use, or null; correct it in --additional-config."
        )
    return cores[:threads]


def _node_cpus(node: int) -> list[int]:
    """CPU ids of a NUMA node, none where the system does not say."""
    try:
        text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    except OSError:
        return []
    return parse_cpu_list(text)


def parse_cpu_list(text: str) -> list[int]:
    """ "0-3,8" as Linux writes it -> [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        cpus += range(int(low), int(high or low) + 1)
    return cpus


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
