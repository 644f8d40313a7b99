"""One engine of the end-to-end benchmark: a process of its own, told what to do line by line.

    python examples/bench_engine.py ARGUMENTS.json RESULTS

bench_generate.py starts two of them, so that both hold their KV cache while they take turns. Each line
of standard input is a JSON object {"prompt": [...], "samples": n, "untimed": few, "tokens": many}; the
answer is one line of JSON in RESULTS: the seconds of the whole, and those per token of each sample
behind the first `few`. Standard output is the engine's log.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    llm = LLM(**arguments)
    samples_rows = arguments["attention_backend"] == "magicpig"
    with open(sys.argv[2], "w", encoding="utf-8", buffering=1) as results:

        def answer(**values: Any) -> None:
            results.write(json.dumps(values) + "\n")

        answer(started=True)
        for line in sys.stdin:
            order = json.loads(line)
            before = llm.collective_rpc("magicpig_stats") if samples_rows else []
            seconds, seconds_per_token = generate(llm, **order)
            after = llm.collective_rpc("magicpig_stats") if samples_rows else []
            rows = sum(rank["sampled_rows"] for rank in after)
            rows -= sum(rank["sampled_rows"] for rank in before)
            middle = sum(rank["middle_rows"] for rank in after)
            middle -= sum(rank["middle_rows"] for rank in before)
            answer(
                seconds=seconds,
                seconds_per_token=seconds_per_token,
                sampled_fraction=rows / middle if middle else None,
            )


def generate(
    llm: LLM, prompt: list[int], samples: int, untimed: int, tokens: int
) -> tuple[float, float | None]:
    """Seconds of the whole, and seconds per token of each sample, in the mean, from when all have
    `untimed` tokens on; None where these are all."""
    # Each of the samples draws its own tokens after the shared prompt: temperature 1. No seed of its
    # own: with one, vLLM 0.32 fails on a CPU once a prompt takes more than one chunk.
    params = SamplingParams(
        n=samples,
        temperature=1.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    engine = llm.llm_engine
    begun = now = time.perf_counter()
    engine.add_request("timed", {"prompt_token_ids": prompt}, params)
    generated: Counter[int] = Counter()
    timed_from, before = None, 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            generated.update({one.index: len(one.token_ids) for one in output.outputs})
        if timed_from is None and len(generated) == samples and min(generated.values()) >= untimed:
            timed_from, before = now, generated.total()
    if sorted(generated.values()) != [tokens] * samples:
        raise RuntimeError(f"{dict(generated)} tokens were generated for {tokens} each")
    timed = generated.total() - before
    if timed_from is None or timed == 0:
        return now - begun, None
    return now - begun, (now - timed_from) * samples / timed


if __name__ == "__main__":
    main()
