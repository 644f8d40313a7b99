"""The parts of gpu-check that start no engine: tests, hardware, probes."""

from __future__ import annotations

import ctypes
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check_parts as parts
import pytest
from gpu_check_children import DONE, Ended
from gpu_check_hardware import gather_gbs, host_callback, host_memory
from gpu_check_helpers import context
from gpu_check_jobs import ROOT, ProbesJob
from gpu_check_probe_rows import run_probes
from gpu_check_report import FAILED, MEASURED, NOT_RUN, PASSED, Part, Row
from gpu_check_scale import GPU, REHEARSAL

from vllm_magicpig.triton_kernels.host_pages import gather_pages_reference, store_pages_reference

# -------------------------------------------------------------------------------------------- tests


JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" tests="4">
<testcase classname="tests.test_a" name="test_one" />
<testcase classname="tests.test_a" name="test_two"><failure message="assert 1 == 2&#10;more">x</failure>
</testcase>
<testcase classname="tests.test_a" name="test_three"><error message="fixture broke">x</error></testcase>
<testcase classname="tests.test_b" name="test_four"><skipped message="needs two GPUs">x</skipped>
</testcase>
</testsuite></testsuites>"""


def ended(state: str, reason: str = "") -> Ended:
    return Ended("tests", state, reason, 12.0, "end of the log")


def test_failed_tests_are_named() -> None:
    counts = parts.read_junit(JUNIT)
    assert counts.passed == 1
    first, *others = parts.test_rows("pytest -m gpu", counts, ended(FAILED, "exit code 1"))
    assert first.result == FAILED
    assert first.figure == "1 passed, 2 failed, 1 skipped in 12 s"
    assert [(row.check, row.figure) for row in others] == [
        ("test tests.test_a::test_two", "assert 1 == 2"),
        ("test tests.test_a::test_three", "fixture broke"),
        ("tests skipped", "tests.test_b::test_four: needs two GPUs"),
    ]


@pytest.mark.parametrize(
    ("passed", "state", "result"),
    [
        (3, DONE, PASSED),
        (3, NOT_RUN, NOT_RUN),
        (0, NOT_RUN, NOT_RUN),
        (3, FAILED, FAILED),
        (0, DONE, FAILED),
        (0, FAILED, FAILED),
    ],
)
def test_tests_pass_when_some_ran_and_none_failed(passed: int, state: str, result: str) -> None:
    counts = parts.TestCounts(passed, [], [])
    row, *_ = parts.test_rows("pytest -m gpu", counts, ended(state, "why"))
    assert row.result == result


@pytest.mark.parametrize(
    ("state", "result"), [(DONE, FAILED), (FAILED, FAILED), (NOT_RUN, NOT_RUN)]
)
def test_tests_without_a_report_prove_nothing(state: str, result: str) -> None:
    (row,) = parts.test_rows("pytest -m gpu", None, ended(state, "why"))
    assert row.result == result


def test_tests_run_where_the_plugin_for_time_limits_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyproject.toml sets its option, and says --strict-config."""
    command = parts.pytest_command()
    monkeypatch.setattr(parts, "pytest_command", lambda: [*command, "-p", "no:timeout"])
    scale = replace(REHEARSAL, test_files=("tests/test_stats.py",))
    part = Part("tests", "Tests", 60.0)
    parts.run_tests(part, 60.0, context(tmp_path, scale))
    assert [row.result for row in part.rows] == [PASSED], part.rows


def test_the_gpu_tests_are_those_of_the_files_that_are_named() -> None:
    """Collecting all of tests/ would cost more time than running them."""
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").glob("test_*.py")
        if "mark.gpu" in path.read_text()
    } - {Path(__file__).relative_to(ROOT).as_posix()}
    assert marked == set(GPU.test_files)


# ----------------------------------------------------------------------------------------- hardware


