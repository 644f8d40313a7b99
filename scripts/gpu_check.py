"""`make gpu-check`: what only a machine with an NVIDIA GPU can show, in 8 minutes, without a network.

    python scripts/gpu_check.py                      everything
    python scripts/gpu_check.py --only parity        one part; --skip leaves parts out
    python scripts/gpu_check.py --rehearse           at toy size on vLLM's CPU platform

Parts: the machine and its bandwidths; the tests marked gpu; exact mode against dense attention; the
recall model; speed of the Llama-3.1-8B shape. Each has a share of the time and every engine a process
of its own: what fails or takes too long is a row of the report. gpu_check.md, gpu_check.json,
cost_model.json (for examples/cost_model.py --fit) and the processes' logs go to --output, and are
brought up to date after every part. Exit code 1 when an answer is wrong or missing; a bar of speed
that is missed is only reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gpu_check_children import ended_by_sigterm
from gpu_check_parity import run_parity
from gpu_check_parts import Context, run_hardware, run_tests
from gpu_check_recall import run_recall
from gpu_check_report import FAILED, SKIPPED, Part, Report, Row, table
from gpu_check_scale import GPU, REHEARSAL, Scale

NO_MACHINE = 2  # exit code: nothing was checked


@dataclass(frozen=True)
class PartKind:
    """weight: share of the time; a part that is done early leaves the rest to those after it."""

    name: str
    title: str
    weight: float
    run: Callable[[Part, float, Context], None]


def _speed(part: Part, budget_s: float, context: Context) -> None:
    from gpu_check_speed import run_speed  # once it is known that the package is here

    run_speed(part, budget_s, context)


# Weights are seconds of 8 minutes, a little of which is kept for ending processes.
PARTS = (
    PartKind("hardware", "Machine", 50, run_hardware),
    PartKind("tests", "Tests", 100, run_tests),
    PartKind("parity", "Exact mode against dense attention", 90, run_parity),
    PartKind("recall", "Recall model", 60, run_recall),
    PartKind("speed", "Speed of the 8B shape", 180, _speed),
)
RESERVED_SHARE = 0.04


class Clock:
    """Shares what is left of the time among the parts that are left."""

    def __init__(self, total_s: float, weights: Sequence[float], now: Callable[[], float]) -> None:
        self._end = now() + total_s * (1 - RESERVED_SHARE)
        self._weights = list(weights)
        self._now = now

    def next_share(self) -> float:
        """Seconds for the next part; 0 once all is spent."""
        share = self._weights[0] / sum(self._weights)
        del self._weights[0]
        return max(0.0, (self._end - self._now()) * share)


class _Parser(argparse.ArgumentParser):
    """One sentence, without the usage lines that argparse puts in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(NO_MACHINE, f"{message}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(kind.name for kind in PARTS)
    parser = _Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", type=_part, metavar="PART", help=names)
    parser.add_argument("--skip", action="append", type=_part, metavar="PART", default=[])
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="in all; default %(default)g")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_check"), help="folder of the report"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="toy sizes on a CPU: proves nothing about a GPU"
    )
    given = parser.parse_args(argv)
    if not chosen(given):
        parser.error(f"--only and --skip leave no part to run; the parts are {names}.")
    return given


def _part(text: str) -> str:
    names = [kind.name for kind in PARTS]
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part; choose from {', '.join(names)}.")
    return text


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of minutes.")
    return value


def chosen(given: argparse.Namespace) -> list[PartKind]:
    return [
        kind
        for kind in PARTS
        if (given.only is None or kind.name in given.only) and kind.name not in given.skip
    ]


def what_is_missing(rehearse: bool) -> str | None:
    """A sentence where this machine cannot run the check."""
    for package in ("torch", "vllm", "vllm_magicpig"):
        if importlib.util.find_spec(package) is None:
            return f"gpu-check needs {package}, which is not installed here; see the README."
    # Counting devices the NVML way leaves no CUDA context in this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    has_gpu = torch.cuda.is_available() and torch.version.cuda is not None
    if rehearse and has_gpu:
        return "--rehearse is for machines without a GPU, and this one has one; leave it out."
    if not rehearse and not has_gpu:
        return (
            f"gpu-check needs an NVIDIA GPU, and torch {torch.__version__} finds none here; run it "
            "on a machine with one and with a CUDA build of vLLM, or pass --rehearse to try the "
            "script itself on a CPU."
        )
    return None


def run_part(kind: PartKind, budget_s: float, context: Context) -> Part:
    """Whatever goes wrong in it is a failed row of it."""
    part = Part(kind.name, kind.title, budget_s)
    context.report.parts.append(part)
    started = time.monotonic()
    try:
        kind.run(part, budget_s, context)
    except Exception as error:
        figure = f"{type(error).__name__}: {error}"
        log = traceback.format_exc()
        part.rows.append(Row(kind.name, FAILED, figure, is_correctness=True, log=log))
    finally:
        part.seconds = time.monotonic() - started
    if not part.rows:
        part.rows.append(Row(kind.name, SKIPPED, "nothing to report"))
    return part


def check(scale: Scale, kinds: Sequence[PartKind], seconds: float, output: Path) -> Report:
    """Runs the parts; the report is written after each of them, and when it is interrupted."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    report = Report([Path(sys.argv[0]).name, *sys.argv[1:]], scale.is_rehearsal, started)
    for log in (output / "logs").glob("*.log"):  # of an earlier run
        log.unlink()
    clock = Clock(seconds, [kind.weight for kind in kinds], time.monotonic)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        context = Context(scale, report, Path(scratch), output / "logs")
        for kind in kinds:
            budget_s = clock.next_share()
            print(f"\n{kind.title} (at most {budget_s:.0f} s)", flush=True)
            try:
                part = run_part(kind, budget_s, context)
            finally:
                report.write(output)
            print("\n".join(table(part.rows)), flush=True)
    report.finished = True
    report.write(output)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    given = parse(argv)
    missing = what_is_missing(given.rehearse)
    if missing is not None:
        print(missing, file=sys.stderr)
        return NO_MACHINE
    scale = REHEARSAL if given.rehearse else GPU
    try:
        with ended_by_sigterm():
            left_s = 60 * given.minutes - (
                time.monotonic() - begun
            )  # importing torch takes a while
            report = check(scale, chosen(given), left_s, given.output)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was found so far is in {given.output}", file=sys.stderr)
        return 130
    print(f"\n{report.verdict}\nwritten to {given.output / 'gpu_check.md'}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
