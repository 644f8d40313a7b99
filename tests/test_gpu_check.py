"""scripts/gpu_check.py without a GPU: report, time, failing processes, comparisons, bars, rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_check
import gpu_check_children as children
import gpu_check_parts as parts
import gpu_check_report as reports
import gpu_check_speed as speed
import pytest
import torch
from compare_figures import EngineFacts, Request, Run, Step
from compare_setup import SHAPES
from cost_model import read_report
from gpu_check import ENDING_S, PartKind, Stage
from gpu_check_children import DONE, Child, Ended, error_of, run_children
from gpu_check_figures import HostStep, Measured, Side
from gpu_check_hardware import gather_gbs, host_callback, host_memory
from gpu_check_jobs import ROOT, ProbesJob, Reporter, Task, read_job
from gpu_check_logs import LogArchive
from gpu_check_model import fit_report, model_rows
from gpu_check_parity import (
    Answer,
    agreement_row,
    bfloat16_row,
    log_prob_errors,
    parity_rows,
    parity_tasks,
)
from gpu_check_probe_rows import run_probes
from gpu_check_recall import recall_row
from gpu_check_report import FAILED, MEASURED, NOT_RUN, PASSED, Part, Report, Row, checked, measured
from gpu_check_scale import GIB, GPU, REHEARSAL
from gpu_check_speed_rows import (
    capacity_at,
    else_row,
    row_bytes,
    single_rows,
    throughput_rows,
    ttft_rows,
)

from vllm_magicpig import capacity
from vllm_magicpig.config import MagicPigOptions, parse_options

LLAMA = SHAPES["llama-3.1-8b"]
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
        limits = [GPU.limits[kind.name] for kind in stage.kinds]
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


# --------------------------------------------------------------------------------- parts and options


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


def test_the_gpu_tests_are_those_of_the_files_that_are_named() -> None:
    """Collecting all of tests/ would cost more time than running them."""
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").glob("test_*.py")
        if "mark.gpu" in path.read_text()
    } - {Path(__file__).relative_to(ROOT).as_posix()}
    assert marked == set(GPU.test_files)


# ------------------------------------------------------------------------------------------- parity


def answer(tokens: list[int], gap: float = 1.0, best: float = -1.0) -> Answer:
    """The runner-up of each step is the token's successor, `gap` below it."""
    return Answer(tokens, [{token: best, token + 1: best - gap} for token in tokens])


def test_how_far_two_roundings_agree_is_told() -> None:
    dense = [answer([1, 2, 3]), answer([4, 5, 6])]
    ours = [answer([1, 2, 3]), answer([4, 9, 6])]
    row = agreement_row("llama", "FLASH_ATTN", ours, dense)
    assert row.result == MEASURED
    assert row.figure == "4 of 6 tokens equal to FLASH_ATTN's; request 1 parts at token 1"


def test_answers_have_to_vary() -> None:
    same = [answer([1, 2])] * 2
    row = agreement_row("llama", "FLASH_ATTN", same, same)
    assert row.result == FAILED
    assert "do not vary" in row.figure


def answered(
    name: str, tokens: list[list[int]], backend: str, state: str = DONE, best: float = -1.0
) -> parts.Answered:
    events: list[dict[str, Any]] = [{"backends": {"0": backend}}]
    for one in tokens:
        logprobs = [list(step.items()) for step in answer(one, best=best).logprobs]
        events.append({"answer": {"tokens": one, "logprobs": logprobs}})
    return parts.Answered(Ended(name, state, "cut after 9 s", 9.0, ""), events)


def parity_of(**changed: parts.Answered) -> list[Row]:
    texts = [[1, 2, 3], [4, 5, 6]]
    runs = {
        "bfloat16-ours": answered("bfloat16-ours", texts, "MAGICPIG", best=-1.1),
        "bfloat16-dense": answered("bfloat16-dense", texts, "FLASH_ATTN", best=-1.1),
        "float32-dense": answered("float32-dense", texts, "TRITON_ATTN"),
    }
    return parity_rows("llama", runs | {one.ended.name: one for one in changed.values()})


