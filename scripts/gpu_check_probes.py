"""What the CUDA path assumes of the driver and the host, asked in isolation: a process of its own.

    python scripts/gpu_check_probes.py NAME JOB.json RESULTS.jsonl

Each probe reports by itself and none depends on another, so that a crash or a limit costs one answer.
Without a GPU only the probes of host memory run, over a device that pins nothing.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_check_hardware import device_us
from gpu_check_jobs import ProbesJob, started_child

from vllm_magicpig import _C
from vllm_magicpig.cpus import kernel_cpus
from vllm_magicpig.host_pool import HostPool

Figures = Mapping[str, float]
DEVICE = "cuda"
SMALL_BYTES = 8192  # a query of 32 heads of 128 in bfloat16
HEADS, HEAD_SIZE, BLOCK_SIZE, TOKENS = 8, 128, 128, 8192  # of a chunk of an 8B model
SPIN_ELEMENTS = 1 << 10  # a kernel of a few us
BUSY_CYCLES = 200_000  # of a kernel that outlasts the launches behind it: some 100 us


@dataclass(frozen=True)
class Probe:
    """question: as the report asks it; needs_gpu: left out of a rehearsal."""

    name: str
    question: str
    needs_gpu: bool
    ask: Callable[[ProbesJob], Figures]


# --------------------------------------------------------------------------------------- registration


class _Unpinned:
    """A device of a rehearsal: registering costs nothing."""

    def register(self, memory: torch.Tensor) -> None:
        pass

    def unregister(self, memory: torch.Tensor) -> None:
        pass


class _Timed:
    """Registers through another device and adds up the time that takes."""

    def __init__(self, device: Any) -> None:
        self._device, self.seconds = device, 0.0

    def register(self, memory: torch.Tensor) -> None:
        started = time.perf_counter()
        self._device.register(memory)
        self.seconds += time.perf_counter() - started

    def unregister(self, memory: torch.Tensor) -> None:
        self._device.unregister(memory)


def cuda_device() -> Any:
    from vllm_magicpig.device import CudaDevice

    return CudaDevice(torch.device("cuda", 0))


def registration(job: ProbesJob) -> Figures:
    """Touching and pinning pools as the engine does, GB/s, and what free memory becomes of it."""
    figures: dict[str, float] = {}
    for size in job.registered_bytes:
        device = _Timed(cuda_device() if torch.cuda.is_available() else _Unpinned())
        before = available_bytes()
        started = time.perf_counter()
        pool = HostPool(device, [size], kernel_cpus(None), lambda done, total: None)
        spent = time.perf_counter() - started
        gib = f"{size / (1 << 30):g} GiB"
        figures |= {
            f"{gib} touched, GB/s": size / max(spent - device.seconds, 1e-9) / 1e9,
            f"{gib} registered, GB/s": size / max(device.seconds, 1e-9) / 1e9,
            f"{gib} on huge pages, share": pool.huge_page_bytes() / size,
            f"{gib}: MemAvailable before, GiB": before / (1 << 30),
            f"{gib}: MemAvailable with it, GiB": available_bytes() / (1 << 30),
        }
        pool.close()
    return figures


def available_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


# --------------------------------------------------------------------------------- registered memory


@contextmanager
def small_pages() -> Any:
    """Pages of a chunk of TOKENS in registered memory: bfloat16 [blocks, kv heads, elements]."""
    device = cuda_device()
    shape = (TOKENS // BLOCK_SIZE, HEADS, BLOCK_SIZE * 2 * HEAD_SIZE)
    size = shape[0] * shape[1] * shape[2] * 2
    pool = HostPool(device, [size], kernel_cpus(None), lambda done, total: None)
    try:
        yield device, pool.layer(0).view(torch.bfloat16).view(shape)
    finally:
        torch.cuda.synchronize()
        pool.close()


def triton_on_registered_memory(job: ProbesJob) -> Figures:
    """The engine's own kernels: rows into pages and back, GB/s; raises where rows come back wrong."""
    with small_pages() as (device, pages):
        shape = (TOKENS, HEADS, HEAD_SIZE)
        key, value, keys_back, values_back = (
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)
        )
        slots = torch.arange(TOKENS, device=DEVICE, dtype=torch.int64)
        table = torch.arange(pages.shape[0], device=DEVICE, dtype=torch.int32)
        kernels, num_bytes = device.kernels, 2 * key.nbytes

        def store() -> None:
            kernels.store_pages(key, value, None, slots, pages, BLOCK_SIZE)

        def gather() -> None:
            kernels.gather_pages(pages, table, 0, TOKENS, keys_back, values_back, BLOCK_SIZE)

        stored_us, gathered_us = device_us(store), device_us(gather)
        torch.cuda.synchronize()
        if not (torch.equal(keys_back, key) and torch.equal(values_back, value)):
            raise RuntimeError("rows that a kernel stored in registered memory come back different")
        return {
            "stored, GB/s": num_bytes / stored_us / 1e3,
            "gathered, GB/s": num_bytes / gathered_us / 1e3,
        }


# -------------------------------------------------------------------------------------------- latency


