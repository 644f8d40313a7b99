"""The native extension; everything else is declared in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "vllm_magicpig._C",
            sorted(str(p) for p in Path("cpu_kernels").glob("*.cpp")),
            depends=sorted(str(p) for p in Path("cpu_kernels").glob("*.[hi]*")),
            cxx_std=17,
            # No -march: each instruction set is compiled behind a target pragma and chosen at run
            # time, so one wheel runs on every x86-64 CPU. -fno-math-errno lets sqrt vectorise.
            extra_compile_args=[
                "-O3",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-fno-math-errno",
                "-pthread",
            ],
            extra_link_args=["-pthread", "-ldl"],
        )
    ]
)
