"""scripts/gpu_check.py without a GPU: report, time, failing and killed processes, a rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check
import gpu_check_children as children
import gpu_check_parts as parts
import gpu_check_report as reports
import pytest
import torch
from compare_figures import EngineFacts
from gpu_check import ENDING_S, PartKind, Stage
from gpu_check_children import DONE, Child, error_of, run_children
from gpu_check_jobs import ROOT, Reporter, Task
from gpu_check_logs import LogArchive
from gpu_check_report import FAILED, MEASURED, NOT_RUN, PASSED, Part, Report, Row, checked, measured
from gpu_check_scale import GPU, REHEARSAL

SCRIPT = ROOT / "scripts" / "gpu_check.py"


# ------------------------------------------------------------------------------------------- report


def report_of(*rows: Row, state: str = "over", is_rehearsal: bool = False) -> Report:
    part = Part("parity", "Exact mode", 60.0, state, 12.0, list(rows))
    return Report(["gpu_check.py"], is_rehearsal, "now", parts=[part])


MISSED = measured("speed", "50 ms", "<= 45 ms", False)


@pytest.mark.parametrize(
    ("rows", "verdict", "exit_code"),
    [
        ([checked("tokens", True, "all", "all")], "PASSED", 0),
        ([checked("tokens", True, "all", "all"), MISSED], "PASSED", 0),
        ([checked("tokens", False, "none", "all"), MISSED], "FAILED: tokens", 1),
        ([Row("engine", FAILED, "exit code 1")], "FAILED: engine", 1),
        ([Row("tokens", NOT_RUN)], "INCOMPLETE, nothing failed; not run: tokens", 3),
        (
            [Row("speed", NOT_RUN), checked("tokens", False, "none", "all")],
            "FAILED: tokens. not run: speed",
            1,
        ),
        ([measured("speed", "44 ms")], "NOTHING PROVED: no check of correctness ran", 0),
    ],
)
def test_a_wrong_answer_fails_and_a_missed_bar_does_not(
    rows: list[Row], verdict: str, exit_code: int
) -> None:
    report = report_of(*rows)
    assert report.verdict == verdict
    assert report.exit_code == exit_code


def test_an_unfinished_report_is_no_success() -> None:
    for state in ("not run", "running"):
        report = report_of(checked("tokens", True, "all", "all"), state=state)
        assert report.verdict == "INCOMPLETE, nothing failed; not run: Exact mode"
        assert report.exit_code == 3


def test_the_markdown_says_what_was_found() -> None:
    failed = Row("tokens", FAILED, "a | b\nc", log="first line\nlast line")
    text = report_of(failed, MISSED, checked("recall", True, "30 of 30", ">= 98 %")).markdown()
    assert "REHEARSAL" not in text
    assert "**FAILED: tokens**" in text
    assert "| tokens | FAILED | a \\| b c | - | - |" in text
    assert "| speed | measured | 50 ms | <= 45 ms | NO |" in text
    assert "| recall | passed | 30 of 30 | >= 98 % | yes |" in text
    assert "- speed: 50 ms (bar: <= 45 ms)" in text
    assert "    first line\n    last line" in text


def test_a_rehearsal_is_called_one() -> None:
    assert "proves nothing about a GPU" in report_of(is_rehearsal=True).markdown()


def test_files_are_complete_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_FILE_BYTES", 2000)
    report = report_of(*(measured(f"row {i}", "x" * 20) for i in range(5)))
    report.parts[0].raw["events"] = ["y" * 50] * 100
    report.cost_model = {"runs": []}
    report.write(tmp_path)
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["verdict"].startswith("NOTHING PROVED")
    assert [row["check"] for row in content["parts"][0]["rows"]] == [f"row {i}" for i in range(5)]
    assert list(content["parts"][0]["raw"]) == ["left_out"]
    assert json.loads((tmp_path / "cost_model.json").read_text()) == {"runs": []}
    report.parts[0].notes.append("z" * 3000)
    report.write(tmp_path)
    text = (tmp_path / "gpu_check.md").read_bytes()
    assert len(text) <= 2000
    assert b"cut here" in text
    assert not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------------------------- time


def test_each_stage_fits_the_command_that_runs_it() -> None:
    """270 s and 8 minutes, of which 45 s unpack vLLM and install the wheel."""
    assert gpu_check.STAGES["first"].seconds <= 270 - 45
    assert gpu_check.STAGES["second"].seconds <= 8 * 60 - 45
    for stage in gpu_check.STAGES.values():
        for scale in (GPU, REHEARSAL):
            limits = [scale.limits[kind.name] for kind in stage.kinds]
            assert sum(limits) <= stage.seconds
            assert min(limits) > 2 * ENDING_S
    assert ENDING_S >= children.GRACE_S


def test_a_stage_has_parts_in_the_order_of_their_value() -> None:
    first, second = (
        [kind.name for kind in gpu_check.chosen(gpu_check.parse(["--stage", stage]))]
        for stage in ("first", "second")
    )
    assert first == ["hardware", "probes", "tests", "parity"]
    assert second == ["hardware", "compiled", "recall", "speed", "dense speed"]


# ----------------------------------------------------------------------------------------- children


def python(name: str, code: str) -> Child:
    return Child(name, [sys.executable, "-c", code], {"GPU_CHECK_TEST": "set"})


def test_children_end_in_three_ways(tmp_path: Path) -> None:
    ended = run_children(
        [
            python("good", "import os; assert os.environ['GPU_CHECK_TEST'] == 'set'"),
            python("bad", "print('starting'); raise ValueError('the pool is too small')"),
            python("slow", "import time; print('asleep', flush=True); time.sleep(600)"),
            python("late", "print('never')"),
        ],
        tmp_path,
        budget_s=8,
        at_once=3,
    )
    assert {name: one.state for name, one in ended.items()} == {
        "good": DONE,
        "bad": FAILED,
        "slow": NOT_RUN,
        "late": DONE,
    }
    assert ended["bad"].reason == "exit code 1: ValueError: the pool is too small"
    assert ended["bad"].log_end.startswith("starting\n")
    assert ended["slow"].seconds < 8 + children.GRACE_S
    assert "asleep" in ended["slow"].log_end


def test_a_child_that_cannot_start_in_time_is_cut(tmp_path: Path) -> None:
    endless = "import time\nwhile True: time.sleep(1)"
    ended = run_children([python("a", endless), python("b", endless)], tmp_path, budget_s=1)
    assert [ended[name].state for name in "ab"] == [NOT_RUN, NOT_RUN]
    assert "no time left" in ended["b"].reason
    assert not (tmp_path / "b.log").exists()


def test_an_interrupted_child_may_finish_its_report(tmp_path: Path) -> None:
    report = tmp_path / "report"
    code = (
        "import pathlib, time\n"
        "try:\n    time.sleep(600)\n"
        f"finally:\n    pathlib.Path({str(report)!r}).write_text('told')\n"
    )
    assert run_children([python("a", code)], tmp_path, budget_s=4)["a"].state == NOT_RUN
    assert report.read_text() == "told"


def test_nothing_survives_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what ignores the interrupt nor what the child has started."""
    monkeypatch.setattr(children, "GRACE_S", 0.5)
    pid = tmp_path / "pid"
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(other.pid))\n"
        "time.sleep(600)\n"
    )
    assert run_children([python("a", code)], tmp_path, budget_s=5)["a"].state == NOT_RUN
    deadline = time.monotonic() + 10
    while is_running(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid.read_text()))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "(EngineCore pid=7) ERROR RuntimeError: no memory\nTraceback\nValueError: second\n",
            "RuntimeError: no memory",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
            "  Value error, host_kv_cache_gib is -1. [type=value_error, input=1]\n",
            "host_kv_cache_gib is -1.",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory.\n", "OutOfMemoryError: CUDA out of memory."),
        ("something\nSegmentation fault\n\n", "Segmentation fault"),
        ("", "it printed nothing"),
    ],
)
def test_the_reason_of_a_failure_is_its_first_exception(log: str, reason: str) -> None:
    assert error_of(log) == reason