def test_every_byte_that_is_counted_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather that takes a second has as many GB/s as it has GB."""
    import gpu_check_hardware as hardware

    memory = host_memory(4 << 20)
    assert memory.sum() == memory.numel() == 1 << 20
    monkeypatch.setattr(hardware, "seconds", lambda work: float(work().sum()) / (128 * 64 * 32))
    # Rows of ones, 128 floats each, 64 in each of 32 bags: the sum counts the floats.
    assert gather_gbs(memory, 512, 512 * 64 * 32) == pytest.approx(512 * 64 * 32 / 1e9)


SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class Driver:
    """Stands in for the extension: a cuLaunchHostFunc that calls at once, as the driver would later."""

    def __init__(self, status: int = 0) -> None:
        self.called: list[tuple[int, int | None]] = []

        def launch(stream: int, function: int, data: int | None) -> int:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)
            self.called.append((stream, data))
            return status

        self._launch = SIGNATURE(launch)

    def find_launch_host_func(self) -> int | None:
        return ctypes.cast(self._launch, ctypes.c_void_p).value


def test_the_empty_callback_is_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check_hardware as hardware

    driver = Driver()
    monkeypatch.setattr(hardware, "_C", driver)
    found, callback = host_callback()
    assert found(5, callback, None) == 0
    assert driver.called == [(5, None)]


def test_host_functions_of_the_probes_sleep_as_long_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gpu_check_probes as probes

    driver, stream = Driver(), SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(probes, "_C", driver)
    functions = probes.HostFunctions()
    functions.nothing(stream)  # type: ignore[arg-type]
    started = time.perf_counter()
    functions.sleep(stream, 20.0)  # type: ignore[arg-type]
    assert time.perf_counter() - started >= 0.02
    assert driver.called == [(7, None), (7, 20_000)]
    monkeypatch.setattr(probes, "_C", Driver(status=1))
    with pytest.raises(RuntimeError, match="cuLaunchHostFunc answers 1"):
        probes.HostFunctions().nothing(stream)  # type: ignore[arg-type]


class ReferenceKernels:
    store_pages = staticmethod(store_pages_reference)
    gather_pages = staticmethod(gather_pages_reference)


class LosingKernels(ReferenceKernels):
    @staticmethod
    def store_pages(*_: Any) -> None:
        pass


@pytest.mark.parametrize("kernels", [ReferenceKernels, LosingKernels])
def test_the_triton_probe_compares_what_comes_back(
    kernels: type[ReferenceKernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the kernels' references, so that its arguments are those that the kernels take."""
    import gpu_check_probes as probes

    device = probes._Unpinned()
    device.kernels = kernels  # type: ignore[attr-defined]
    monkeypatch.setattr(probes, "DEVICE", "cpu")
    monkeypatch.setattr(probes, "TOKENS", 512)
    monkeypatch.setattr(probes, "cuda_device", lambda: device)
    monkeypatch.setattr(probes, "device_us", lambda work: work() or 1e3)
    monkeypatch.setattr(probes.torch.cuda, "synchronize", lambda: None)
    job = ProbesJob([], latency_rounds=1, callback_ms=1.0)
    if kernels is LosingKernels:
        with pytest.raises(RuntimeError, match="come back different"):
            probes.triton_on_registered_memory(job)
        return
    figures = probes.triton_on_registered_memory(job)
    assert figures["stored, GB/s"] == pytest.approx(2 * 512 * 8 * 128 * 2 / 1e6)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n",
            "570.86.10",
        ),
        ("nothing of the kind\n", "unknown"),
    ],
)
def test_the_driver_names_its_version(
    text: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_check_hardware as hardware

    monkeypatch.setattr(hardware.Path, "read_text", lambda self: text)
    assert hardware.driver_version() == version


# ------------------------------------------------------------------------------------------- probes


def probes_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, *said: Any) -> list[Row]:
    """Rows of a run on a GPU that answered so much."""
    import gpu_check_probe_rows as rows

    answered = parts.Answered(Ended("probes", state, "cut after 9 s", 9.0, ""), list(said))

    def ask(part: Part, *_: Any) -> dict[str, parts.Answered]:
        part.raw["probes"] = {}
        return {"probes": answered}

    monkeypatch.setattr(rows, "ask", ask)
    part = Part("probes", "Probes", 50.0)
    run_probes(part, 40.0, context(tmp_path, GPU))
    return part.rows


def test_each_probe_answers_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = probes_of(
        tmp_path,
        monkeypatch,
        NOT_RUN,
        {"probe": {"name": "registration", "figures": {"registered, GB/s": 7.25}}},
        {"probe": {"name": "latency", "error": "RuntimeError: cuLaunchHostFunc answers 1"}},
    )
    assert (first.result, first.figure) == (MEASURED, "registered, GB/s 7.25")
    assert (second.result, second.figure) == (FAILED, "RuntimeError: cuLaunchHostFunc answers 1")
    assert {row.result for row in others} == {NOT_RUN}
    assert len(others) == 4


def test_host_memory_is_probed_without_a_gpu() -> None:
    from gpu_check_probes import registration

    figures = registration(ProbesJob([4 << 20], latency_rounds=1, callback_ms=1.0))
    assert figures["0.00390625 GiB touched, GB/s"] > 0
    assert figures["0.00390625 GiB: MemAvailable before, GiB"] > 0


def test_a_probe_that_raises_leaves_the_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check_probes as probes

    def broken(job: ProbesJob) -> dict[str, float]:
        raise RuntimeError("refused")

    events: list[Any] = []
    kinds = [
        probes.Probe("a", "A", False, broken),
        probes.Probe("b", "B", False, lambda job: {"x": 1.0}),
    ]
    monkeypatch.setattr(probes, "PROBES", kinds)
    monkeypatch.setattr(
        probes, "started_child", lambda: (None, lambda **event: events.append(event["probe"]))
    )
    probes.main()
    assert events == [
        {"name": "a", "error": "RuntimeError: refused"},
        {"name": "b", "figures": {"x": 1.0}},
    ]