def test_parity_needs_no_more_than_what_was_reached() -> None:
    tokens, logprobs = parity_of()
    assert (tokens.result, logprobs.result) == (MEASURED, PASSED)
    cut = answered("float32-dense", [[1, 2, 3]], "TRITON_ATTN", NOT_RUN)
    assert [row.result for row in parity_of(cut=cut)] == [NOT_RUN, MEASURED]
    broken = answered("bfloat16-ours", [], "MAGICPIG", FAILED)
    assert [row.result for row in parity_of(broken=broken)] == [FAILED]


def test_parity_of_an_engine_without_magicpig_fails() -> None:
    dense = answered("bfloat16-ours", [[1, 2, 3], [4, 5, 6]], "FLASH_ATTN", best=-1.1)
    row = parity_of(dense=dense)[0]
    assert (row.result, row.figure) == (FAILED, "every layer runs FLASH_ATTN")


def test_errors_end_where_texts_part() -> None:
    exact = answer([1, 2, 3, 4])
    ours = answer([1, 2, 3, 4], best=-1.25)
    assert log_prob_errors([ours], [exact]) == [0.25] * 4
    # The token that is no longer said is still among the likeliest of that step, as the second.
    parted = Answer([1, 9, 3, 4], [{1: -1.0}, {9: -0.5, 2: -1.5}, {3: -9.0}, {4: -9.0}])
    assert log_prob_errors([parted], [exact]) == [0.0, 0.5]


@pytest.mark.parametrize(("error", "result"), [(0.19, PASSED), (0.21, FAILED)])
def test_bfloat16_may_err_twice_as_much_as_the_dense_backend(error: float, result: str) -> None:
    exact, dense = answer([1, 2], best=-1.0), answer([1, 2], best=-1.1)
    row = bfloat16_row("llama", "FLASH_ATTN", [answer([1, 2], best=-1 - error)], [dense], [exact])
    assert row.result == result
    assert row.bar == "<= 0.2000, twice FLASH_ATTN's largest"


def test_bfloat16_without_anything_to_compare_is_no_success() -> None:
    exact = answer([1, 2])
    foreign = Answer([7, 8], [{7: -1.0}, {8: -1.0}])
    assert bfloat16_row("llama", "FLASH_ATTN", [foreign], [foreign], [exact]).result == FAILED
    assert bfloat16_row("llama", "FLASH_ATTN", [exact], [exact], [exact]).result == FAILED


def context(tmp_path: Path, scale: Any, facts: dict[str, Any] | None = None) -> parts.Context:
    report = Report([], scale.is_rehearsal, "now", facts=facts or {})
    return parts.Context(scale, report, tmp_path, tmp_path / "logs", tmp_path / "results.jsonl")


def test_engines_side_by_side_take_a_stated_share_of_everything(tmp_path: Path) -> None:
    """By default each would ask for most of the GPU, and pin most of the free RAM."""
    tasks = parity_tasks(context(tmp_path, GPU))
    assert list(tasks) == ["bfloat16-ours", "bfloat16-dense", "float32-dense"]
    for name in tasks:
        job = read_job(tmp_path / f"{name}.json")
        assert job.arguments["kv_cache_memory_bytes"] == GPU.parity.kv_cache_bytes
        assert job.arguments["gpu_memory_utilization"] * len(tasks) < 0.7
        if name.endswith("-ours"):
            assert job.backend == "magicpig"
            assert job.options["K"] == 0
            assert job.options["dense_layers"] == [0]
            assert job.options["host_kv_cache_gib"] <= 2
            parse_options({"magicpig": job.options})
        else:
            assert job.options is None
            assert job.backend == (None if "float32" in name else "FLASH_ATTN")
        assert tasks[name].child.environment["TRITON_F32_DEFAULT"] == "ieee"