def test_events_of_a_killed_child_are_kept(tmp_path: Path) -> None:
    task = Task(python("a", ""), tmp_path / "a.jsonl")
    assert task.events() == []
    report = Reporter(task.results, "a")
    Reporter(task.results, "b")(engine="of another child")
    report(engine=EngineFacts(1, 2, 3, 4, 5.0, 6, 7.0))
    report(case={"length": 8})
    with task.results.open("a") as file:
        file.write('{"case": {"len')
    engine, case = task.events()
    assert EngineFacts(**engine["engine"]).kv_bytes == 6
    assert case == {"case": {"length": 8}}


# -------------------------------------------------------------------------------- parts and options


def run_check(tmp_path: Path, *kinds: PartKind) -> Report:
    scale = replace(REHEARSAL, limits={kind.name: 30.0 for kind in kinds})
    return gpu_check.check(scale, kinds, time.monotonic() + 60, tmp_path / "out")


def test_a_part_that_breaks_is_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    (logs / "earlier.log").write_text("of another run")
    seen: list[str] = []

    def breaks(part: Part, budget_s: float, context: Any) -> None:
        part.rows.append(measured("before", "1"))
        raise KeyError("gone")

    def works(part: Part, budget_s: float, context: Any) -> None:
        # What the part before it found is on disk by now.
        seen.append((tmp_path / "out" / "gpu_check.md").read_text())
        part.rows.append(checked("after", True, "1", "1"))

    report = run_check(tmp_path, PartKind("a", "A", breaks), PartKind("b", "B", works))
    assert [row.check for row in report.rows] == ["before", "a", "after"]
    assert report.rows[1].figure == "KeyError: 'gone'"
    assert "breaks" in report.rows[1].log
    assert report.exit_code == 1
    assert "before" in seen[0]
    assert "INCOMPLETE" not in report.markdown()
    assert "not run: B" in seen[0]
    assert not (logs / "earlier.log").exists()


