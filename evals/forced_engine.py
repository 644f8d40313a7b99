"""A vLLM engine whose next tokens are those of a document; read are the model's own log-probabilities.

The prompt is the document's prefix. A logits processor makes the sampler take the document's next
token, so that each goes through one decode step. vLLM computes the log-probabilities before any
processor (`logprobs_mode` "raw_logprobs"), so they are what the model would have sampled from.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from forced_records import ForcedRun, Position

TOP = 20
CPU_KV_CACHE_BYTES = 2 << 30  # vLLM's CPU platform would otherwise take a share of all memory


class ForcedEngine:
    def __init__(
        self, model: str, options: Mapping[str, Any] | None, max_model_len: int, dtype: str
    ) -> None:
        """options: magicpig's; None for the platform's own dense attention."""
        from ruler_forced import QUALIFIED_NAME
        from vllm import LLM
        from vllm.platforms import current_platform

        # vLLM's V2 runner has logits processors of another interface, and no use on a CPU.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        arguments: dict[str, Any] = {
            "max_model_len": max_model_len,
            "max_num_seqs": 1,
            "dtype": dtype,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "seed": 0,
            "max_logprobs": TOP,
            "logprobs_mode": "raw_logprobs",
            "logits_processors": [QUALIFIED_NAME],
        }
        if current_platform.is_cpu():
            arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        self._samples = options is not None
        if options is not None:
            arguments["attention_backend"] = "magicpig"
            arguments["additional_config"] = {"magicpig": dict(options)}
        self._llm = LLM(model, **arguments)

    def run(self, prefix: Sequence[int], forced: Sequence[int]) -> ForcedRun:
        """Forces the tokens `forced` after `prefix`; len(forced) - 1 positions, as the prefill,
        which is dense, predicts the first."""
        from ruler_forced import FORCED_TOKENS
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=len(forced),
            ignore_eos=True,
            logprobs=TOP,
            detokenize=False,
            extra_args={FORCED_TOKENS: list(forced)},
        )
        before, started = self._rows(), time.monotonic()
        [output] = self._llm.generate(
            [{"prompt_token_ids": list(prefix)}], [params], use_tqdm=False
        )
        seconds = time.monotonic() - started
        rows, middle = (b - a for a, b in zip(before, self._rows(), strict=True))
        said = output.outputs[0]
        if list(said.token_ids) != list(forced):
            raise RuntimeError("the engine did not take the forced tokens; see ruler_forced.py.")
        positions = [
            position(token, {i: entry.logprob for i, entry in entries.items()})
            for token, entries in zip(forced, said.logprobs, strict=True)
        ]
        return ForcedRun(positions[1:], rows / middle if middle else None, seconds)

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _rows(self) -> tuple[int, int]:
        """(rows sampled, rows of the middles) since the engine started, of all ranks."""
        if not self._samples:
            return 0, 0
        stats = self._llm.collective_rpc("magicpig_stats")
        return sum(s["sampled_rows"] for s in stats), sum(s["middle_rows"] for s in stats)


def position(token: int, logprobs: Mapping[int, float]) -> Position:
    """logprobs: of the TOP most likely tokens and of `token`, by token id."""
    # Equal ones in the order of ids, so that two engines name the same first choice.
    ordered = sorted(logprobs.items(), key=lambda entry: (-entry[1], entry[0]))[:TOP]
    return Position(
        token,
        logprobs[token],
        tuple(i for i, _ in ordered),
        tuple(value for _, value in ordered),
    )
