"""Builds the native extension under GCC's sanitizers, and runs its tests and the fuzz against that.

    scripts/sanitize.py             the proof of a release; --fuzz-seconds 600 by default
    scripts/sanitize.py --short     what CI runs, about 3 minutes on two cores

Two builds, in build/sanitize: AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer.
Each first has to report errors that its build makes on purpose (_make_error in bindings.cpp), so
that a set-up that finds nothing is not taken for a clean result. Exits with 1 when a sanitizer
reports anything, a test fails or the fuzz does. Needs GCC with its sanitizer libraries, and what
`make setup` installs.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sanitized_extension import VARIABLE

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from argument_types import positive_number, whole

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
BIN = Path(sys.executable).parent
JOBS = len(os.sched_getaffinity(0))
EXIT_CODE = 66  # of a process that a sanitizer ends

ALL_TESTS = ["test_native_*.py", "test_fake_driver.py", "test_device_layer.py"]

REPORTS = {
    "address": "AddressSanitizer: heap-buffer-overflow",
    "undefined": "runtime error: signed integer overflow",
    "thread": "ThreadSanitizer: data race",
}
"""What is said of each error of _make_error."""


@dataclass(frozen=True)
class Sanitizer:
    name: str
    flags: str  # of -fsanitize
    libraries: tuple[str, ...]
    errors: tuple[str, ...]  # of _make_error, which it has to report
    environment: dict[str, str]
    short_tests: tuple[str, ...]
    skipped: str  # an expression of pytest -k

    @property
    def folder(self) -> Path:
        return BUILD / self.name

    @property
    def extension(self) -> Path:
        return self.folder / "vllm_magicpig" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"

    @property
    def reports(self) -> Path:
        """Of each process one: of pytest's workers nobody sees the exit code."""
        return self.folder / "reports"


ADDRESS = Sanitizer(
    name="address",
    flags="address,undefined",
    libraries=("libasan.so", "libubsan.so"),
    errors=("address", "undefined"),
    environment={
        # Python and torch keep what they allocate until the process ends: no leaks but theirs.
        # An allocation that is too large has to be a MemoryError, as without a sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Small objects from malloc, too, each between its own red zones. NumPy's arrays come from
        # there in any case, but for its cache of blocks below a kilobyte, which reuses them.
        "PYTHONMALLOC": "malloc",
    },
    short_tests=(
        "test_native_pages.py",
        "test_native_bindings.py",
        "test_native_stream_bindings.py",
        "test_native_stream.py",
        "test_native_schedule.py",
        "test_native_lists.py",
    ),
    # Minutes of the reference, for the code that the other tests of lists run.
    skipped="not those_of_the_reference",
)
THREAD = Sanitizer(
    name="thread",
    flags="thread",
    libraries=("libtsan.so",),
    errors=("thread",),
    environment={"TSAN_OPTIONS": "die_after_fork=0"},
    short_tests=("test_native_stream.py", "test_native_stream_errors.py", "test_fake_driver.py"),
    # ThreadSanitizer follows no threads that a forked child starts, loses track of those that still
    # run while the process ends, and does not see how an OpenMP runtime orders its own.
    skipped="not forked and not process_ends and not openmp",
)


class Failure(Exception):
    """Told in one sentence."""


def say(text: str) -> None:
    print(f"[sanitize] {text}", flush=True)


def build(sanitizer: Sanitizer) -> None:
    """Compiles what changed; setup.py has the flags."""
    objects = sanitizer.folder / "objects"
    command = ["setup.py", "--quiet", "build_ext", f"--build-lib={sanitizer.folder}"]
    result = subprocess.run(
        [sys.executable, *command, f"--build-temp={objects}"],
        cwd=ROOT,
        env={
            **os.environ,
            "CC": "gcc",  # whose libraries `library` finds
            "CXX": "g++",
            "MAGICPIG_SANITIZE": sanitizer.flags,
            "MAGICPIG_BUILD_JOBS": str(JOBS),
        },
        capture_output=True,  # mostly warnings that GCC gives with sanitizers alone
        text=True,
    )
    if result.returncode or not sanitizer.extension.exists():
        raise Failure(f"The {sanitizer.name} build failed:\n{result.stdout}{result.stderr}")


def library(name: str) -> str:
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(path).is_absolute():  # GCC repeats a name that it does not know
        raise Failure(f"gcc has no {name}; install its sanitizer libraries (Debian: libgcc-N-dev).")
    return path


