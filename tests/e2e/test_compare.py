"""The whole comparison, as a user starts it: two engines, a tiny random model, a small KV cache.

50 blocks' worth of dense cache: 2,400 tokens twice fit both backends, 5,400 tokens fit CPU_ATTN
once and magicpig, whose pages also hold codes, not at all. Nothing here looks at speed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from typing import Any

import compare_flash_attention
import pytest
from random_models import CONFIGS

SHORT, LONG, OUTPUT_TOKENS = 2400, 5400, 6
BLOCK_SIZE = 128
DENSE_BLOCK_BYTES = BLOCK_SIZE * 3 * 2 * 2 * 64 * 2  # layers, kv heads, K and V, head size, bf16
KV_CACHE_BYTES = 50 * DENSE_BLOCK_BYTES


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    config = CONFIGS["llama"].to_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        compare_flash_attention.__file__,
        *("--config", str(folder / "config.json")),
        *("--lengths", f"{SHORT},{LONG}", "--requests", "2"),
        *("--output-tokens", str(OUTPUT_TOKENS)),
        *("--options", '{"index": "buckets", "L": 40, "dense_layers": [0]}'),
        *("--engine-args", '{"enforce_eager": true}'),
        *("--kv-cache-gib", str(KV_CACHE_BYTES / 2**30)),
        *("--output", str(folder / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    written: dict[str, Any] = json.loads((folder / "out" / "comparison.json").read_text())
    written["files"] = {path.name for path in (folder / "out").iterdir()}
    written["table"] = done.stdout
    return written


def _result(comparison: dict[str, Any], backend: str, length: int) -> dict[str, Any]:
    (found,) = (
        result
        for result in comparison["results"]
        if result["backend"] == backend and result["case"] == {"length": length, "num_requests": 2}
    )
    return dict(found)


def test_it_leaves_its_files(comparison: dict[str, Any]) -> None:
    expected = {"comparison.json", "comparison.md", "magicpig.log", "cpu_attn.log"}
    if importlib.util.find_spec("matplotlib") is not None:
        expected.add("comparison.png")
    assert comparison["files"] == expected
    assert comparison["finished"] is True
    assert re.search(rf"\| *{SHORT} \| *2 \| *ratio \|", comparison["table"])


@pytest.mark.parametrize("backend", ["magicpig", "CPU_ATTN"])
def test_every_token_was_timed(comparison: dict[str, Any], backend: str) -> None:
    (run,) = _result(comparison, backend, SHORT)["runs"]
    times = [request["token_times"] for request in run["requests"]]
    assert [len(part) for part in times] == [OUTPUT_TOKENS] * 2
    assert all(part == sorted(part) and 0 < part[0] < part[-1] for part in times)
    steps = run["steps"]
    assert sum(step["prompt_tokens"] for step in steps) == 2 * SHORT
    assert sum(step["new_tokens"] for step in steps) == 2 * OUTPUT_TOKENS
    assert {at for part in times for at in part} == {s["at"] for s in steps if s["new_tokens"]}
    assert any(step["prompt_requests"] == 0 for step in steps)


@pytest.mark.parametrize("backend", ["magicpig", "CPU_ATTN"])
def test_figures_are_sane(comparison: dict[str, Any], backend: str) -> None:
    found = _result(comparison, backend, SHORT)["figures"]
    assert found["output_tokens"] == 2 * OUTPUT_TOKENS
    assert 0 < found["tpot_ms"] / 1e3 < found["ttft_median_s"] <= found["ttft_max_s"]
    for name in ("decode_tokens_per_s", "prefill_tokens_per_s", "output_tokens_per_s"):
        assert found[name] > 0
    assert found["peak_running"] == 2
    assert found["preemptions"] == 0


def test_capacity(comparison: dict[str, Any]) -> None:
    ours, dense = comparison["engines"]["magicpig"], comparison["engines"]["CPU_ATTN"]
    assert dense["num_blocks"] == 50
    assert dense["kv_bytes"] == KV_CACHE_BYTES
    assert dense["max_model_len"] == LONG + OUTPUT_TOKENS
    assert ours["max_model_len"] == SHORT + OUTPUT_TOKENS
    assert ours["num_blocks"] < dense["num_blocks"]
    assert 0.9 * KV_CACHE_BYTES < ours["kv_bytes"] <= KV_CACHE_BYTES
    for engine in (ours, dense):
        assert 0 < engine["kv_cache_tokens"] <= engine["num_blocks"] * engine["block_size"]
        assert engine["start_s"] > 0


def test_magicpigs_pages_and_index(comparison: dict[str, Any]) -> None:
    host = _result(comparison, "magicpig", SHORT)["host"]
    assert host["index_bytes"] > 0
    assert 0 < host["page_bytes"] < comparison["engines"]["magicpig"]["kv_bytes"]
    assert host["page_tokens"] >= 2 * SHORT
    assert 0 < host["sampled_fraction"] < 0.5
    assert _result(comparison, "CPU_ATTN", SHORT)["host"] is None


def test_what_a_backend_cannot_hold_is_a_result(comparison: dict[str, Any]) -> None:
    refused = _result(comparison, "magicpig", LONG)
    assert refused["figures"] is None
    assert f"one request of {LONG + OUTPUT_TOKENS} tokens needs" in refused["refused"]
    assert "cannot hold it" in comparison["table"]
    held = _result(comparison, "CPU_ATTN", LONG)["figures"]
    assert held["output_tokens"] == 2 * OUTPUT_TOKENS
    assert held["peak_running"] == 1 or held["preemptions"] > 0, "the cache holds one of the two"
