"""`vllm serve --attention-backend MAGICPIG`: spawned processes, the HTTP API, a clean end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import recall_model
from serving import VllmServer

ARGUMENTS = ("--enforce-eager", "--max-model-len", "6000", "--kv-cache-memory-bytes", "500000000")


def _group_members(process_group: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "pid=", "--no-headers", "-g", str(process_group)],
                           capture_output=True, text=True)  # fmt: skip
    return found.stdout.split()


def test_a_server_answers_reports_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The API server, the engine and the worker are processes of their own, as in production.
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    model = recall_model.build(tmp_path / "recall")
    question = recall_model.haystack(5000, num_chains=3, seed=5).question(1)
    centers = tmp_path / "centers.safetensors"
    log = tmp_path / "serve.log"
    with VllmServer(model, "MAGICPIG", *ARGUMENTS, log_path=log) as server:
        group = server._process.pid
        assert len(_group_members(group)) >= 2
        said = server.complete(question.prompt, 6).text.split()
        stats = server.stats()
        server.call("magicpig_save_centers", str(centers))
    assert tuple(said[1:]) == question.answer[1:]
    assert stats["decode_steps"] == 5
    assert stats["centers_frozen"] == stats["sampled_layers"] == 1
    assert 0 < stats["sampled_fraction"] < 0.05
    assert stats["hash_us_per_step"] > 0
    assert stats["lookup_us_per_step"] > 0
    assert stats["attend_us_per_step"] > 0
    assert centers.is_file()
    assert _group_members(group) == []


def test_a_wrong_option_ends_the_start_with_its_sentence(tmp_path: Path) -> None:
    model = recall_model.build(tmp_path / "recall")
    server = VllmServer(
        model, "magicpig", *ARGUMENTS, options={"Q": 3}, log_path=tmp_path / "serve.log"
    )
    with (
        pytest.raises(RuntimeError, match="magicpig option 'Q' is unknown; allowed are K, L"),
        server,
    ):
        pass
