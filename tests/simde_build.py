"""The extension with its AVX-512 kernels in terms of AVX2: their very source, on machines without.

SIMDe (headers only; scripts/get_simde.sh fetches them) spells each AVX-512 intrinsic in AVX2. Built
for tests alone: -O1, since the speed means nothing, and all files side by side.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "cpu_kernels"
BUILD = ROOT / "build" / "simde_module"

FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-ffp-contract=off"),
    "-DMAGICPIG_SIMDE",
    # A namespace of its own: pybind11 knows types by their names in the whole process, and the
    # tests have loaded the real extension, too.
    "-Dmagicpig=magicpig_simde",
]
# SIMDe's headers go by the flags of the file. Not for the rest: contracted into FMAs, the portable
# kernels would no longer be the plain ones.
SIMDE_FLAGS = [
    *("-mavx2", "-mfma", "-mf16c"),
    "-Wno-psabi",
    "-fno-tree-sra",  # GCC 12.2 stops in that pass (internal error in gsi_insert_seq_nodes_after)
]


def build(simde_include: Path) -> ModuleType:
    """The module, compiled anew when a source or a flag changed."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*FLAGS, *include, "-isystem", str(simde_include)]
    compiler = os.environ.get("CXX", "c++")
    digest = hashlib.sha256("\0".join([compiler, *flags, *SIMDE_FLAGS]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = BUILD / digest.hexdigest()[:16]
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: Path) -> str:
            own = SIMDE_FLAGS if "avx512" in source.name else []
            target = folder / f"{source.stem}.o"
            run(compiler, *flags, *own, "-c", str(source), "-o", str(target))
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
        # Under another name first: a build that was cut short leaves no library.
        linked = library.with_suffix(".tmp")
        run(compiler, "-shared", "-pthread", *objects, "-ldl", "-o", str(linked))
        linked.rename(library)
    # Python calls PyInit_ of the last part of the name.
    spec = importlib.util.spec_from_file_location("simde._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
