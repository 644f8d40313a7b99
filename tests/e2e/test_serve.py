"""`vllm serve --attention-backend MAGICPIG`: spawned processes, the HTTP API, a clean end."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import recall_model
from serving import VllmServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_magicpig.accuracy.transformers_attention import capture
from vllm_magicpig.cli import main
from vllm_magicpig.key_center import load_centers
from vllm_magicpig.passage import PASSAGE_TOKENS, make_passage

CHUNK = 2048
"""Tokens of a prefill step."""
ARGUMENTS = (
    "--enforce-eager",
    "--max-model-len",
    "6000",
    "--kv-cache-memory-bytes",
    "500000000",
    "--max-num-batched-tokens",
    str(CHUNK),
)
QUESTION = recall_model.haystack(5000, num_chains=3, seed=5).question(1)


@dataclass(frozen=True)
class Served:
    said: list[str]
    stats: dict[str, Any]
    shown: str
    processes: list[str]
    processes_left: list[str]
    centers: Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recall_model.build(tmp_path_factory.mktemp("models") / "recall")


@pytest.fixture(autouse=True, scope="module")
def processes_of_their_own() -> Any:
    """The API server, the engine and the worker are processes, as in production."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        yield


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    centers = folder / "centers.safetensors"
    options, log = {"index": "buckets"}, folder / "serve.log"  # which have centres to save
    with VllmServer(model, "MAGICPIG", *ARGUMENTS, options=options, log_path=log) as server:
        processes = _group_members(server.process_group)
        said = server.complete(QUESTION.prompt, 6).text.split()
        stats = server.stats()
        shown = _shown_stats(server.url)
        server.call("magicpig_save_centers", str(centers))
    return Served(said, stats, shown, processes, _group_members(server.process_group), centers)


def _shown_stats(url: str) -> str:
    """What `vllm-magicpig stats` prints, in a process of its own as a user's."""
    command = [sys.executable, "-m", "vllm_magicpig.cli", "stats", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout


def _group_members(process_group: int) -> list[str]:
    command = ["ps", "-o", "pid=", "--no-headers", "-g", str(process_group)]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def test_a_server_answers(served: Served) -> None:
    assert tuple(served.said[1:]) == QUESTION.answer[1:]


def test_a_server_reports_what_it_did(served: Served) -> None:
    stats = served.stats
    assert stats["decode_steps"] == 5
    assert stats["key_centers"] == stats["sampled_layers"] == 1
    assert stats["page_tokens"] >= 5000
    assert 0 < stats["sampled_fraction"] < 0.05
    for part in ("hash", "lookup", "attend"):
        assert stats[f"{part}_us_per_step"] > 0


def test_a_server_shows_the_same_without_the_development_route(served: Served) -> None:
    """And at once: an idle worker has written its last steps, however short they were."""
    stats, shown = served.stats, served.shown
    assert "requests        1 finished, 0 running, 0 waiting" in shown
    assert f"sampled       {100 * stats['sampled_fraction']:.2f} % of the middle" in shown
    assert f"rows          {stats['sampled_rows_mean']:.0f} per query head and token" in shown
    assert "over 5 steps" in shown
    for stage in ("hash", "lookup", "attend"):
        assert f"{stage} {stats[f'{stage}_us_per_step']:.0f} us" in shown
    assert f"MiB of pages for {stats['page_tokens']} tokens" in shown
    assert f"index memory  {stats['index_bytes'] / 2**20:.1f} MiB" in shown


def test_a_server_leaves_no_process_behind(served: Served) -> None:
    assert len(served.processes) >= 3
    assert served.processes_left == []


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `vllm-magicpig tune` for the first chunk of the question."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "prompt.txt").write_text(QUESTION.prompt)
    output = folder / "calibration.safetensors"
    command = ["tune", str(model), "--prompts", str(folder / "prompt.txt"), "--output", str(output)]
    assert (
        main([*command, "--candidates", "10,150", "--queries", "2", "--max-tokens", str(CHUNK)])
        == 0
    )
    return output


def test_the_centre_is_that_of_the_passage(served: Served, model: Path) -> None:
    """In transformers from the same tokens; both round keys to bfloat16, perhaps of sums in another
    order. The question came later: it has not moved the centre."""
    engine = load_centers(served.centers)
    assert sorted(engine) == [1]
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    vocab_size = loaded.config.vocab_size
    passage = make_passage(tokenizer, vocab_size, tokenizer.all_special_ids, PASSAGE_TOKENS)
    (layer,) = capture(loaded, passage.token_ids, 1, layers=[1])
    expected = layer.keys.mean(dim=1)
    difference = (engine[1] - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert difference.max() < 2**-8


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two CPUs")
def test_two_ranks_load_their_heads_of_a_calibration_file(
    model: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    arguments = (*ARGUMENTS, "--tensor-parallel-size", "2")
    options = {"index": "buckets", "center": str(tuned)}
    log = tmp_path / "serve.log"
    with VllmServer(model, "magicpig", *arguments, options=options, log_path=log) as server:
        before = server.call("magicpig_stats")
        said = server.complete(QUESTION.prompt, 6).text.split()
        after = server.call("magicpig_stats")
        shown = _shown_stats(server.url)
    assert [stats["key_centers"] for stats in before] == [1, 1]
    assert tuple(said[1:]) == QUESTION.answer[1:]
    for stats in after:
        assert stats["sampled_heads"] == 5 * 2, "each rank has two of the four query heads"
        assert 0 < stats["sampled_fraction"] < 0.05
    ranks = shown.split("\nengine 0, rank ")[1:]
    assert len(ranks) == 2
    for stats, rank in zip(after, ranks, strict=True):
        assert f"sampled       {100 * stats['sampled_fraction']:.2f} % of the middle" in rank


def test_a_wrong_option_ends_the_start_with_its_sentence(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    server = VllmServer(model, "magicpig", *ARGUMENTS, options={"Q": 3}, log_path=log)
    sentence = "exit code 1: magicpig option 'Q' is unknown; allowed are index, K, L"
    with pytest.raises(RuntimeError, match=sentence), server:
        pass