def environment(sanitizer: Sanitizer) -> dict[str, str]:
    """The runtime comes first in a process whose interpreter was not built with it."""
    common = f"exitcode={EXIT_CODE}:log_path={sanitizer.reports / 'report'}"
    options = {
        name: f"{value}:{common}" if name.endswith("_OPTIONS") else value
        for name, value in sanitizer.environment.items()
    }
    return {
        **os.environ,
        **options,
        VARIABLE: str(sanitizer.extension),
        "LD_PRELOAD": " ".join(map(library, sanitizer.libraries)),
        # ThreadSanitizer does not see how OpenMP's threads wait for each other; torch uses none then.
        "OMP_NUM_THREADS": "1",
    }


def run(sanitizer: Sanitizer, command: Sequence[str], quiet: bool = False) -> tuple[int, str]:
    """Exit code, and what the sanitizer reports; UBSan beside ASan does so on stderr alone."""
    shutil.rmtree(sanitizer.reports, ignore_errors=True)
    sanitizer.reports.mkdir(parents=True)
    result = subprocess.run(
        command, cwd=ROOT, env=environment(sanitizer), capture_output=quiet, text=True
    )
    reports = [path.read_text() for path in sorted(sanitizer.reports.iterdir())]
    return result.returncode, "\n".join([*reports, result.stderr or ""]).strip()


def prove_it_is_on(sanitizer: Sanitizer) -> None:
    program = (
        "import sys; sys.path.insert(0, 'scripts'); import sanitized_extension as s; s.load();"
        "from vllm_magicpig import _C; _C._make_error(sys.argv[1])"
    )
    for error in (None, *sanitizer.errors):
        command = [sys.executable, "-c", program, error or "none"]
        code, report = run(sanitizer, command, quiet=True)
        expected = code == EXIT_CODE and REPORTS[error] in report if error else not (code or report)
        if not expected:
            raise Failure(
                f"The {sanitizer.name} build made the error {error!r} on purpose, and ended with "
                f"exit code {code} and this report, so nothing that it says counts:\n{report}"
            )


def check(sanitizer: Sanitizer, what: str, command: Sequence[str]) -> None:
    say(f"{sanitizer.name}: {what}")
    start = time.monotonic()
    code, report = run(sanitizer, command)
    if report:
        raise Failure(f"{sanitizer.name}: {what}: the sanitizer reports\n{report}")
    if code:
        raise Failure(f"{sanitizer.name}: {what} failed with exit code {code}.")
    say(f"{sanitizer.name}: {what}: clean in {time.monotonic() - start:.0f} s")


def test_command(sanitizer: Sanitizer, short: bool) -> list[str]:
    patterns = sanitizer.short_tests if short else ALL_TESTS
    files = [str(p) for pattern in patterns for p in sorted((ROOT / "tests").glob(pattern))]
    # The console script, not `python -m pytest`; see the Makefile. pytest's cache belongs to the normal
    # runs.
    command = [str(BIN / "pytest"), "-q", "-p", "no:cacheprovider", *files]
    command += ["--capture=sys"]  # what UBSan writes to stderr is seen
    command += ["-n", str(JOBS), "--dist", "loadfile", "--max-worker-restart", "0"]
    command += ["--timeout", "1800"]
    return command + (["-k", sanitizer.skipped] if sanitizer.skipped else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few files of tests, 20 s of fuzz")
    parser.add_argument("--only", choices=("address", "thread"), help="one of the two builds")
    parser.add_argument(
        "--fuzz-seconds", type=positive_number, help="by default 600, with --short 20"
    )
    parser.add_argument("--fuzz-seed", type=whole(0), default=0)
    args = parser.parse_args()
    fuzz_seconds = args.fuzz_seconds or (20 if args.short else 600)
    start = time.monotonic()
    try:
        for sanitizer in (ADDRESS, THREAD):
            if args.only not in (None, sanitizer.name):
                continue
            say(f"{sanitizer.name}: building in {sanitizer.folder.relative_to(ROOT)}")
            build(sanitizer)
            say(f"{sanitizer.name}: does it report what its build does wrong on purpose?")
            prove_it_is_on(sanitizer)
            check(sanitizer, "tests", test_command(sanitizer, args.short))
            if sanitizer is ADDRESS:
                fuzz = ["scripts/fuzz_bindings.py", f"--seconds={fuzz_seconds}"]
                check(sanitizer, "fuzz", [sys.executable, *fuzz, f"--seed={args.fuzz_seed}"])
    except Failure as failure:
        sys.exit(f"[sanitize] FAILED: {failure}")
    say(f"all clean, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
