"""The device path through the engine over a fake device: budgets, sampling, errors, two ranks.

test_exact_parity.py has its answers in exact mode.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import recall_model
from engines import engine, generate, greedy
from fake_device_worker import ON_FAKE_DEVICE
from parity import SERVE, prompts, tokens
from random_models import MAX_LEN, write_random_model
from serving import VllmServer
from vllm import LLM

from vllm_magicpig import device_step

EXACT: dict[str, Any] = {"K": 0, "dense_layers": [0], "host_kv_cache_gib": 1}


def test_the_host_budget_limits_the_blocks_and_the_length_that_vllm_chooses(
    tmp_path: Path,
) -> None:
    """With --max-model-len -1 vLLM shortens the model's own length, once it knows its cache."""
    model = write_random_model("llama", tmp_path / "llama")
    serve = SERVE | {"dtype": "float32", "max_model_len": -1}
    del serve["num_gpu_blocks_override"]
    gib = 0.01
    with engine(
        model, "magicpig", EXACT | {"host_kv_cache_gib": gib}, **serve, **ON_FAKE_DEVICE
    ) as llm:
        num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        length = llm.llm_engine.vllm_config.model_config.max_model_len
        assert length <= num_blocks * SERVE["block_size"] < MAX_LEN
        # Two sampled layers, two kv heads, K and V of 64 floats.
        block_bytes = 2 * 2 * SERVE["block_size"] * 2 * 64 * 4
        assert num_blocks == int(gib * 2**30) // block_bytes
        assert len(generate(llm, prompts([5000], seed=3), greedy(4, detokenize=False))) == 1


def test_a_host_pool_too_small_for_one_request_says_so(tmp_path: Path) -> None:
    model = write_random_model("llama", tmp_path / "llama")
    options = EXACT | {"host_kv_cache_gib": 0.001}
    serve = SERVE | {"dtype": "float32", **ON_FAKE_DEVICE}
    sentence = "raise host_kv_cache_gib to at least"
    with pytest.raises(Exception, match=sentence), engine(model, "magicpig", options, **serve):
        pass


def test_sampling_gives_the_answers_of_the_cpu_platforms_path(tmp_path: Path) -> None:
    """Same hyperplanes, centre and pages: in float32 both paths draw the same samples, but for codes
    whose projection is within rounding of zero."""
    model = write_random_model("llama", tmp_path / "llama")
    options: dict[str, Any] = {
        "dense_layers": [0],
        "index": "buckets",
        "K": 7,
        "L": 60,
        "exact_below": 512,
    }
    answers, stats = [], []
    for arguments in ({}, ON_FAKE_DEVICE):
        serve = SERVE | {"dtype": "float32", **arguments}
        given = options | ({"host_kv_cache_gib": 1} if arguments else {})
        with engine(model, "magicpig", given, **serve) as llm:
            first = generate(llm, prompts([4000, 300], seed=4), greedy(40, detokenize=False))
            again = generate(llm, prompts([4000, 300], seed=4), greedy(40, detokenize=False))
            answers.append([tokens(output) for output in first + again])
            stats.append(stats_of(llm))
    host, device = stats
    assert host["sampled_heads"] == device["sampled_heads"] > 0
    assert device["key_centers"] == 2
    assert device["segments_built"] >= 2
    fractions = [s["sampled_fraction"] for s in stats]
    assert 0 < fractions[0] < 0.5
    assert abs(fractions[0] - fractions[1]) < 0.02 * fractions[0]
    assert answers[0] == answers[1]


def test_an_error_in_a_host_callback_is_the_steps_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block table that lies: the native side finds the block out of range and the step fails."""
    copy = device_step._copy_to_host

    def corrupt(buffers: Any, *tensors: Any) -> None:
        copy(buffers, *tensors)
        buffers.block_tables.fill_(1 << 30)

    model = write_random_model("llama", tmp_path / "llama")
    with engine(model, "magicpig", EXACT, **SERVE | {"dtype": "float32"}, **ON_FAKE_DEVICE) as llm:
        monkeypatch.setattr(device_step, "_copy_to_host", corrupt)
        with pytest.raises(Exception, match="1073741824"):
            generate(llm, prompts([600], seed=5), greedy(4, detokenize=False))


def stats_of(llm: LLM) -> dict[str, Any]:
    stats: dict[str, Any] = llm.collective_rpc("magicpig_stats")[0]
    return stats


def test_a_server_of_two_ranks_answers_from_two_pools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vllm serve` with its spawned processes; each rank has its heads, pool, threads and callbacks."""
    model = recall_model.build(tmp_path / "recall")
    question = recall_model.haystack(5000, num_chains=3, seed=5).question(1)
    folder = Path(__file__).parent
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{folder.parent}:{folder}:{inherited}".strip(":"))
    first, second = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    arguments = (
        "--enforce-eager", "--max-model-len", "6000", "--kv-cache-memory-bytes", "500000000",
        "--tensor-parallel-size", "2", "--worker-cls", ON_FAKE_DEVICE["worker_cls"],
    )  # fmt: skip
    options = {"host_kv_cache_gib": 0.5}
    log = tmp_path / "serve.log"
    with VllmServer(model, "magicpig", *arguments, options=options, log_path=log) as server:
        said = server.complete(question.prompt, 6).text.split()
        ranks = server.call("magicpig_stats")
    assert tuple(said[1:]) == question.answer[1:]
    assert len(ranks) == 2
    for stats in ranks:
        assert stats["sampled_heads"] == 5 * 2, "each rank has two of the four query heads"
        assert stats["key_centers"] == 0, "signatures need none"
        assert stats["page_tokens"] >= 5000
        assert 0 < stats["sampled_fraction"] < 0.05
