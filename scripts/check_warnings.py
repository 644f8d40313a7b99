"""Compiles all C++ of the project with warnings as errors, for each level of x86-64; runs nothing.

    .venv/bin/python scripts/check_warnings.py
    .venv/bin/python scripts/check_warnings.py --levels x86-64-v3

Some warnings depend on the instructions that a compiler may use (-Wpsabi on vectors that one CPU has
and another has not), so that a build for the machine at hand shows a part of them only. -O1 runs the
analyses that warnings such as -Wmaybe-uninitialized need.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread"]
FLAGS += ["-fno-math-errno", "-fvisibility=hidden"]


@dataclass(frozen=True)
class Job:
    source: Path
    level: str

    def __str__(self) -> str:
        return f"{self.source.relative_to(ROOT)} for {self.level}"


def sources() -> list[Path]:
    """Of the extension and of the benchmarks' module; the largest first, as they take longest."""
    files = [*ROOT.glob("cpu_kernels/*.cpp"), *ROOT.glob("examples/*.cpp")]
    return sorted(files, key=lambda path: -path.stat().st_size)


def compile_job(job: Job, compiler: str) -> str:
    """What the compiler says, empty where it has nothing to say."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [compiler, *FLAGS, f"-march={job.level}", *include]
        if job.source.name.startswith("bindings"):
            command += ["-fsyntax-only", str(job.source)]
        else:
            command += ["-O1", "-c", str(job.source), "-o", f"{scratch}/object.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    return result.stderr or f"{compiler} ended with exit code {result.returncode}\n"


def check(jobs: list[Job], compiler: str, num_threads: int) -> list[Job]:
    """Prints a line per file and what the compiler says; returns the jobs that failed."""
    failed = []
    with ThreadPoolExecutor(num_threads) as threads:
        results = threads.map(lambda job: compile_job(job, compiler), jobs)
        for number, (job, said) in enumerate(zip(jobs, results, strict=True), 1):
            print(f"[{number}/{len(jobs)}] {job}: {'WARNINGS' if said else 'clean'}", flush=True)
            if said:
                print(said, flush=True)
                failed.append(job)
    return failed


def levels(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in LEVELS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"level {unknown[0]!r} is unknown; name some of {', '.join(LEVELS)}."
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", type=levels, default=list(LEVELS), metavar="A,B")
    arguments = parser.parse_args()
    jobs = [Job(source, level) for source in sources() for level in arguments.levels]
    compiler = os.environ.get("CXX", "c++")
    try:
        failed = check(jobs, compiler, len(os.sched_getaffinity(0)))
    except FileNotFoundError:
        sys.exit(f"the compiler {compiler!r} is not installed; install g++ or correct CXX.")
    if failed:
        sys.exit(f"{len(failed)} of {len(jobs)} compilations have warnings: {failed[0]} and so on.")


if __name__ == "__main__":
    main()
