"""Nothing that a request brings changes what another one is answered by more than rounding.

One engine per path: a good prompt on the fresh server, then after and beside requests of equal tokens,
of random ids, and of a token whose embedding is infinite, so that its keys and values are not numbers.
The prefix cache is off: each time the prompt is prefilled anew, into blocks that the others have left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine, generate, greedy
from fake_device_worker import ON_FAKE_DEVICE
from parity import SERVE, prompts, tokens
from random_models import write_random_model
from safetensors.torch import load_file, save_file
from vllm.outputs import RequestOutput

INFINITE = 2
"""Token id of the padding, which neither the prompts nor the passage at start-up have."""
OPTIONS: dict[str, Any] = {
    "dense_layers": [0],
    "index": "buckets",
    "K": 7,
    "L": 60,
    "exact_below": 512,
}


def model_with_an_infinite_token(folder: Path) -> Path:
    write_random_model("llama", folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][INFINITE] = torch.inf
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("path", ["CPU platform", "device path"])
def test_bad_requests_change_no_other_answer(path: str, tmp_path: Path) -> None:
    model = model_with_an_infinite_token(tmp_path / "llama")
    arguments: dict[str, Any] = {"dtype": "float32", "enable_prefix_caching": False}
    options = dict(OPTIONS)
    if path == "device path":
        arguments |= ON_FAKE_DEVICE
        options["host_kv_cache_gib"] = 1
    (good,) = prompts([3000], seed=6)
    infinite = list(good[:2000])
    infinite[700::50] = [INFINITE] * len(infinite[700::50])
    spoilers = [[5] * 700, prompts([900], seed=7)[0], [INFINITE] * 700, infinite]
    params = greedy(24, detokenize=False, logprobs=5)
    with engine(model, "magicpig", options, **SERVE | arguments) as llm:
        start = llm.collective_rpc("magicpig_stats")[0]
        (alone,) = generate(llm, [good], params)
        sampled = llm.collective_rpc("magicpig_stats")[0]
        spoiled = [generate(llm, [spoiler], params)[0] for spoiler in spoilers]
        (after,) = generate(llm, [good], params)
        beside = generate(llm, [good, *spoilers], params)[0]
        (last,) = generate(llm, [good], params)
    assert (start["key_centers"], start["page_tokens"], start["decode_steps"]) == (2, 0, 0)
    assert sampled["sampled_heads"] > 0
    assert len(set(tokens(alone))) > 5
    assert not logprobs(spoiled[-1]).isfinite().all(), "that request does get numbers that are none"
    for output in (after, last):
        assert tokens(output) == tokens(alone)
        # The same steps over the same rows: nothing is left to round another way.
        assert torch.equal(logprobs(output), logprobs(alone))
    assert tokens(beside) == tokens(alone)
    # Here products of other sizes round otherwise, as errors of 10 * 2**-24 * sqrt(operations), and a
    # code whose projection is that close to zero puts another token into the sample.
    assert (logprobs(beside) - logprobs(alone)).abs().max() < 0.02


def logprobs(output: RequestOutput) -> torch.Tensor:
    """Of the tokens said: [num_tokens]."""
    given = output.outputs[0].logprobs
    assert given is not None
    said = zip(given, tokens(output), strict=True)
    return torch.tensor([step[token].logprob for step, token in said])
