"""`make gpu-check`: what only a machine with an NVIDIA GPU can show, in two stages, without a network.

    python scripts/gpu_check.py --stage first        does anything work: at most 225 s
    python scripts/gpu_check.py --stage second       is it right and fast: at most 430 s
    python scripts/gpu_check.py --stage second --only speed        one part
    python scripts/gpu_check.py --stage first --rehearse           at toy size on vLLM's CPU platform

First: the machine; probes of driver and host; the tests marked gpu; exact mode against dense
attention. Second: the machine; two layers as they serve; the recall model; speed of the Llama-3.1-8B
shape, magicpig and dense. Every part has a limit of its own, needs no other part, and every engine is
a process. The folder --output holds, at any moment: gpu_check.md and gpu_check.json, brought up to
date before and after each part; results.jsonl, to which processes append what they find at once;
logs.tgz; and cost_model.json (for examples/cost_model.py --fit). What was cut or not reached reads
"not run". docs/gpu_check.md tells what each figure decides.
Exit code 1 when something failed, 3 when something did not run; a missed bar of speed is only reported.
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
from gpu_check_logs import LogArchive
from gpu_check_parity import run_parity
from gpu_check_parts import Context, run_hardware, run_tests
from gpu_check_probe_rows import run_probes
from gpu_check_recall import run_recall
from gpu_check_report import FAILED, NOT_RUN, Part, Report, Row, table
from gpu_check_scale import FIRST_STAGE_S, GPU, REHEARSAL, SECOND_STAGE_S, Scale

NO_MACHINE = 2  # exit code: nothing was checked
ENDING_S = 8.0  # of a part's limit: for processes to end by an interrupt, and for the report


@dataclass(frozen=True)
class PartKind:
    name: str
    title: str
    run: Callable[[Part, float, Context], None]


def _compiled(part: Part, budget_s: float, context: Context) -> None:
    from gpu_check_compiled import run_compiled  # once it is known that the package is here

    run_compiled(part, budget_s, context)


def _speed(part: Part, budget_s: float, context: Context) -> None:
    from gpu_check_speed import run_speed

    run_speed(part, budget_s, context)


def _dense_speed(part: Part, budget_s: float, context: Context) -> None:
    from gpu_check_speed import run_dense_speed

    run_dense_speed(part, budget_s, context)


HARDWARE = PartKind("hardware", "Machine", run_hardware)


@dataclass(frozen=True)
class Stage:
    """seconds: of all its parts together."""

    seconds: float
    kinds: tuple[PartKind, ...]


STAGES = {
    "first": Stage(
        FIRST_STAGE_S,
        (
            HARDWARE,
            PartKind("probes", "Driver and host, question by question", run_probes),
            PartKind("tests", "Tests", run_tests),
            PartKind("parity", "Exact mode against dense attention", run_parity),
        ),
    ),
    "second": Stage(
        SECOND_STAGE_S,
        (
            HARDWARE,
            PartKind("compiled", "Two layers as they serve", _compiled),
            PartKind("recall", "Recall model", run_recall),
            PartKind("speed", "Speed of the 8B shape", _speed),
            PartKind("dense speed", "Speed of the dense backend", _dense_speed),
        ),
    ),
}


class _Parser(argparse.ArgumentParser):
    """One sentence, without the usage lines that argparse puts in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(NO_MACHINE, f"{message}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--only", action="append", metavar="PART", help="of the stage")
    parser.add_argument("--skip", action="append", metavar="PART", default=[])
    parser.add_argument("--seconds", type=_seconds, help="of the whole stage; default 225 and 430")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_check"), help="folder of the report"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="toy sizes on a CPU: proves nothing about a GPU"
    )
    given = parser.parse_args(argv)
    names = [kind.name for kind in STAGES[given.stage].kinds]
    for name in [*(given.only or []), *given.skip]:
        if name not in names:
            parser.error(
                f"{name!r} is not a part of stage {given.stage}; choose from {', '.join(names)}."
            )
    if not chosen(given):
        parser.error(f"--only and --skip leave no part to run; the parts are {', '.join(names)}.")
    if given.output.exists() and not given.output.is_dir():
        parser.error(f"--output {given.output} is a file; name a folder.")
    return given


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds.")
    return value


def chosen(given: argparse.Namespace) -> list[PartKind]:
    return [
        kind
        for kind in STAGES[given.stage].kinds
        if (given.only is None or kind.name in given.only) and kind.name not in given.skip
    ]


def what_is_missing(rehearse: bool) -> str | None:
    """A sentence where this machine cannot run the check."""
    for package in ("torch", "vllm", "vllm_magicpig"):
        if importlib.util.find_spec(package) is None:
            return f"gpu-check needs {package}, which is not installed here; see docs/gpu_check.md."
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


def run_part(kind: PartKind, part: Part, limit_s: float, context: Context) -> None:
    """Whatever goes wrong in it is a failed row of it. limit_s: the part's, or what is left."""
    part.state, part.limit_s = "running", limit_s
    started = time.monotonic()
    if limit_s <= ENDING_S:
        part.rows.append(Row(kind.name, NOT_RUN, "no time was left"))
    else:
        try:
            kind.run(part, limit_s - ENDING_S, context)
        except Exception as error:
            figure = f"{type(error).__name__}: {error}"
            part.rows.append(Row(kind.name, FAILED, figure, log=traceback.format_exc()))
    part.state, part.seconds = "over", time.monotonic() - started
    if not part.rows:
        part.rows.append(Row(kind.name, NOT_RUN, "nothing to report"))


def check(scale: Scale, kinds: Sequence[PartKind], deadline: float, output: Path) -> Report:
    """Runs the parts until `deadline`, of time.monotonic(). The report is written before and after
    each of them, and lists those that are still to come as not run."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    report = Report(command, scale.is_rehearsal, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    report.parts = [Part(kind.name, kind.title, scale.limits[kind.name]) for kind in kinds]
    results = output / "results.jsonl"
    report.write(output)
    results.write_text("")
    logs = LogArchive(output)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        context = Context(scale, report, Path(scratch), logs.folder, results)
        for kind, part in zip(kinds, report.parts, strict=True):
            limit_s = max(0.0, min(part.limit_s, deadline - time.monotonic()))
            part.state = "running"
            report.write(output)
            print(f"\n{kind.title} (at most {limit_s:.0f} s)", flush=True)
            try:
                run_part(kind, part, limit_s, context)
            finally:
                report.write(output)
                logs.put_away()
            print("\n".join(table(part.rows)), flush=True)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    given = parse(argv)
    missing = what_is_missing(given.rehearse)
    if missing is not None:
        print(missing, file=sys.stderr)
        return NO_MACHINE
    scale = REHEARSAL if given.rehearse else GPU
    deadline = begun + (given.seconds or STAGES[given.stage].seconds)
    try:
        with ended_by_sigterm():
            report = check(scale, chosen(given), deadline, given.output)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was found so far is in {given.output}", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"--output {given.output} cannot be written ({error}); name another.", file=sys.stderr
        )
        return NO_MACHINE
    print(f"\n{report.verdict}\nwritten to {given.output / 'gpu_check.md'}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
