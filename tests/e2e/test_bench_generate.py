"""The end-to-end benchmark on one layer and a short prompt: two engines that take turns."""

from __future__ import annotations

import json
from pathlib import Path

import bench_generate
import pytest
from compare_setup import SHAPES


@pytest.mark.slow
def test_it_measures_both_backends(tmp_path: Path) -> None:
    arguments = ["--lengths", "2560", "--batches", "1,2", "--layers", "1", "--repeats", "1"]
    assert bench_generate.main([*arguments, "--tokens", "2,10", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench_generate.json").read_text())["results"]
    assert [(r["num_tokens"], r["batch"]) for r in results] == [(2560, 1), (2560, 2)]
    for result in results:
        assert set(result["tpot_ms"]) == set(bench_generate.BACKENDS)
        assert 0 < result["sampled_fraction"] < 0.5
        assert result["share_8b"] < result["share_here"] < 1


def test_shares_of_attention() -> None:
    """Of an 8B model: 16 GB of weights less the embedding, and 128 KiB a token of KV."""
    shape = SHAPES["llama-3.1-8b"]
    weights = 2 * (8.03e9 - 4096 * 128256)
    expected = 131072 * 32768 / (131072 * 32768 + weights)
    assert bench_generate.attention_share(shape, 32768, 1) == pytest.approx(expected, rel=1e-3)
