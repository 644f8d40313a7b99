"""Offline generation with magicpig: one batch of prompts from 512 to 8,000 tokens.

    python examples/offline_generate.py [--model NAME]

Without --model it uses the built-in recall model, whose prompts end in a question with a known
answer, and prints whether each answer is right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import recall_model
from passage import passage_questions
from vllm import LLM, SamplingParams

LENGTHS = (512, 1024, 3000, 8000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="Hugging Face name or local folder; default: built-in model"
    )
    model = parser.parse_args().model or str(recall_model.build(Path(".models") / "recall"))

    llm = LLM(
        model,
        attention_backend="magicpig",
        additional_config={"magicpig": {"index": "buckets", "K": 10, "L": 150}},
        max_model_len=max(LENGTHS) + 512,
        kv_cache_memory_bytes=2 << 30,
        enforce_eager=True,
    )
    if Path(model).name == "recall":
        questions = [recall_model.haystack(n, num_chains=2, seed=n).question(0) for n in LENGTHS]
        prompts = [(question.prompt, tuple(question.answer)) for question in questions]
    else:
        prompts = [passage_questions(llm.get_tokenizer(), length) for length in LENGTHS]

    params = SamplingParams(temperature=0, max_tokens=max(len(words) for _, words in prompts))
    outputs = llm.generate([prompt for prompt, _ in prompts], params)
    for output, (_, words) in zip(outputs, prompts, strict=True):
        text = output.outputs[0].text.strip()
        verdict = "right" if text.split() == list(words) else f"expected {' '.join(words)!r}"
        print(f"{len(output.prompt_token_ids or []):>6} tokens -> {text!r} ({verdict})")
    for rank, stats in enumerate(llm.collective_rpc("magicpig_stats")):
        print(
            f"rank {rank}: {stats['sampled_rows_mean']:.0f} rows per query head, "
            f"{100 * stats['sampled_fraction']:.2f} % of the middle, index "
            f"{stats['index_bytes'] / 2**20:.1f} MiB"
        )


if __name__ == "__main__":
    main()
