"""What the parts of a gpu-check share, and its first two: the machine, and the tests."""

from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check_children import DONE, Child, Ended, run_children
from gpu_check_jobs import OFFLINE, ROOT, HardwareJob, Task, script_task
from gpu_check_report import FAILED, NOT_RUN, Part, Report, Row, checked, measured
from gpu_check_scale import Scale
from gpu_check_wheel import Origin, installed_origin, sources_digest

MAX_NAMES = 10  # of failed or skipped tests in a row
# Those of pyproject.toml but --strict-config: the machine may lack the plugin that knows `timeout`.
PYTEST_OPTIONS = "--import-mode=importlib -p no:logging"


@dataclass
class Context:
    """scratch: folder for job files, gone afterwards; logs: the folder of children's output; results:
    the file that they report to; sides: what engines said of their speed, by name."""

    scale: Scale
    report: Report
    scratch: Path
    logs: Path
    results: Path
    sides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """How a child ended, and its events."""

    ended: Ended
    events: list[dict[str, Any]]

    def all(self, kind: str) -> list[Any]:
        return [event[kind] for event in self.events if kind in event]

    def first(self, kind: str) -> Any:
        """None where it never got so far."""
        return next(iter(self.all(kind)), None)


def ask(
    part: Part, context: Context, tasks: Sequence[Task], budget_s: float, at_once: int = 1
) -> dict[str, Answered]:
    """Runs the children; keeps what they said in the part's raw report."""
    children = [task.child for task in tasks]
    ended = run_children(children, context.logs, budget_s, at_once)
    answered = {}
    for task in tasks:
        name = task.child.name
        answered[name] = Answered(ended[name], task.events())
        part.raw[name] = {"state": ended[name].state, "seconds": ended[name].seconds}
    return answered


def ended_row(check: str, ended: Ended) -> Row:
    """Of a child that failed or was cut."""
    assert ended.state in (FAILED, NOT_RUN)
    return Row(check, ended.state, ended.reason, log=ended.log_end)


# ---------------------------------------------------------------------------------------- hardware


def run_hardware(part: Part, budget_s: float, context: Context) -> None:
    scale = context.scale
    part.rows.append(wheel_row(installed_origin(), sources_digest(ROOT)))
    job = HardwareJob(scale.host_buffer_bytes, scale.device_buffer_bytes, scale.gathered_bytes)
    task = script_task(
        "hardware", "gpu_check_hardware.py", job, OFFLINE, context.scratch, context.results
    )
    answered = ask(part, context, [task], budget_s)["hardware"]
    facts = answered.first("facts")
    if facts is not None:
        context.report.facts |= facts
        part.rows += fact_rows(facts)
    part.raw["commands"] = answered.first("commands")
    for host in answered.all("host"):
        context.report.facts["host"] = host
        part.rows.append(host_row(host))
    device = answered.first("device")
    if device is not None:
        context.report.facts["device_bandwidth"] = device
        part.rows += device_rows(device)
    if answered.ended.state != DONE:
        part.rows.append(ended_row("hardware", answered.ended))


def wheel_row(origin: Origin | None, digest: str) -> Row:
    """digest: of this tree's sources. An editable installation has no wheel that could differ."""
    check, bar = "the wheel that runs", "of this tree's sources"
    if origin is None:
        return measured(check, f"none: installed from a folder; this tree's sources are {digest}")
    figure = f"commit {origin.commit}, sources {origin.digest}; this tree's are {digest}"
    return checked(check, origin.digest == digest, figure, bar)


def fact_rows(facts: dict[str, Any]) -> list[Row]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    missing = ", ".join(facts["missing_cpu_flags"])
    cpu = (
        f"{facts['cpu']}; {facts['physical_cores']} cores for this process, NUMA nodes: "
        f"{facts['numa_nodes']}, {facts['memory_gib']:.0f} GiB of RAM; kernels for "
        f"{facts['kernels']}"
    )
    gpu = f"{facts['device']}, {facts['gpu_memory_gib']:.1f} GiB, driver {facts['driver']}"
    return [
        measured("GPU", gpu),
        measured("software", f"Python {facts['python']}, CUDA {facts['cuda']}, {versions}"),
        measured("CPU", cpu),
        measured("CPU flags", f"{', '.join(facts['cpu_flags'])}; without {missing or 'none'}"),
        measured("memory that may be locked", facts["locked_memory_limit"]),
        measured("load before", f"{facts['load_average']:.1f} processes (mean of a minute)"),
    ]


