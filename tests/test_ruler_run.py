"""Runs of examples/ruler.py that are ended and go on, their tables, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import recall_model
import ruler
from ruler_backends import PROTOCOLS
from ruler_helpers import TableBackend, bpe_tokenizer
from ruler_prompt import PromptFormat
from ruler_record import Record, RecordFile, settings_digest
from ruler_report import agreements, cells, json_report, plot, text_report
from ruler_run import Case, Labels, run
from ruler_sample import Sample

LABELS = Labels("digest", "table:parrot", PROTOCOLS["dense"])
CASES = [Case("echo", 64, index) for index in range(5)]


@pytest.fixture(scope="module")
def form() -> PromptFormat:
    return PromptFormat(bpe_tokenizer())


def _sample(case: Case) -> Sample:
    return Sample(*case, f"Word {case.index}.", " Which?", (f"{case.index}",), "all", 8)


def _parrot(prompt: str) -> str:
    return "- " + prompt.split()[1]


def _run(form: PromptFormat, path: Path, backend: TableBackend, batch: int = 1) -> RecordFile:
    records = RecordFile(path)
    run(CASES, _sample, form, lambda: backend, records, LABELS, batch)
    return records


def test_a_run_records_every_answer(form: PromptFormat, tmp_path: Path) -> None:
    backend = TableBackend(form, _parrot)
    records = _run(form, tmp_path / "deep" / "records.jsonl", backend, batch=2)
    assert [len(call) for call in backend.asked] == [2, 2, 1]
    assert backend.is_closed
    assert [record.index for record in records.records.values()] == [0, 1, 2, 3, 4]
    record = records.records["echo", 64, 3, "digest"]
    assert (record.first, record.rest) == ("-", " 3.")
    assert record.score(score_from=2) == 1.0
    assert RecordFile(tmp_path / "deep" / "records.jsonl").records == records.records


def test_a_finished_run_asks_nothing(form: PromptFormat, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    _run(form, path, TableBackend(form, _parrot))
    content = path.read_bytes()
    backend = TableBackend(form, _parrot)
    _run(form, path, backend)
    assert backend.asked == []
    assert path.read_bytes() == content


@pytest.mark.parametrize("cut", [0, 1, 40], ids=lambda cut: f"last line {cut} bytes short")
def test_a_killed_run_goes_on(form: PromptFormat, tmp_path: Path, cut: int) -> None:
    whole = _run(form, tmp_path / "whole.jsonl", TableBackend(form, _parrot))
    path = tmp_path / "records.jsonl"
    dying = TableBackend(form, _parrot, dies_at=3)
    with pytest.raises(KeyboardInterrupt):
        _run(form, path, dying)
    assert dying.is_closed
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])  # as if it had died while it wrote
    backend = TableBackend(form, _parrot)
    records = _run(form, path, backend)
    assert _answers(records) == _answers(RecordFile(path)) == _answers(whole)
    assert len(backend.asked) == (2 if cut == 0 else 3)


def _answers(file: RecordFile) -> dict[Any, Any]:
    """All but the seconds."""
    return {key: (r.first, r.rest, r.references) for key, r in file.records.items()}


def test_other_settings_are_other_records(form: PromptFormat, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    _run(form, path, TableBackend(form, _parrot))
    backend = TableBackend(form, lambda _: "- nothing")
    run(CASES, _sample, form, lambda: backend, RecordFile(path), Labels("other", "table:mute", ""))
    assert len(backend.asked) == 5
    assert len(RecordFile(path).records) == 10


def test_settings_digest_knows_values_not_order() -> None:
    assert settings_digest({"a": 1, "b": 2}) == settings_digest({"b": 2, "a": 1})
    assert settings_digest({"a": 1, "b": 2}) != settings_digest({"a": 1, "b": 3})


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"task": "echo"}'])
def test_a_broken_line_gets_one_sentence(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no record of a RULER run; remove"):
        RecordFile(path)


# --------------------------------------------------------------------------------------------- report


def _record(method: str, task: str, index: int, rest: str, first: str = "-") -> Record:
    return Record(
        *(task, 4096, index, method, method, PROTOCOLS["sparse"], 4000, first, rest, ["a", "b"]),
        match="all",
        rows_fraction=None if method == "dense" else 0.02,
        seconds=1.0,
    )


RECORDS = [
    _record("dense", "one", 0, " a b"),
    _record("dense", "one", 1, " a"),
    _record("dense", "two", 0, " b a"),
    _record("quest", "one", 0, " a b"),
    _record("quest", "one", 1, " nothing"),
]


def test_cells_are_means() -> None:
    found = cells(RECORDS, score_from=2)
    assert [(c.method, c.task, c.samples, c.score, c.rows_fraction) for c in found] == [
        ("dense", "one", 2, 0.75, None),
        ("dense", "two", 1, 1.0, None),
        ("quest", "one", 2, 0.5, 0.02),
    ]


def test_unscored_samples_do_not_count() -> None:
    said_at_once = _record("dense", "one", 2, "", first="a")
    (cell,) = cells([RECORDS[0], said_at_once], score_from=2)
    assert (cell.samples, cell.scored, cell.score) == (2, 2, 0.5)  # b is missing, a not scored
    all_at_once = Record(**{**vars(said_at_once), "references": ["a"]})
    (cell,) = cells([RECORDS[0], all_at_once], score_from=2)
    assert (cell.samples, cell.scored, cell.score) == (2, 1, 1.0)


def test_agreement_is_to_the_letter() -> None:
    (found,) = agreements(RECORDS)
    assert (found.methods, found.equal, found.samples) == (("dense", "quest"), 1, 2)


def test_report_names_protocol_and_budget(tmp_path: Path) -> None:
    found, agreed = cells(RECORDS, 2), agreements(RECORDS)
    text = text_report(found, agreed, 2)
    assert text.startswith("question decoded sparsely, 4096 tokens, score in % of the answer from")
    rows = {
        cells_[0]: cells_[1:]
        for line in text.splitlines()
        if len(cells_ := [part.strip() for part in line.strip("|").split("|")]) == 3
    }
    assert rows["task"] == ["dense", "quest"]
    assert rows["one"] == ["75.0", "50.0"]
    assert rows["two"] == ["100.0", "-"]
    assert rows["average"] == ["87.5", "-"]  # half an average would mislead
    assert rows["rows read, %"] == ["-", "2.00"]
    assert "dense and quest: 1 of 2" in text
    content = json.loads(json_report(found, agreed, 2, {"rows": 0.02}))
    assert content["cells"][0]["score"] == 0.75
    assert content["agreements"] == [{"methods": ["dense", "quest"], "equal": 1, "samples": 2}]
    pytest.importorskip("matplotlib")
    plot(found, tmp_path / "ruler.png")
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, both protocols, on the built-in model; a rerun answers nothing anew."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--lengths", "2304", "--samples", "1", "--tasks", "recall_needle,recall_vt"]
    arguments += ["--compare", "transformers:exact,transformers:streaming"]
    for protocol in PROTOCOLS:
        output = tmp_path / protocol
        assert ruler.main([*arguments, "--protocol", protocol, "--output", str(output)]) == 0
        content = json.loads((output / "ruler.json").read_text())
        score = {(c["method"], c["task"]): c["score"] for c in content["cells"]}
        assert score["transformers:exact", "recall_needle"] == 1.0
        assert score["transformers:exact", "recall_vt"] == 1.0
        # The window holds no needle. Prefilled densely, it still knows the first word.
        assert score["transformers:streaming", "recall_needle"] == 0.0
        assert {c["protocol"] for c in content["cells"]} == {PROTOCOLS[protocol]}
        first = [json.loads(line)["first"] for line in (output / "records.jsonl").open()]
        exact, streaming = first[:2], first[2:]
        assert (exact == streaming) == (protocol == "dense")
        monkeypatch.setattr(ruler, "open_backend", None)
        assert ruler.main([*arguments, "--protocol", protocol, "--output", str(output)]) == 0
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    assert (tmp_path / ".models" / "recall" / recall_model.STAMP).is_file()