# ------------------------------------------------------------------------------------------- recall


def recalled(words: int, sampled: int | None = None) -> dict[str, Any]:
    """10 questions of 5 words; 100,000 rows in the middle."""
    each = [5] * (words // 5) + [words % 5] * bool(words % 5)
    stats = [{"middle_rows": 7, "sampled_rows": 3}]
    if sampled is not None:
        stats.append({"middle_rows": 100_007, "sampled_rows": 3 + sampled})
    each += [0] * (10 - len(each))
    return {
        "length": 16384,
        "words_right": each,
        "words_each": 5,
        "before": stats[0],
        "after": stats[-1],
    }


@pytest.mark.parametrize(
    ("ours", "dense", "sampled", "result"),
    [
        (50, 50, 2000, PASSED),
        (49, 50, 2000, PASSED),
        (48, 50, 2000, FAILED),  # less than 98 % of what dense attention knows
        (47, 47, 2000, FAILED),  # the model itself does not know
        (50, 50, 0, FAILED),  # nothing was sampled
        (50, 50, 5001, FAILED),  # nearly everything was
    ],
)
def test_recall_needs_right_words_from_few_rows(
    ours: int, dense: int, sampled: int, result: str
) -> None:
    row = recall_row(recalled(ours, sampled), recalled(dense), "FLASH_ATTN", 0.05)
    assert row.result == result
    assert f"({ours} of 50 words)" in row.figure
    assert f"{sampled / 1000:.2f} %" in row.figure


# -------------------------------------------------------------------------------------------- speed


def stats(steps: int, **others: float) -> dict[str, Any]:
    """A worker's, of 30 sampled layers and 15 threads."""
    zero = dict.fromkeys(("hash", "lookup", "attend", "decode"), 0.0)
    given = {"threads": 15, "sampled_layers": 30, "decode_steps": steps}
    given |= {f"{name}_us_per_step": others.get(name, 0.0) for name in zero}
    return given | {name: others.get(name, 0) for name in ("sampled_rows", "middle_rows")}


def test_host_times_are_those_of_the_steps_between() -> None:
    before = stats(10, lookup=100.0, attend=1000.0, decode=900.0, sampled_rows=5, middle_rows=100)
    after = stats(20, lookup=200.0, attend=2500.0, decode=600.0, sampled_rows=25, middle_rows=1100)
    host = HostStep.between(before, after)
    assert host == HostStep(
        layers=30,
        threads=15,
        steps=10,
        hash_us=0.0,
        lookup_us=pytest.approx(300.0 / 15),
        attend_us=pytest.approx(4000.0 / 15),
        callback_us=pytest.approx(300.0),
        sampled_rows=2.0,
        sampled_fraction=0.02,
    )
    with pytest.raises(ValueError, match="no decode step"):
        HostStep.between(before, before)


def host_step(**changes: float) -> HostStep:
    whole = HostStep(30, 15, 31, 0.0, 3000.0, 10_000.0, 15_000.0, 2_000_000.0, 0.02)
    return replace(whole, **changes)


def measured_case(
    length: int, requests: int, tpot_s: float, ttft_s: float, host: HostStep | None
) -> Measured:
    """Every request gets its tokens at the same moments."""
    times = [ttft_s + i * tpot_s for i in range(5)]
    steps = [Step(ttft_s, requests, requests, requests * length, 0, 0, requests)]
    steps += [Step(at, requests, 0, 0, requests, requests, requests) for at in times[1:]]
    run = Run([Request(times, 0)] * requests, steps)
    event = {"length": length, "num_requests": requests, "run": asdict(run), "after": None}
    return replace(Measured.from_event(json.loads(json.dumps(event))), host=host)


def side(*cases: Measured, segment_tokens: int | None = 2048, kv_gib: float = 22.0) -> Side:
    kv_bytes = int(kv_gib * GIB)
    facts = EngineFacts(1, kv_bytes // 131072, kv_bytes // 131072 // 128, 128, 1.0, kv_bytes, 9.0)
    return Side(facts, segment_tokens, {one.case: one for one in cases})


FACTS: dict[str, Any] = {
    "device": "NVIDIA H200",
    "gpu_memory_gib": 139.8,
    "memory_gib": 128.0,
    "host": {
        "threads": 16,
        "sequential_gbs": 250.0,
        "row_gather_gbs": 160.0,
        "line_gather_gbs": 60.0,
    },
    "device_bandwidth": {
        "hbm_gbs": 4096.0,
        "h2d_gbs": 50.0,
        "d2h_gbs": 45.0,
        "copy_us": 2.0,
        "callback_us": 8.0,
    },
}
OPTIONS = MagicPigOptions(K=10, L=170)


def test_a_case_is_read_from_what_the_engine_reported() -> None:
    one = measured_case(32768, 2, tpot_s=0.02, ttft_s=2.0, host=None)
    assert one.tpot_us == pytest.approx(20_000)
    assert one.figures.ttft_median_s == 2.0
    assert one.figures.decode_tokens_per_s == pytest.approx(100)
    assert one.decode_step_us == pytest.approx(20_000)


def test_bytes_read_are_sampled_rows_of_query_heads_and_static_rows_of_kv_heads() -> None:
    expected = (2_000_000 + 30 * 8 * 68) * 512
    assert row_bytes(host_step(), 1, LLAMA, OPTIONS) == expected


@pytest.mark.parametrize(("attend_us", "met"), [(10_000.0, True), (11_000.0, False)])
def test_the_gather_share_is_of_the_measured_bandwidth(attend_us: float, met: bool) -> None:
    """1.03 GB in 10 ms are 103 GB/s, 65 % of 160; in 11 ms 59 %."""
    one = measured_case(98304, 1, 0.03, 9.0, host_step(attend_us=attend_us))
    rows = single_rows(98304, side(one), LLAMA, OPTIONS, FACTS)
    (row,) = (row for row in rows if "rows read" in row.check)
    assert row.met is met
    assert f"{(2_000_000 + 16_320) * 512 / attend_us / 1e3 / 160:.0%} and" in row.figure
    unknown = single_rows(98304, side(one), LLAMA, OPTIONS, {})
    (row,) = (row for row in unknown if "rows read" in row.check)
    assert row.met is None
    assert "the host was not measured" in row.figure


@pytest.mark.parametrize(("tpot_s", "met"), [(0.044, True), (0.046, False)])
def test_time_per_token_has_a_bar(tpot_s: float, met: bool) -> None:
    one = measured_case(98304, 1, tpot_s, 9.0, host_step())
    rows = single_rows(98304, side(one), LLAMA, OPTIONS, FACTS)
    (row,) = (row for row in rows if row.check.endswith("time per output token"))
    assert (row.result, row.met) == (MEASURED, met)
    assert f"{1e3 * tpot_s:.1f} ms mean" in row.figure
    (split,) = (row for row in rows if "split" in row.check)
    assert "lookup 3.00, attention 10.00, rest of the host callbacks 2.00" in split.figure
    assert f"outside of them, hashing included {1e3 * tpot_s - 15:.2f}" in split.figure
    assert "30 empty callbacks 0.24" in split.figure


def test_a_case_that_was_not_reached_is_not_run() -> None:
    (row,) = single_rows(98304, side(), LLAMA, OPTIONS, FACTS)
    assert row.result == NOT_RUN


@pytest.mark.parametrize(("outside_ms", "met"), [(7.5, True), (8.1, False)])
def test_everything_else_is_what_neither_callbacks_nor_gpu_take(
    outside_ms: float, met: bool
) -> None:
    """KV of a token and layer are 4 KiB, at 4,096 GB/s 1 ns. Of the dense step at 32K magicpig reads
    30 layers less from GPU memory, and of 2 layers the 64K tokens by which its context is longer."""
    one = measured_case(98304, 1, 0.015 + outside_ms / 1e3, 9.0, host_step())
    baseline = measured_case(32768, 1, 0.006, 2.0, None)
    row = else_row(one, host_step(), baseline, LLAMA, FACTS)
    gpu_ms = 6 - 30 * 32768 / 1e6 + 2 * 65536 / 1e6
    assert f"{(outside_ms - gpu_ms) * 1e3 / 30:.0f} us a layer" in row.figure
    assert row.met is met
    alone = else_row(one, host_step(), None, LLAMA, FACTS)
    assert f"at most {outside_ms * 1e3 / 30:.0f} us a layer" in alone.figure
    assert alone.met is None


@pytest.mark.parametrize(("ttft_s", "met"), [(2.29, True), (2.31, False)])
def test_the_first_token_has_a_bar(ttft_s: float, met: bool) -> None:
    ours = side(measured_case(32768, 1, 0.02, ttft_s, host_step()))
    dense = side(measured_case(32768, 1, 0.01, 2.0, None))
    (row,) = ttft_rows(ours, dense, GPU.speed, "FLASH_ATTN")
    assert row.met is met
    assert f"ratio {ttft_s / 2:.2f}" in row.figure
    (missing,) = ttft_rows(ours, side(), GPU.speed, "FLASH_ATTN")
    assert missing.result == NOT_RUN


def test_throughput_is_told_as_it_is() -> None:
    ours = side(*(measured_case(32768, n, 0.02, 2.0, host_step()) for n in (1, 2)))
    dense = side(*(measured_case(32768, n, 0.01, 2.0, None) for n in (1, 2, 4)))
    sizes = replace(GPU.speed, dense_cases=tuple((32768, n) for n in (1, 2, 4)))
    one, two, four = throughput_rows(ours, dense, sizes, "FLASH_ATTN")
    assert "magicpig 50.0 tokens/s, FLASH_ATTN 100.0, ratio 0.50" in one.figure
    assert "magicpig 100.0 tokens/s" in two.figure
    assert (two.bar, two.met) == ("", None)
    assert (four.result, four.figure) == (NOT_RUN, "not reached: magicpig")


def test_capacity_changes_with_the_budget_alone() -> None:
    facts = side(kv_gib=22.0).facts
    assert facts is not None
    assert facts.kv_cache_tokens == 22 * 8192
    assert capacity_at(facts, 40, 24) == 6 * 8192
    assert capacity_at(facts, 40, 10) == 0


def test_engines_get_the_budget_and_a_pool_that_holds_every_case(tmp_path: Path) -> None:
    """They need no other part's result: the engine asks the card for its memory."""
    for name in ("speed-magicpig", "speed-dense"):
        speed.speed_task(context(tmp_path, GPU), name)
    ours, dense = (
        read_job(tmp_path / "speed-magicpig.json"),
        read_job(tmp_path / "speed-dense.json"),
    )
    assert (ours.device_gib, dense.device_gib) == (24.0, 40.0)
    assert ours.cases == [[32768, 1], [98304, 1]]
    assert dense.cases == [[32768, 1]]
    assert ours.config["num_hidden_layers"] == 32
    assert ours.arguments["max_num_seqs"] == 4
    assert ours.arguments["max_model_len"] >= 98304 + 16
    options = parse_options(ours.arguments["additional_config"])
    assert not options.check_host_memory
    per_block = speed.host_bytes_per_block(ours.config, options)
    assert options.host_kv_cache_gib is not None
    blocks = int(options.host_kv_cache_gib * GIB) // per_block
    for length, number in ours.cases:
        assert capacity.concurrent_requests(blocks, 128, length + 16) >= number
    assert options.host_kv_cache_gib * GIB < 1.02 * per_block * blocks


def test_an_engine_gets_its_share_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check_engine as engines
    from vllm.platforms import current_platform

    def card(gib: int) -> None:
        monkeypatch.setattr(
            type(current_platform),
            "get_device_total_memory",
            classmethod(lambda cls, device_id=0: gib * GIB),
        )

    card(140)
    assert engines.device_share(24.0) == {"gpu_memory_utilization": pytest.approx(24 / 140)}
    card(16)
    assert engines.device_share(24.0) == {"gpu_memory_utilization": engines.MAX_DEVICE_SHARE}
    assert engines.device_share(None) == {}


# --------------------------------------------------------------------------------------- cost model


def test_the_cost_model_reads_what_was_measured(tmp_path: Path) -> None:
    ours = side(
        measured_case(98304, 1, 0.03, 9.0, host_step()),
        measured_case(32768, 2, 0.02, 2.0, host_step()),
    )
    dense = side(measured_case(32768, 1, 0.006, 2.0, None))
    report = fit_report(FACTS, ours, dense, "llama-3.1-8b", GPU.speed.options)
    assert report is not None
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(report))
    runs = read_report(path)
    assert [run.measured_us["total"] for run in runs] == pytest.approx([6000, 30_000, 20_000])
    assert runs[1].measured_us == pytest.approx(
        {"total": 30_000, "host": 15_000, "lookup": 3000, "rows": 10_000}
    )
    assert set(runs[2].measured_us) == {"total"}
    assert report["gpu"]["pcie_gbs"] == 45.0
    assert report["host"]["threads"] == 15
    # Callbacks as measured: 30 layers of 8 us.
    assert runs[1].predicted.callback == pytest.approx(240)


@pytest.mark.parametrize(
    ("factor", "met"), [(1.19, True), (1.21, False), (0.81, True), (0.79, False)]
)
def test_the_cost_model_has_to_be_within_a_fifth(factor: float, met: bool, tmp_path: Path) -> None:
    """factor: predicted over measured."""

    def report(step_s: float) -> dict[str, Any]:
        dense = side(measured_case(32768, 1, step_s, 2.0, None))
        found = fit_report(FACTS, side(), dense, "llama-3.1-8b", GPU.speed.options)
        assert found is not None
        return found

    path = tmp_path / "one.json"
    path.write_text(json.dumps(report(0.006)))
    predicted_s = read_report(path)[0].predicted.total / 1e6
    (row,) = model_rows(report(predicted_s / factor), tmp_path)
    assert row.met is met
    assert f"{factor - 1:+.0%}" in row.figure


def test_nothing_is_compared_with_the_cost_model_before_it_is_measured() -> None:
    dense = side(measured_case(32768, 1, 0.006, 2.0, None))
    assert fit_report({}, side(), dense, "llama-3.1-8b", {}) is None
    assert fit_report(FACTS, side(), side(), "llama-3.1-8b", {}) is None


# ----------------------------------------------------------------------------------------- hardware


def test_every_byte_that_is_counted_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather that takes a second has as many GB/s as it has GB."""
    import gpu_check_hardware as hardware

    memory = host_memory(4 << 20)
    assert memory.sum() == memory.numel() == 1 << 20
    monkeypatch.setattr(hardware, "seconds", lambda work: float(work().sum()) / (128 * 64 * 32))
    # Rows of ones, 128 floats each, 64 in each of 32 bags: the sum counts the floats.
    assert gather_gbs(memory, 512, 512 * 64 * 32) == pytest.approx(512 * 64 * 32 / 1e9)


def test_the_empty_callback_is_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for cuLaunchHostFunc that calls it at once, as the driver would."""
    import ctypes

    import gpu_check_hardware as hardware

    called = []
    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

    @signature
    def launch(stream: int, function: int, data: int) -> int:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)
        called.append((stream, data))
        return 0

    class Native:
        @staticmethod
        def find_launch_host_func() -> int | None:
            return ctypes.cast(launch, ctypes.c_void_p).value

    monkeypatch.setattr(hardware, "_C", Native)
    found, callback = host_callback()
    assert found(5, callback, None) == 0
    assert called == [(5, None)]


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
