"""One engine of the end-to-end benchmark: a process of its own, told what to do line by line.

    python examples/bench_engine.py ARGUMENTS.json RESULTS

bench_generate.py starts two of them, so that both hold their KV cache while they take turns. Each line
of standard input is a JSON object {"prompt": [...], "samples": n, "tokens": m}; the answer is one line
of JSON in RESULTS: the seconds that `generate` took. Standard output is the engine's log.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments)
    samples_rows = arguments["attention_backend"] == "magicpig"
    with open(sys.argv[2], "w", encoding="utf-8", buffering=1) as results:

        def answer(**values: Any) -> None:
            results.write(json.dumps(values) + "\n")

        answer(started=True)
        for line in sys.stdin:
            order = json.loads(line)
            # Each of the samples draws its own tokens after the shared prompt: temperature 1. No seed
            # of its own: with one, vLLM 0.32 fails on a CPU once a prompt takes more than one chunk.
            params = SamplingParams(
                n=order["samples"],
                temperature=1.0,
                max_tokens=order["tokens"],
                ignore_eos=True,
                detokenize=False,
            )
            before = llm.collective_rpc("magicpig_stats") if samples_rows else []
            started = time.perf_counter()
            (output,) = llm.generate(
                [{"prompt_token_ids": order["prompt"]}], params, use_tqdm=False
            )
            seconds = time.perf_counter() - started
            after = llm.collective_rpc("magicpig_stats") if samples_rows else []
            generated = [len(one.token_ids) for one in output.outputs]
            if generated != [order["tokens"]] * order["samples"]:
                raise RuntimeError(f"{generated} tokens were generated for {order['tokens']}")
            rows = sum(rank["sampled_rows"] for rank in after)
            rows -= sum(rank["sampled_rows"] for rank in before)
            middle = sum(rank["middle_rows"] for rank in after)
            middle -= sum(rank["middle_rows"] for rank in before)
            answer(seconds=seconds, sampled_fraction=rows / middle if middle else None)


if __name__ == "__main__":
    main()