def host_row(host: dict[str, Any]) -> Row:
    return measured(
        f"host memory, {host['threads']} threads, one a core",
        f"reading {host['sequential_gbs']:.1f} GB/s (the faster of torch's sum and dot), random "
        f"512-byte rows {host['row_gather_gbs']:.1f} GB/s, 64-byte lines "
        f"{host['line_gather_gbs']:.1f} GB/s (torch's embedding_bag, float32)",
    )


def device_rows(device: dict[str, Any]) -> list[Row]:
    return [
        measured("GPU memory", f"{device['hbm_gbs']:.0f} GB/s, read and written by a copy"),
        measured(
            "PCIe, pinned",
            f"to the GPU {device['h2d_gbs']:.1f} GB/s, back {device['d2h_gbs']:.1f} GB/s; a copy "
            f"of 8 KiB {device['copy_us']:.1f} us",
        ),
        measured(
            "empty host callback",
            f"{device['callback_us']:.1f} us each, one after another on a stream "
            "(cuLaunchHostFunc)",
        ),
    ]


# ------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class TestCounts:
    """failed, skipped: name and reason of each."""

    passed: int
    failed: list[tuple[str, str]]
    skipped: list[tuple[str, str]]


def run_tests(part: Part, budget_s: float, context: Context) -> None:
    """Each file in a process of its own, all side by side."""
    children, reports = [], {}
    for file in context.scale.test_files:
        name = Path(file).stem
        reports[name] = context.scratch / f"{name}.xml"
        command = [
            *pytest_command(),
            "-q",
            "-m",
            context.scale.test_marker,
            f"--junitxml={reports[name]}",
            "-p",
            "no:cacheprovider",
            f"--rootdir={ROOT}",
            f"--confcutdir={ROOT}",
            "-c",
            str(ROOT / "pyproject.toml"),
            "-o",
            f"addopts={PYTEST_OPTIONS}",
            str(ROOT / file),
        ]
        children.append(Child(name, command, OFFLINE))
    ended = run_children(children, context.logs, budget_s, at_once=len(children))
    for name, xml in reports.items():
        # An interrupted pytest still writes its report.
        counts = read_junit(xml.read_text("utf-8")) if xml.exists() else None
        one = ended[name]
        part.raw[name] = {"state": one.state, "seconds": one.seconds, "counts": counts}
        part.rows += test_rows(f"{name} -m '{context.scale.test_marker}'", counts, one)


def pytest_command() -> list[str]:
    """The console script: `python -m pytest` would put the current folder on sys.path."""
    beside = Path(sys.executable).parent / "pytest"
    found = str(beside) if beside.exists() else shutil.which("pytest")
    if found is None:
        raise RuntimeError("there is no pytest here; pip install the extra vllm-magicpig[dev].")
    return [found]


def read_junit(text: str) -> TestCounts:
    passed, failed, skipped = 0, [], []
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        outcomes = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
        wrong = outcomes["failure"] if outcomes["failure"] is not None else outcomes["error"]
        if wrong is not None:
            failed.append((name, wrong.get("message", "")))
        elif outcomes["skipped"] is not None:
            skipped.append((name, outcomes["skipped"].get("message", "")))
        else:
            passed += 1
    return TestCounts(passed, failed, skipped)


def test_rows(check: str, counts: TestCounts | None, ended: Ended) -> list[Row]:
    if counts is None:
        if ended.state == DONE:  # pytest said that all is well and told nothing about it
            return [Row(check, FAILED, "pytest wrote no report")]
        return [ended_row(check, ended)]
    figure = (
        f"{counts.passed} passed, {len(counts.failed)} failed, {len(counts.skipped)} skipped in "
        f"{ended.seconds:.0f} s"
    )
    bar = "at least one passes, none fails"
    if counts.failed or (ended.state != NOT_RUN and counts.passed == 0) or ended.state == FAILED:
        rows = [Row(check, FAILED, figure, bar, False, log=ended.log_end)]
    elif ended.state == NOT_RUN:
        rows = [Row(check, NOT_RUN, f"{figure}; {ended.reason}", bar)]
    else:
        rows = [checked(check, True, figure, bar)]
    for name, reason in counts.failed[:MAX_NAMES]:
        rows.append(Row(f"test {name}", FAILED, _first_line(reason)))
    if counts.skipped:
        shown = counts.skipped[:MAX_NAMES]
        rows.append(
            measured(
                "tests skipped",
                "; ".join(f"{name}: {_first_line(reason)}" for name, reason in shown)
                + f"; and {len(counts.skipped) - len(shown)} more"
                * (len(counts.skipped) > len(shown)),
            )
        )
    return rows


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:300]
