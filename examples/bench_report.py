"""What the benchmarks share: arguments, timing, and files that say where their figures come from."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from argument_types import folder_for_results
from compare_report import machine_facts, table

from vllm_magicpig.cpus import one_per_core

Clock: TypeAlias = Callable[[], float]

RESULTS = Path("bench_results")
EVICT_BYTES = 96 << 20
"""Read between timed calls: three times the last-level cache of the machines at hand, so that each call
finds its memory as the next layer of a deep model would, cold."""


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog="\n".join(description.splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    made.add_argument(
        "--output",
        type=folder_for_results,
        default=str(RESULTS),
        help="folder; default %(default)s",
    )
    return made


def cores() -> list[int]:
    """CPUs to run on: one of each physical core that this process may use."""
    return one_per_core(sorted(os.sched_getaffinity(0)))


def use_cpus(cpus: Sequence[int]) -> None:
    """Keeps this process's threads on `cpus`, and each of torch's OpenMP threads on one of them, as
    vLLM binds them in its CPU worker; this thread is the first. Pinned pools are made afterwards."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cpus)
        except (ProcessLookupError, PermissionError):  # gone meanwhile, or not ours
            continue
    torch.set_num_threads(len(cpus))
    runtime = openmp_runtime()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def bind(_: int | None) -> None:
        os.sched_setaffinity(0, {cpus[runtime.omp_get_thread_num()]})

    runtime.GOMP_parallel(bind, None, len(cpus), 0)


def openmp_runtime() -> ctypes.CDLL:
    """The one that torch has loaded."""
    runtime = re.compile(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*")
    found = runtime.search(Path("/proc/self/maps").read_text())
    assert found is not None, "torch runs its operations on OpenMP's threads"
    return ctypes.CDLL(found[0])


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side. On a shared machine the lower quartile is nearer to what the code
    takes; ratios are given of both."""

    median_ms: float
    p25_ms: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        ms = 1e3 * np.asarray(seconds)
        return Timing(float(np.median(ms)), float(np.percentile(ms, 25)), len(ms))

    def times_faster_than(self, other: Timing) -> float:
        return other.median_ms / self.median_ms


class Evictor:
    """Empties the caches by reading something else, on torch's threads: a model's other layers run on
    these, and leave them awake, with nothing of this one in any core's cache. alone: on this thread, so
    that the other cores are free meanwhile."""

    def __init__(self, num_bytes: int = EVICT_BYTES, alone: bool = False) -> None:
        self._lines = torch.ones(num_bytes // 8, dtype=torch.int64)[::8]
        self._alone = self._lines.numpy() if alone else None

    def __call__(self) -> None:
        if self._alone is None:
            self._lines.sum()
        else:
            self._alone.sum()


def interleave(
    sides: dict[str, Callable[[int], Any]],
    repeats: int,
    evict: Callable[[], None],
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each side, which take turns; the order turns round, so that none always follows the
    same one. A side is called with the number of the repeat, -1 for one that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    gc.disable()  # a collection would hit whoever is being timed
    try:
        for repeat in range(-1, repeats):
            for position in range(len(names)):
                name = names[(position + max(repeat, 0)) % len(names)]
                evict()
                started = clock()
                sides[name](repeat)
                taken = clock() - started
                if repeat >= 0:
                    seconds[name].append(taken)
    finally:
        gc.enable()
    return seconds


def hardware() -> dict[str, Any]:
    facts = machine_facts("CPU")
    facts["cpu_flags"] = [
        flag for flag in facts["cpu_flags"] if flag.startswith("avx") or flag in ("fma", "f16c")
    ]
    facts["transparent_huge_pages"] = _chosen("/sys/kernel/mm/transparent_hugepage/enabled")
    return facts


def _chosen(path: str) -> str:
    """ "always [madvise] never" -> "madvise"."""
    try:
        found = re.search(r"\[(\w+)\]", Path(path).read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def available_bytes() -> int:
    found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


@dataclass
class Report:
    """Writes NAME.json and plots of one benchmark, and prints its tables."""

    name: str
    folder: Path
    argv: Sequence[str] | None  # as main got them
    threads: Sequence[int]

    def __post_init__(self) -> None:
        arguments = sys.argv[1:] if self.argv is None else self.argv
        self._started = time.monotonic()
        self._content: dict[str, Any] = {
            "benchmark": self.name,
            "command": shlex.join(["python", f"examples/{self.name}.py", *map(str, arguments)]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "threads": list(self.threads),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = self._content["hardware"]
        widest = [flag for flag in ("avx2", "avx512f", "avx512_vpopcntdq", "avx512_bf16")]
        flags = ", ".join(flag for flag in widest if flag in facts["cpu_flags"])
        print(
            f"{facts['cpu']}, {facts['cores']} cores, {flags or 'no AVX2'}, huge pages "
            f"{facts['transparent_huge_pages'] or 'unknown'}, load average "
            f"{facts['load_average']:.1f}; {self._content['date']}"
        )

    def add(self, key: str, value: Any) -> None:
        """Kept in the file at once, so that an ended run leaves what it had."""
        self._content[key] = _plain(value)
        self._content["seconds"] = round(time.monotonic() - self._started, 1)
        path = self.folder / f"{self.name}.json"
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(self._content, indent=1) + "\n", "utf-8")
        scratch.replace(path)

    def print_table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print(f"\n{title}\n\n{table(header, rows)}", flush=True)

    def plot(self, name: str, width: int, draw: Callable[[Any], None], panels: int = 1) -> None:
        """draw(axes) draws NAME.png; without matplotlib there is none, and a line says so."""
        try:
            import matplotlib
        except ImportError:
            print("no plot: matplotlib is missing; pip install matplotlib")
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, panels, figsize=(width, 4.2), layout="constrained")
        draw(axes)
        figure.savefig(self.folder / f"{name}.png", dpi=140)
        pyplot.close(figure)

    def finish(self) -> None:
        print(
            f"\nwritten to {self.folder}/{self.name}.json after {self._content['seconds']:.0f} s",
            flush=True,
        )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def upper_quartile(values: Sequence[float]) -> float:
    return float(np.percentile(values, 75))


def tokens_name(num_tokens: int) -> str:
    return f"{num_tokens // 1024}K" if num_tokens % 1024 == 0 else str(num_tokens)