class HostFunctions:
    """cuLaunchHostFunc with C functions, which never wait for the interpreter's lock."""

    def __init__(self) -> None:
        signature = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
        )
        self._launch = signature(_C.find_launch_host_func())
        libc = ctypes.CDLL(None)
        self._nothing = ctypes.cast(libc.free, ctypes.c_void_p)  # of NULL
        self._sleep = ctypes.cast(libc.usleep, ctypes.c_void_p)

    def nothing(self, stream: torch.cuda.Stream) -> None:
        self._check(self._launch(stream.cuda_stream, self._nothing, None))

    def sleep(self, stream: torch.cuda.Stream, milliseconds: float) -> None:
        """usleep takes its argument by value, which the data pointer carries."""
        self._check(self._launch(stream.cuda_stream, self._sleep, int(1000 * milliseconds)))

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"cuLaunchHostFunc answers {status}")


def between_kernels_us(rounds: int, work: Callable[[], None]) -> list[float]:
    """Device time from the end of one kernel to the start of the next, `work` between them. The first
    kernel is busy until all is launched, so that Python's own time is not in it."""
    spin = torch.ones(SPIN_ELEMENTS, device=DEVICE)
    times = []
    for _ in range(rounds + 10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        work()
        end.record()
        spin.add_(1)
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times[10:])


def quantiles(name: str, times_us: list[float]) -> Figures:
    """times_us: sorted."""
    last = len(times_us) - 1
    return {
        f"{name}, median us": times_us[last // 2],
        f"{name}, p99 us": times_us[round(0.99 * last)],
    }


def host_function_latency(job: ProbesJob) -> Figures:
    """kernel -> host function -> kernel beside kernel -> kernel."""
    functions, stream = HostFunctions(), torch.cuda.current_stream()
    alone = between_kernels_us(job.latency_rounds, lambda: None)
    between = between_kernels_us(job.latency_rounds, lambda: functions.nothing(stream))
    return {**quantiles("nothing between", alone), **quantiles("a host function", between)}


def copy_latency(job: ProbesJob) -> Figures:
    """Of a query's size, to and from pinned memory."""
    host = torch.ones(SMALL_BYTES, dtype=torch.uint8).pin_memory()
    here = torch.ones(SMALL_BYTES, dtype=torch.uint8, device=DEVICE)
    to_host = between_kernels_us(
        job.latency_rounds, lambda: host.copy_(here, non_blocking=True) and None
    )
    to_device = between_kernels_us(
        job.latency_rounds, lambda: here.copy_(host, non_blocking=True) and None
    )
    return {**quantiles("8 KiB to the host", to_host), **quantiles("8 KiB back", to_device)}


# --------------------------------------------------------------------------- beside a host function


def launches_beside_a_host_function(job: ProbesJob) -> Figures:
    """How long Python waits in a launch while a host function runs: near 0, or near all of it."""
    functions = HostFunctions()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    spin = torch.ones(SPIN_ELEMENTS, device=DEVICE)
    spin.add_(1)  # compiled and loaded before anything is timed
    figures = {}

    def kernel_on(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            spin.add_(1)

    launches: dict[str, Callable[[], None]] = {
        "a host function behind it": lambda: functions.nothing(one),
        "a host function on another stream": lambda: functions.nothing(other),
        "a kernel behind it": lambda: kernel_on(one),
        "a kernel on another stream": lambda: kernel_on(other),
    }
    for name, launch in launches.items():
        launch()
        torch.cuda.synchronize()
        functions.sleep(one, job.callback_ms)
        time.sleep(job.callback_ms / 4e3)  # it runs by now
        started = time.perf_counter()
        launch()
        figures[f"{name}, ms in the launch"] = 1e3 * (time.perf_counter() - started)
        torch.cuda.synchronize()
    return figures


def second_stream_beside_a_host_function(job: ProbesJob) -> Figures:
    """When a kernel of another stream ends, launched while a host function runs."""
    functions = HostFunctions()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    spin = torch.ones(SPIN_ELEMENTS, device=DEVICE)
    spin.add_(1)
    torch.cuda.synchronize()
    functions.sleep(one, job.callback_ms)
    over = torch.cuda.Event()
    over.record(one)
    time.sleep(job.callback_ms / 4e3)
    started = time.perf_counter()
    with torch.cuda.stream(other):
        spin.add_(1)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    waited = 1e3 * (time.perf_counter() - started)
    still_running = not over.query()
    torch.cuda.synchronize()
    return {
        "ms until the kernel was over": waited,
        "host function still running then": float(still_running),
        "ms of the host function": job.callback_ms,
    }


PROBES = (
    Probe("registration", "touching and pinning host memory", False, registration),
    Probe("latency", "kernel, host function, kernel", True, host_function_latency),
    Probe("copies", "copies of 8 KiB between kernels", True, copy_latency),
    Probe(
        "launches",
        "launching beside a running host function",
        True,
        launches_beside_a_host_function,
    ),
    Probe(
        "second stream",
        "a second stream beside a host function",
        True,
        second_stream_beside_a_host_function,
    ),
    Probe("triton", "Triton on registered memory", True, triton_on_registered_memory),
)


def asked(has_gpu: bool) -> list[Probe]:
    return [probe for probe in PROBES if has_gpu or not probe.needs_gpu]


def main() -> None:
    job, report = started_child()
    for probe in asked(torch.cuda.is_available()):
        try:
            report(probe={"name": probe.name, "figures": dict(probe.ask(job))})
        except Exception as error:
            report(probe={"name": probe.name, "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
