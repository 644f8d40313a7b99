"""Checks our use of vLLM against the sources of every release that magicpig supports.

    python scripts/vllm_contract.py
    python scripts/vllm_contract.py --releases 0.33.0 --no-engines

It fetches each release's wheel (about 330 MB), keeps its Python files in build/vllm-contract/RELEASE,
and runs tests/contract with those in place of the installed vLLM. A release other than the installed
one also runs the tests of the hooks and small engines, over the kernels of the installed CPU build.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from packaging.version import Version

from vllm_magicpig.vllm_versions import RELEASES, installed_version

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "vllm-contract"
WHEELS = ["--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:", "--no-deps"]
"""Those of CUDA, whatever this machine is: the Python files are those of every build."""

HOOKS = (
    "plugin", "platform_hooks", "cuda_platform", "compile_key", "support", "step", "device_step",
    "device_backend", "device_worker", "worker", "layer", "layer_selection", "device_layer", "capacity",
)  # fmt: skip
"""tests/test_*.py of what touches vLLM."""
ENGINES = ("tests/e2e/test_exact_parity.py", "-k", "llama or gemma3")
"""Exact mode on the host and the device path: chunks, cached prefixes, preemptions, sliding windows."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    results = {release: check(release, args.engines) for release in args.releases}
    for release, passed in results.items():
        step(f"vLLM {release}: {'kept' if passed else 'BROKEN'}")
    return 0 if all(results.values()) else 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our use of vLLM against its releases' sources.")
    parser.add_argument("--releases", nargs="+", choices=RELEASES, default=list(RELEASES))
    parser.add_argument(
        "--no-engines", dest="engines", action="store_false", help="read and import only"
    )
    return parser.parse_args(arguments)


def check(release: str, engines: bool) -> bool:
    sources = fetch(release)
    is_installed = Version(release).release == Version(installed_version()).release
    tests: list[Sequence[str]] = [("tests/contract",)]
    if is_installed:
        step(f"vLLM {release} is the installed one: `make test` runs the rest")
    elif torch.version.cuda is not None:
        step(
            f"vLLM {release}: its hooks and engines need a CPU build of vLLM, this is a CUDA build"
        )
    else:
        link_kernels(sources)
        tests.append([f"tests/test_{name}.py" for name in HOOKS])
        if engines:
            tests.append(ENGINES)
    return all([run_tests(release, sources, each) for each in tests])


def fetch(release: str) -> Path:
    """Folder with the Python files of a release. Ends the program in a sentence without its wheel."""
    folder = FOLDER / release
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as download:
        step(f"fetching the wheel of vLLM {release}, about 330 MB")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *WHEELS]
        result = subprocess.run(
            [*command, "--dest", download, f"vllm=={release}"], stdout=subprocess.DEVNULL
        )
        wheels = list(Path(download).glob("vllm-*.whl"))
        if result.returncode or not wheels:
            sys.exit(
                f"vllm_contract: the wheel of vLLM {release} cannot be had from the package index; see "
                "pip's words above, and run this again with a network."
            )
        step(f"unpacking its Python files to {folder.relative_to(ROOT)}")
        unpack(wheels[0], folder)
    return folder


def unpack(wheel: Path, folder: Path) -> None:
    """All or nothing, so that an interrupted run leaves no half of a release."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as partial,
        zipfile.ZipFile(wheel) as archive,
    ):
        archive.extractall(partial, [n for n in archive.namelist() if n.endswith(".py")])
        shutil.move(partial, folder)
        Path(partial).mkdir()  # the context manager removes it


def link_kernels(sources: Path) -> None:
    """Puts the compiled modules of the installed vLLM beside a release's Python files."""
    installed = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__path__[0])"],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    package = Path(installed.splitlines()[-1])
    for library in package.rglob("*.so"):
        link = sources / "vllm" / library.relative_to(package)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(library)


def run_tests(release: str, sources: Path, tests: Sequence[str]) -> bool:
    step(f"vLLM {release}: pytest {' '.join(tests)}")
    pytest = str(Path(sys.executable).parent / "pytest")
    environment = os.environ | {"PYTHONPATH": str(sources), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([pytest, "-q", *tests], cwd=ROOT, env=environment).returncode == 0


def step(message: str) -> None:
    print(f"[vllm-contract] {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
