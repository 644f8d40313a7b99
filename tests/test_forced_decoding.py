"""evals/forced_decoding.py without an engine: what is forced, figures of cases by hand, ended runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("transformers")

import forced_decoding
import forced_documents
import update_docs
from forced_engine import position
from forced_records import ForcedRun, Position, RecordFolder, digest
from forced_report import table
from forced_statistics import BLOCK_TOKENS, compare, divergence, half_width
from ruler_helpers import bpe_tokenizer


def _position(token: int, **logprobs: float) -> Position:
    """logprobs: of tokens `t3`, `t5`, ..."""
    return position(token, {int(name[1:]): value for name, value in logprobs.items()})


def _log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_a_position_names_the_likeliest_tokens_and_the_forced_one() -> None:
    named = {i: -1.0 - i for i in range(20)} | {77: -50.0}
    found = position(77, named)
    assert (found.token, found.logprob) == (77, -50.0)
    assert found.top_tokens == tuple(range(20))
    assert _position(3, t9=-1.0, t3=-1.0).top_tokens == (3, 9)  # equal: in the order of ids


def test_the_divergence_lumps_what_only_one_names() -> None:
    half, quarter, eighth = _log(0.5, 0.25, 0.125)
    reference = _position(1, t1=half, t2=quarter)
    method = _position(1, t1=quarter, t3=eighth)
    # Shared is token 1: 0.5 against 0.25, and what is left, 0.5 against 0.75.
    assert divergence(reference, method) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    )
    assert divergence(reference, reference) == 0.0


def test_figures_of_a_case_by_hand() -> None:
    half, quarter, eighth = _log(0.5, 0.25, 0.125)
    reference = [[_position(1, t1=half, t2=quarter), _position(2, t1=half, t2=quarter)]]
    method = [[_position(1, t1=quarter, t2=half), _position(2, t1=half, t2=quarter)]]
    found = compare(reference, method)
    assert found.tokens == 2
    assert found.difference == pytest.approx(-math.log(2) / 2)
    assert found.perplexity_percent == pytest.approx(100 * (math.sqrt(2) - 1))
    assert found.absolute == pytest.approx(math.log(2) / 2)
    assert found.agreement_percent == 50.0
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.kl_max == pytest.approx(expected)
    assert found.kl_mean == pytest.approx(expected / 2)
    with pytest.raises(ValueError, match="other tokens"):
        compare(reference, [[_position(1, t1=half), _position(1, t1=eighth)]])


def test_the_interval_has_blocks_for_units() -> None:
    # Two blocks whose means are 0 and 1: a standard error of 1/2 with one degree of freedom.
    blocks = np.repeat([0.0, 1.0], BLOCK_TOKENS)
    assert half_width([blocks]) == pytest.approx(12.706 / 2)
    assert half_width([blocks[:BLOCK_TOKENS], blocks[BLOCK_TOKENS:]]) == pytest.approx(12.706 / 2)
    assert half_width([blocks[:BLOCK_TOKENS]]) == math.inf


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_the_interval_covers_the_mean(correlation: float) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        noise = random.standard_normal((2, 192))
        for i in range(1, 192):
            noise[:, i] = correlation * noise[:, i - 1] + (1 - correlation**2) ** 0.5 * noise[:, i]
        covered += abs(noise.mean()) <= half_width(list(noise))
    # Blocks of neighbours that depend on each other are not quite independent.
    assert covered / 400 > (0.93 if correlation == 0 else 0.88)


def _forced_token(forced: list[int], said: list[int], vocabulary: int = 32) -> int:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    from ruler_forced import FORCED_TOKENS, ForcedTokens
    from vllm import SamplingParams

    processor = object.__new__(ForcedTokens)
    params = SamplingParams(extra_args={FORCED_TOKENS: forced})
    force = processor.new_req_logits_processor(params)
    assert force is not None
    logits = torch.zeros(vocabulary)
    logits[5] = 9.0
    before = logits.clone()
    chosen = int(force(said, logits).argmax())
    # The sampler's log-probabilities are of these.
    assert torch.equal(logits, before)
    return chosen


def test_the_sampler_takes_the_documents_tokens_one_by_one() -> None:
    assert _forced_token([7, 3], []) == 7
    assert _forced_token([7, 3], [7]) == 3
    assert _forced_token([7, 3], [7, 3]) == 5


class CountingEngine:
    """Says the same of every token; `worse` nats less with magicpig."""

    opened: ClassVar[list[Any]] = []
    closed: ClassVar[int] = 0
    fails_at: ClassVar[int | None] = None

    def __init__(self, model: str, options: Any, max_model_len: int, dtype: str) -> None:
        self.worse = 0.0 if options is None else 0.25
        CountingEngine.opened.append((options, max_model_len, dtype))

    def run(self, prefix: Sequence[int], forced: Sequence[int]) -> ForcedRun:
        if CountingEngine.fails_at == len(CountingEngine.opened):
            raise KeyboardInterrupt
        assert (len(prefix), len(forced)) == (64, 33)
        logprob = -1.0 - self.worse
        positions = [Position(t, logprob, (t,), (logprob,)) for t in forced[1:]]
        return ForcedRun(positions, 0.02 if self.worse else None, 1.0)

    def close(self) -> None:
        CountingEngine.closed += 1


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    bpe_tokenizer().save_pretrained(model)
    text = tmp_path / "tale.txt"
    text.write_text(" ".join(f"word {i}" for i in range(400)), "utf-8")
    monkeypatch.setattr(CountingEngine, "opened", [])
    monkeypatch.setattr(CountingEngine, "closed", 0)
    monkeypatch.setattr(forced_decoding, "ForcedEngine", CountingEngine)
    return ["--model", str(model), "--documents", str(text), "--prefix", "64", "--forced", "32",
            "--methods", "dense", "buckets", "--output", str(tmp_path / "out")]  # fmt: skip


def test_a_report_says_what_was_measured_on_what(arguments: list[str], tmp_path: Path) -> None:
    assert forced_decoding.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "forced_decoding.json").read_text())
    assert found["model"] == "model"
    assert len(found["weights_sha256"]) == 64
    assert (found["prefix_tokens"], found["forced_tokens"]) == (64, 32)
    assert [d["name"] for d in found["documents"]] == ["tale"]
    assert found["hardware"]["cpu"]
    dense, buckets = found["methods"]
    assert dense["compared"]["difference"] == 0.0
    assert buckets["options"] == {"index": "buckets"}
    assert buckets["rows_fraction"] == 0.02
    assert buckets["compared"]["difference"] == pytest.approx(-0.25)
    assert buckets["compared"]["tokens"] == 32
    row = table(found).splitlines()[-1]
    assert "+28.40 %" in row
    assert "2.00 %" in row
    # The prefill predicts the first of prefix + 1 + 32 tokens, and the model needs room for all.
    assert CountingEngine.opened == [(None, 97, "float32"), ({"index": "buckets"}, 97, "float32")]
    assert CountingEngine.closed == 2


def test_a_run_that_was_ended_goes_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingEngine, "fails_at", 2)
    with pytest.raises(KeyboardInterrupt):
        forced_decoding.main(arguments)
    assert CountingEngine.closed == 2
    monkeypatch.setattr(CountingEngine, "fails_at", None)
    assert forced_decoding.main(arguments) == 0
    assert [options for options, *_ in CountingEngine.opened] == [
        None,
        {"index": "buckets"},
        {"index": "buckets"},
    ]


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    records = RecordFolder(tmp_path)
    run = ForcedRun([_position(3, t3=-1.0, t4=-2.5)], 0.02, 3.5)
    key = digest("a", {"b": 1})
    assert key not in records
    records[key] = run
    assert records[key] == run
    assert digest("a", {"b": 2}) != key
    (tmp_path / f"{key}.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no record of a forced run; remove the file\.$"):
        records[key]


def test_documents_that_are_built_in_and_what_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "class ArgumentParser" in forced_documents.read_document("stdlib")
    with pytest.raises(ValueError, match="cannot be read"):
        forced_documents.read_document(str(tmp_path))
    (tmp_path / "tale.txt").write_text("short", "utf-8")
    assert forced_decoding.main(arguments) == 2
    [sentence] = capsys.readouterr().err.strip().splitlines()
    assert "need 97" in sentence


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--prefix", "0"], "whole number"),
        (["--methods", "nothing"], "neither dense"),
        (["--methods", '{"no_such": 1}'], "no_such"),
        (["--output", "/proc/results"], "no folder"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else part,
)
def test_what_is_refused(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        forced_decoding.main(["--model", "m", *wrong])
    assert end.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_documentation_shows_the_reports() -> None:
    page = update_docs.PAGE.read_text("utf-8")
    reports = update_docs.read_reports()
    assert reports
    assert update_docs.updated(page, reports) == page
    report = json.loads(reports[0])
    report["methods"][-1]["perplexity"] += 1
    assert update_docs.updated(page, [json.dumps(report), *reports[1:]]) != page
