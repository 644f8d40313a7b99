"""Compiles bench_native.cpp where it is missing or stale, and imports it.

The module is for this machine only (-march=native) and never shipped; it lies in build/bench, which
git ignores, in a folder named after its source and this CPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).with_name("bench_native.cpp")
MODULE = "magicpig_bench_native"
BUILD = SOURCE.parent.parent / "build" / "bench"
COMPILE_ARGUMENTS = ["-O3", "-march=native", "-Wall", "-Wextra", "-pthread"]


def load() -> ModuleType:
    """The module; compiling it takes about 15 s, once."""
    folder = BUILD / _key()
    found = sorted(folder.glob(f"{MODULE}*.so")) or [_compile(folder)]
    spec = importlib.util.spec_from_file_location(MODULE, found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _key() -> str:
    """Of the source, the flags, the Python and the CPU: -march=native code runs on its kind only."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (*COMPILE_ARGUMENTS, sys.version, platform.machine(), _cpu_flags()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def _compile(folder: Path) -> Path:
    from pybind11.setup_helpers import Pybind11Extension
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    extension = Pybind11Extension(
        MODULE,
        [str(SOURCE)],
        cxx_std=17,
        extra_compile_args=COMPILE_ARGUMENTS,
        extra_link_args=["-pthread"],
    )
    command = build_ext(Distribution({"name": MODULE, "ext_modules": [extension]}))
    # A process of its own each, so that two that compile at once do not meet.
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    command.build_lib = command.build_temp = str(scratch)
    command.ensure_finalized()
    command.run()
    folder.mkdir(parents=True, exist_ok=True)
    built = Path(command.get_ext_fullpath(MODULE))
    return built.replace(folder / built.name)
