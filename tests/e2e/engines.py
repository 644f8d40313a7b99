"""vLLM engines inside the test process: a start costs seconds, not half a minute."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import RequestOutput


@contextmanager
def engine(
    model: Path, backend: str, options: dict[str, Any] | None = None, **arguments: Any
) -> Iterator[LLM]:
    """An eager LLM with this attention backend; `options` are magicpig's."""
    defaults: dict[str, Any] = {
        "attention_backend": backend,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "disable_log_stats": False,  # num_preemptions is read from the metrics
        "seed": 0,
    }
    if options is not None:
        defaults["additional_config"] = {"magicpig": options}
    llm = LLM(str(model), **defaults | arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(max_tokens: int, **arguments: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **arguments)


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def metric(llm: LLM, name: str) -> float:
    """Value of a counter of vLLM's own metrics, for example vllm:num_preemptions."""
    values = [m.value for m in llm.get_metrics() if m.name == name]
    assert values, f"vLLM has no metric {name}"
    return float(sum(values))
