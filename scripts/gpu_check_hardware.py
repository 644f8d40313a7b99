"""Facts and bandwidths of this machine: a process of its own, as it holds a CUDA context.

    python scripts/gpu_check_hardware.py NAME JOB.json RESULTS.jsonl

Bandwidths in GB/s (10**9 bytes), latencies in us, the best of a few rounds each. Nothing here is
compiled for it: host memory is read by PyTorch's own kernels.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check_jobs import EXAMPLES, started_child

sys.path.append(str(EXAMPLES))
from compare_report import machine_facts

from vllm_magicpig import _C
from vllm_magicpig.cpus import kernel_cpus

FLAGS = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vbmi2",
    "avx512_vpopcntdq",
)
ROUNDS = 3
ROW_BYTES = 512  # K and V of one token and kv head: head_dim 128, bfloat16
LINE_BYTES = 64
SMALL_COPY_BYTES = 8192  # a query of 32 heads of 128 in bfloat16
NUM_CALLBACKS = 500
COMMANDS = (
    "nvidia-smi",
    "nvidia-smi topo -m",
    "lscpu",
    "numactl --hardware",
    "cat /proc/meminfo",
    "cat /sys/kernel/mm/transparent_hugepage/enabled",
    "cat /sys/devices/system/cpu/smt/active",
    "uname -r",
)
"""What these print goes into the JSON report as it is."""


@dataclass(frozen=True)
class HostBandwidth:
    """threads: one a core; gathers are of random rows and cache lines."""

    threads: int
    sequential_gbs: float
    row_gather_gbs: float
    line_gather_gbs: float


@dataclass(frozen=True)
class DeviceBandwidth:
    """hbm_gbs: bytes read and written by a copy; h2d_gbs, d2h_gbs: pinned memory over PCIe;
    copy_us: a copy of SMALL_COPY_BYTES; callback_us: an empty host callback. Both of these are the
    mean of many in a row on one stream."""

    hbm_gbs: float
    h2d_gbs: float
    d2h_gbs: float
    copy_us: float
    callback_us: float


def facts() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if has_gpu else None
    machine = machine_facts(properties.name if properties else "no GPU")
    flags = machine.pop("cpu_flags")
    cores = kernel_cpus(None)
    return machine | {
        "gpu_memory_gib": properties.total_memory / (1 << 30) if properties else 0.0,
        "driver": driver_version() if has_gpu else "-",
        "cuda": torch.version.cuda or "-",
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "missing_cpu_flags": [flag for flag in FLAGS if flag not in flags],
        "physical_cores": len(cores),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        "kernels": _C.resolve_isa("auto").name,
        "locked_memory_limit": locked_memory_limit(),
    }


def locked_memory_limit() -> str:
    """What `ulimit -l` says, in bytes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def said(command: str) -> str:
    """What a command prints, or why it does not."""
    try:
        result = subprocess.run(command.split(), capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({error})"
    return result.stdout or f"(exit code {result.returncode}) {result.stderr}"


def driver_version() -> str:
    """Of the kernel module, which is there even where nvidia-smi is not."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s", text)
    return found[1] if found else "unknown"


# -------------------------------------------------------------------------------------------- host


def host_memory(num_bytes: int) -> torch.Tensor:
    """float32 ones on huge pages, where the system has them; written by as many threads as torch
    uses, so that each NUMA node holds a share."""
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)


def measure_host(memory: torch.Tensor, threads: int, gathered_bytes: int) -> HostBandwidth:
    torch.set_num_threads(threads)
    half = memory.numel() // 2
    sequential = max(
        gbs(memory.nbytes, memory.sum),
        gbs(memory.nbytes, lambda: torch.dot(memory[:half], memory[half:])),
    )
    return HostBandwidth(
        threads,
        sequential,
        gather_gbs(memory, ROW_BYTES, gathered_bytes),
        gather_gbs(memory, LINE_BYTES, gathered_bytes // 8),
    )


def gather_gbs(memory: torch.Tensor, row_bytes: int, gathered_bytes: int) -> float:
    """Random rows, added up in bags of 64 as attention does: embedding_bag prefetches and writes
    next to nothing. The indices, 8 bytes a row, are not counted, and new in each round: the caches
    hold what the last one has read."""
    rows = memory.view(-1, row_bytes // 4)
    bags = max(1, gathered_bytes // row_bytes // 64)
    best = 0.0
    with torch.inference_mode():
        for _ in range(1 + ROUNDS):
            indices = torch.randint(len(rows), (bags, 64))
            add_up = partial(torch.nn.functional.embedding_bag, indices, rows, mode="sum")
            spent = seconds(add_up)
            best = max(best, indices.numel() * row_bytes / spent / 1e9)
    return best


def gbs(num_bytes: int, work: Callable[[], Any]) -> float:
    work()
    return num_bytes / min(seconds(work) for _ in range(ROUNDS)) / 1e9


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------ device


def measure_device(num_bytes: int) -> DeviceBandwidth:
    host = torch.ones(num_bytes, dtype=torch.uint8).pin_memory()
    here, there = (torch.ones(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    small_host, small = host[:SMALL_COPY_BYTES], here[:SMALL_COPY_BYTES]
    launch, callback = host_callback()

    def many_callbacks() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(NUM_CALLBACKS):
            status = launch(stream, callback, None)
            if status != 0:
                raise RuntimeError(f"cuLaunchHostFunc answers {status}")

    def many_copies() -> None:
        for _ in range(NUM_CALLBACKS):
            small.copy_(small_host, non_blocking=True)

    return DeviceBandwidth(
        hbm_gbs=2 * num_bytes / device_us(lambda: there.copy_(here)) / 1e3,
        h2d_gbs=num_bytes / device_us(lambda: here.copy_(host, non_blocking=True)) / 1e3,
        d2h_gbs=num_bytes / device_us(lambda: host.copy_(here, non_blocking=True)) / 1e3,
        copy_us=device_us(many_copies) / NUM_CALLBACKS,
        callback_us=device_us(many_callbacks) / NUM_CALLBACKS,
    )


def host_callback() -> tuple[Callable[..., int], Any]:
    """(cuLaunchHostFunc, a host function that does nothing: the C library's free, for NULL).

    A Python function would wait for the interpreter lock, which the plugin's callbacks never do.
    """
    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    launch = signature(_C.find_launch_host_func())
    return launch, ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)


def device_us(work: Callable[[], Any]) -> float:
    """Between two events around it."""
    times = []
    for _ in range(ROUNDS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return min(times)


def main() -> None:
    job, report = started_child()
    report(facts=facts())
    report(commands={command: said(command) for command in COMMANDS})
    cores = kernel_cpus(None)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    memory = host_memory(job.host_buffer_bytes)
    report(host=measure_host(memory, len(cores), job.gathered_bytes))
    if job.device_buffer_bytes:
        report(device=measure_device(job.device_buffer_bytes))


if __name__ == "__main__":
    main()
