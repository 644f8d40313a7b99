"""The wheel of this package that a gpu-check carries along, so that nothing is compiled on its time.

    python scripts/gpu_check_wheel.py build FOLDER                   of the last commit
    python scripts/gpu_check_wheel.py install FOLDER --target SITE   into a folder of PYTHONPATH

`build` runs under the Python that the other machine has. The wheel's build number names the commit
and a digest of the sources, which `install` and the report compare with those of the tree beside
them. Where no wheel fits, `install` says so and compiles, MAGICPIG_BUILD_JOBS files at once (all
CPUs by default). Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm-magicpig"
SOURCES = ("setup.py", "pyproject.toml", "vllm_magicpig", "triton_kernels", "cpu_kernels")
SUFFIXES = (".py", ".pyi", ".toml", ".cpp", ".h", ".inl", ".typed")


class WheelError(Exception):
    """One sentence for the user."""


@dataclass(frozen=True)
class Origin:
    """What a wheel was built of: the first digits of its commit, and of its sources' digest."""

    commit: str
    digest: str

    @property
    def build_number(self) -> str:
        return f"0_{self.commit}_{self.digest}"

    @staticmethod
    def parse(build_number: str) -> Origin | None:
        found = re.fullmatch(r"0_([0-9a-f]+)_([0-9a-f]+)", build_number)
        return None if found is None else Origin(found[1], found[2])


def sources_digest(root: Path) -> str:
    """Of the names and contents of all that goes into a wheel; a tree without git has one too."""
    digest = hashlib.sha256()
    for source in (root / name for name in SOURCES):
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        for path in files:
            if path.is_file() and path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def installed_origin() -> Origin | None:
    """Of the package that Python imports here; None where it was not installed from such a wheel."""
    try:
        wheel = importlib.metadata.distribution(PACKAGE).read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.search(r"^Build: (.*)$", wheel, re.MULTILINE)
    return None if found is None else Origin.parse(found[1].strip())


def build(folder: Path) -> Path:
    """The wheel of HEAD, without what is not committed; needs git, pip, and a package index or the
    build requirements of pyproject.toml."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).decode().strip()[:12]
    with tempfile.TemporaryDirectory(prefix="gpu-check-wheel-") as scratch:
        tree = Path(scratch)
        archive = _output(["git", "-C", str(ROOT), "archive", "--format=tar", "HEAD"])
        subprocess.run(["tar", "-x", "-C", scratch], input=archive, check=True)
        origin = Origin(commit, sources_digest(tree))
        return compile_wheel(tree, folder, origin.build_number)


def compile_wheel(tree: Path, folder: Path, build_number: str | None, *options: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", scratch, *options]
        if build_number is not None:
            command.append(f"--config-settings=--build-option=--build-number={build_number}")
        # Not from the tree, whose triton_kernels/ must not be on sys.path.
        result = subprocess.run([*command, str(tree)], cwd=scratch)
        if result.returncode != 0:
            raise WheelError(f"pip could not build the wheel with {sys.executable}; see above.")
        (made,) = Path(scratch).glob("*.whl")
        return made.rename(folder / made.name)


def find(folder: Path, root: Path) -> tuple[Path | None, str]:
    """(the wheel of this tree for this Python, or None; why, in one sentence)."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    digest, others = sources_digest(root), []
    for wheel in sorted(folder.glob("vllm_magicpig-*.whl")):
        fields = wheel.stem.split("-")  # name, version, build number if any, Python, ABI, platform
        origin = Origin.parse(fields[2]) if len(fields) == 6 else None
        if origin is not None and fields[3] == python and origin.digest == digest:
            return wheel, f"{wheel.name} was built of this tree's sources, commit {origin.commit}."
        others.append(wheel.name)
    found = ", ".join(others) or "no wheel"
    return None, f"{folder} holds {found}: none of these sources ({digest}) for {python}."


def install(folder: Path, target: Path, root: Path = ROOT) -> None:
    """Unpacks the wheel that fits, or one compiled here, into `target`, a folder of sys.path."""
    if str(target.resolve()) not in {str(Path(entry).resolve()) for entry in sys.path if entry}:
        raise WheelError(f"--target {target} is not on Python's path; add it to PYTHONPATH.")
    wheel, why = find(folder, root)
    print(why, flush=True)
    if wheel is not None:
        _unpack(wheel, target)
        return
    print("compiling", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-wheel-") as scratch:
        number = Origin("0", sources_digest(root)).build_number
        # This machine may have no package index.
        _unpack(compile_wheel(root, Path(scratch), number, "--no-build-isolation"), target)


def _unpack(wheel: Path, target: Path) -> None:
    """As pip does with a wheel that holds packages and metadata only; console scripts aside."""
    for before in target.glob("vllm_magicpig-*.dist-info"):
        shutil.rmtree(before)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    print(f"unpacked into {target}", flush=True)


def _output(command: Sequence[str]) -> bytes:
    result = subprocess.run(command, capture_output=True)
    if result.returncode != 0:
        raise WheelError(f"{command[0]} failed: {result.stderr.decode().strip()}")
    return result.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "install"):
        one = commands.add_parser(name)
        one.add_argument("folder", type=Path, help="of the wheel")
    one.add_argument("--target", type=Path, default=Path(sysconfig.get_path("purelib")))
    given = parser.parse_args(argv)
    os.environ.setdefault("MAGICPIG_BUILD_JOBS", str(len(os.sched_getaffinity(0))))
    try:
        if given.command == "build":
            print(build(given.folder.resolve()))
        else:
            install(given.folder.resolve(), given.target)
    except (WheelError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