def test_an_interrupted_check_leaves_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(part: Part, budget_s: float, context: Any) -> None:
        part.rows.append(measured("before", "1"))
        os.kill(os.getpid(), 15)
        time.sleep(60)

    stage = Stage(60, (PartKind("hardware", "A", interrupted),))
    monkeypatch.setattr(gpu_check, "STAGES", {"first": stage})
    monkeypatch.setattr(gpu_check, "what_is_missing", lambda rehearse: None)
    assert gpu_check.main(["--stage", "first", "--rehearse", "--output", str(tmp_path)]) == 130
    assert "what was found so far" in capsys.readouterr().err
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["verdict"] == "INCOMPLETE, nothing failed; not run: A"


def test_a_part_for_which_no_time_is_left_is_not_run(tmp_path: Path) -> None:
    def fails(part: Part, budget_s: float, context: Any) -> None:
        raise AssertionError("it was run")

    scale = replace(REHEARSAL, limits={"a": 30.0})
    report = gpu_check.check(
        scale, [PartKind("a", "A", fails)], time.monotonic() + ENDING_S / 2, tmp_path
    )
    assert [(row.check, row.result) for row in report.rows] == [("a", NOT_RUN)]
    assert report.exit_code == 3


def test_a_part_over_its_limit_is_not_run_and_keeps_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ENDING_S", 1.0)
    monkeypatch.setattr(children, "GRACE_S", 1.0)

    def slow(part: Part, budget_s: float, context: parts.Context) -> None:
        code = (
            "import json, sys, time\n"
            f"open({str(context.results)!r}, 'a').write("
            "json.dumps({'child': 'engine', 'engine': 5}) + '\\n')\n"
            "print('loaded', flush=True)\n"
            "time.sleep(600)\n"
        )
        task = Task(python("engine", code), context.results)
        answered = parts.ask(part, context, [task], budget_s)["engine"]
        part.rows += [measured("found", str(answered.first("engine")))]
        part.rows.append(parts.ended_row("engine", answered.ended))

    scale = replace(REHEARSAL, limits={"a": 7.0})
    started = time.monotonic()
    report = gpu_check.check(scale, [PartKind("a", "A", slow)], started + 60, tmp_path)
    assert [row.result for row in report.rows] == [MEASURED, NOT_RUN]
    assert report.rows[0].figure == "5"
    assert report.rows[1].figure.startswith("cut after")
    with tarfile.open(tmp_path / "logs.tgz") as archive:
        (log,) = archive.getmembers()
        assert log.name == "logs/engine.log"
    assert len(list(tmp_path.iterdir())) <= 8


