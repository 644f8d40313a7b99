"""The native extension; everything else is declared in pyproject.toml."""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# Sanitizers, as -fsanitize takes them: scripts/sanitize.py builds the extension with them, elsewhere.
sanitizers = os.environ.get("MAGICPIG_SANITIZE")
sanitizer_flags = (
    [
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
        "-fno-wrapv",  # Python's own flags may say -fwrapv, which defines what UBSan looks for
        "-O1",  # the last -O counts
        "-g1",  # lines in reports, at two thirds of the time
        "-DMAGICPIG_SANITIZE",  # a deliberate error that the run must report; see bindings.cpp
        # GCC warns of what its own instrumentation makes it lose sight of.
        "-Wno-error",
    ]
    if sanitizers
    else []
)

# Warnings end the build in CI only: another compiler's new warning must not stop an installation.
warnings_are_errors = ["-Werror"] if os.environ.get("MAGICPIG_WERROR") == "1" else []

jobs = os.environ.get("MAGICPIG_BUILD_JOBS", "")
if jobs and not (jobs.isdecimal() and int(jobs) > 0):
    raise SystemExit(
        f"MAGICPIG_BUILD_JOBS is {jobs!r}, but must be a number of compilers to run at once, 1 or "
        "more; correct or unset it."
    )
ParallelCompile(default=int(jobs or len(os.sched_getaffinity(0)))).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "vllm_magicpig._C",
            sorted(str(p) for p in Path("cpu_kernels").glob("*.cpp")),
            depends=["setup.py", *sorted(str(p) for p in Path("cpu_kernels").glob("*.[hi]*"))],
            cxx_std=17,
            # No -march: each instruction set is compiled behind a target pragma and chosen at run
            # time, so one wheel runs on every x86-64 CPU. -fno-math-errno lets sqrt vectorise.
            extra_compile_args=[
                "-O3",
                "-Wall",
                "-Wextra",
                *warnings_are_errors,
                "-fno-math-errno",
                # A sum of products is what its source says: fused, it would differ between ISAs.
                "-ffp-contract=off",
                "-pthread",
                *sanitizer_flags,
            ],
            extra_link_args=["-pthread", "-ldl", *sanitizer_flags[:1]],
        )
    ]
)
