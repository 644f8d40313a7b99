"""K = 0 attends exactly over the same pages, so magicpig must answer as CPU_ATTN does.

float32: equal greedy tokens. bfloat16: the log-probs of both differ from the float32 model's by
rounding; magicpig's error may be at most twice that of vLLM's own backend on the same tokens.
Every architecture runs chunked prefill, prefix-cache hits, preemptions and a batch of 3 to 6,000
tokens; magicpig's layer 0 is dense, so both kinds of layer share one block table.

Two of them also run the device path over a fake device (fake_device_worker.py): host pool, stream
callbacks and staged prefill with the references of the Triton kernels, while vLLM's planner,
scheduler, block tables and dense layers are the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import engine
from fake_device_worker import ON_FAKE_DEVICE
from parity import SERVE, Run, assert_equal_tokens, errors, run_workload, tokens
from random_models import CONFIGS, write_random_model

from vllm_magicpig import device_buffers

EXACT: dict[str, Any] = {"K": 0, "dense_layers": [0]}
ON_DEVICE_TOO = ("llama", "gemma3")
"""gemma3 has sliding-window layers beside dense and sampled ones, in the same block table."""


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_exact_mode_answers_as_the_platforms_backend(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_random_model(name, tmp_path / name)
    runs: dict[tuple[str, str], Run] = {}
    for dtype in ("float32", "bfloat16"):
        for backend, options in (("CPU_ATTN", None), ("magicpig", EXACT)):
            with engine(model, backend, options, dtype=dtype, **SERVE) as llm:
                runs[dtype, backend] = run_workload(llm)
    dense = runs["float32", "CPU_ATTN"]
    if name in ON_DEVICE_TOO:
        # Many pieces for one context: 6,000 tokens take 12.
        monkeypatch.setattr(device_buffers, "STAGING_TOKENS", 500)
        options = EXACT | {"host_kv_cache_gib": 1}
        arguments = SERVE | ON_FAKE_DEVICE | {"dtype": "float32"}
        with engine(model, "magicpig", options, **arguments) as llm:
            runs["float32", "device path"] = run_workload(llm)
            (stats,) = llm.collective_rpc("magicpig_stats")
        assert stats["page_tokens"] > 0
        assert stats["exact_heads"] > 0
        assert stats["sampled_heads"] == 0

    varied = {tuple(tokens(output)) for output in dense.mixed + dense.crowded}
    assert len(varied) == len(dense.mixed) + len(dense.crowded), "the outputs do not vary"
    for run in runs.values():
        assert run.preemptions >= 4
        assert run.cached_tokens >= 2000
    for (dtype, path), run in runs.items():
        if dtype == "float32" and run is not dense:
            ties = count_ties(run, dense)
            print(f"{name} by {path}: {ties} requests part at a float32 tie")
            assert ties <= 1

    for part in ("mixed", "crowded"):
        truth = getattr(dense, part)
        bound = 2 * max(errors(getattr(runs["bfloat16", "CPU_ATTN"], part), truth))
        error = max(errors(getattr(runs["bfloat16", "magicpig"], part), truth))
        print(f"{name} {part}: bf16 log-prob error {error:.4f}, bound {bound:.4f}")
        assert error <= bound


def count_ties(ours: Run, dense: Run) -> int:
    ties = assert_equal_tokens(ours.mixed, dense.mixed)
    ties += assert_equal_tokens(ours.crowded, dense.crowded)
    ties += assert_equal_tokens(ours.repeated, dense.repeated)
    return ties + assert_equal_tokens(ours.repeated, dense.mixed[2:5])
