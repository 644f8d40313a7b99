"""Llama-4's chunks of local attention stay dense in vLLM's wrapper, beside a global layer of ours.

The truth is the model in transformers: vLLM's own backend needs no second engine to be compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine, generate, greedy
from fake_device_worker import ON_FAKE_DEVICE
from parity import prompts, tokens
from random_models import write_random_model
from transformers import AutoModelForCausalLM

LENGTHS = [5, 128, 300, 1100]
"""Below a chunk of 64 tokens, two chunks, one begun and, in steps of 512 tokens, many."""
NUM_TOKENS = 4

EXACT: dict[str, Any] = {"K": 0, "dense_layers": []}
SERVE: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 1200,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model("llama4", tmp_path_factory.mktemp("llama4"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    continuations = []
    for prompt in prompts(LENGTHS, seed=1):
        out = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        continuations.append(out[0, len(prompt) :].tolist())
    return continuations


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        pytest.param(EXACT, {}, id="cpu platform"),
        pytest.param(EXACT | {"host_kv_cache_gib": 1}, ON_FAKE_DEVICE, id="device path"),
    ],
)
def test_answers_are_those_of_transformers(
    model: Path, expected: list[list[int]], options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    with engine(model, "magicpig", options, block_size=32, **SERVE, **arguments) as llm:
        params = greedy(NUM_TOKENS, detokenize=False)
        outputs = generate(llm, prompts(LENGTHS, seed=1), params)
        (stats,) = llm.collective_rpc("magicpig_stats")
    assert (stats["sampled_layers"], stats["dense_layers"]) == (1, 3)
    assert [tokens(output) for output in outputs] == expected


def test_blocks_that_chunks_cannot_end_in_are_refused(model: Path) -> None:
    """By vLLM only at the first request, and by an assertion."""
    sentence = "attention chunks of 64 tokens with block size 128, .* pass --block-size 64"
    with pytest.raises(ValueError, match=sentence), engine(model, "magicpig", EXACT, **SERVE):
        pass
