"""examples/ruler.py on the engine: its magicpig says what the transformers reference says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recall_model
import ruler
from ruler_backends import PROTOCOLS
from ruler_recall import RECALL_TASKS

LENGTH = "4096"
NEEDLES = ("recall_needle", "recall_multikey", "recall_multiquery", "recall_vt")


def _results(output: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(ruler.json, records) of a comparison of the engine with the reference at 2 % of rows.

    By buckets, whose samples are equal: lists of signatures are drawn by other numbers there."""
    compare = "vllm:magicpig,transformers:magicpig,vllm:dense"
    options = ("--options", '{"index": "buckets"}')
    shared = (*options, "--lengths", LENGTH, "--compare", compare, "--output", str(output))
    assert ruler.main([*shared, *arguments]) == 0
    lines = (output / "records.jsonl").read_text().splitlines()
    return json.loads((output / "ruler.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the built-in model in the place where the example looks for it."""
    folder = tmp_path_factory.mktemp("ruler")
    recall_model.build(folder / ".models" / "recall")
    return folder


def test_engine_and_reference_say_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    content, records = _results(folder / "dense", "--samples", "2")
    assert len(records) == 3 * 2 * len(RECALL_TASKS)
    same = {tuple(a["methods"]): a for a in content["agreements"]}
    found = same["vllm:magicpig", "transformers:magicpig"]
    assert found["equal"] == found["samples"] == 2 * len(RECALL_TASKS)
    score = {(c["method"], c["task"]): c["score"] for c in content["cells"]}
    for task in RECALL_TASKS:
        assert score["vllm:dense", task] == 1.0, "the model itself does not know the answers"
    for task in NEEDLES:
        assert score["vllm:magicpig", task] == 1.0
    for cell in content["cells"]:
        if cell["method"] == "vllm:dense":
            assert cell["rows_fraction"] is None
        else:
            assert 0 < cell["rows_fraction"] <= 0.02


def test_the_question_is_decoded_step_by_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced tokens make the engine decode the question: more steps are sampled, and the first word
    of the answer is one of them."""
    monkeypatch.chdir(folder)
    content, records = _results(
        *(folder / "sparse", "--samples", "1", "--protocol", "sparse"),
        *("--tasks", "recall_needle,recall_vt"),
    )
    assert {c["protocol"] for c in content["cells"]} == {PROTOCOLS["sparse"]}
    assert content["score_from"] == 1
    assert {c["score"] for c in content["cells"]} == {1.0}
    answers = {
        r["method"]: (r["first"] + r["rest"]).split() for r in records if r["task"] == NEEDLES[0]
    }
    assert answers["vllm:magicpig"] == answers["transformers:magicpig"] == answers["vllm:dense"]
    assert len(answers["vllm:magicpig"]) == 6  # none of the forced words is among them