KILLED = """
import sys, time
sys.path.insert(0, {scripts!r})
import gpu_check
from dataclasses import replace
from pathlib import Path
from gpu_check import PartKind
from gpu_check_children import Child, run_children
from gpu_check_report import measured
from gpu_check_scale import REHEARSAL

def found(part, budget_s, context):
    part.rows.append(measured("found", "1"))

def endless(part, budget_s, context):
    code = (
        "import os, pathlib, subprocess, sys, time;"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()) + ' ' + str(other.pid));"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, {pids!r}]
    run_children([Child("engine", command, {{}})], context.logs, budget_s)

kinds = [PartKind("a", "First", found), PartKind("b", "Second", endless), PartKind("c", "Third", found)]
scale = replace(REHEARSAL, limits=dict.fromkeys("abc", 300.0))
gpu_check.check(scale, kinds, time.monotonic() + 600, Path({output!r}))
"""


def test_a_killed_check_leaves_a_report_and_no_processes(tmp_path: Path) -> None:
    pids, output = tmp_path / "pids", tmp_path / "out"
    code = KILLED.format(scripts=str(SCRIPT.parent), pids=str(pids), output=str(output))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as run:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 120)
        run.kill()
    orphans = [int(pid) for pid in pids.read_text().split()]
    wait_until(lambda: not any(map(is_running, orphans)), 30)
    content = json.loads((output / "gpu_check.json").read_text())
    assert content["verdict"] == "INCOMPLETE, nothing failed; not run: Second; Third"
    text = (output / "gpu_check.md").read_text()
    assert "| found | measured | 1 |" in text
    assert "Running, or killed with this check" in text
    assert "Not run." in text


def wait_until(is_so: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_logs_travel_in_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_check_logs.MAX_LOG_BYTES", 10)
    logs = LogArchive(tmp_path)
    for name, text in (("a.log", "short"), ("b.log", "the beginning and the end")):
        (logs.folder / name).write_text(text)
        logs.put_away()
    with tarfile.open(tmp_path / "logs.tgz") as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive}
    assert contents == {"logs/a.log": b"short", "logs/b.log": b"(only the end is kept)\nnd the end"}
    assert not list(logs.folder.iterdir())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: --stage"),
        (["--stage", "first", "--only", "speed"], "'speed' is not a part of stage first; choose"),
        (["--stage", "first", "--seconds", "0"], "'0' is not a positive number of seconds."),
        (["--stage", "first", "--seconds", "soon"], "'soon' is not a positive number of seconds."),
        (
            ["--stage", "second", "--only", "speed", "--skip", "speed"],
            "leave no part to run",
        ),
        (["--stage", "first", "--output", __file__], "is a file; name a folder."),
    ],
)
def test_bad_arguments_get_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.parse(argv)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("has_gpu", "argv", "sentence"),
    [
        (False, [], "finds none here; run it on a machine with one"),
        (True, ["--rehearse"], "is for machines without a GPU, and this one has one"),
    ],
)
def test_a_machine_that_does_not_fit_gets_one_sentence(
    has_gpu: bool,
    argv: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if has_gpu else None)
    assert gpu_check.main(["--stage", "first", *argv, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_script_puts_the_repository_root_on_the_path() -> None:
    """vLLM would take the folder triton_kernels/ for OpenAI's package of that name."""
    code = (
        "import json, sys\n"
        f"sys.path[0] = {str(SCRIPT.parent)!r}\n"
        "import gpu_check, gpu_check_engine, gpu_check_probes, gpu_check_speed, gpu_check_compiled\n"
        "print(json.dumps(sys.path))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    path = json.loads(run.stdout.splitlines()[-1])
    assert str(ROOT / "examples") in path
    assert str(ROOT) not in path
    assert "" not in path


# ---------------------------------------------------------------------------------------- rehearsal


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal needs vLLM's CPU platform")
def test_a_rehearsal_passes(tmp_path: Path) -> None:
    """From a folder of its own, by the parts that start the fewest engines."""
    command = [sys.executable, str(SCRIPT), "--stage", "second", "--rehearse", "--output", "out"]
    for name in ("hardware", "compiled"):
        command += ["--only", name]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert content["is_rehearsal"]
    assert content["verdict"] == "PASSED"
    assert content["facts"]["host"]["row_gather_gbs"] > 0
    by_part = {part["name"]: part["rows"] for part in content["parts"]}
    results = [row["result"] for row in by_part["compiled"]]
    assert results.count(PASSED) == len(REHEARSAL.compiled.lengths)
    assert "proves nothing about a GPU" in (tmp_path / "out" / "gpu_check.md").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8
