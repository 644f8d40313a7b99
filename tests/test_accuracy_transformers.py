"""The accuracy methods as the attention of a small random Llama with grouped queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from native_helpers import Layer, Rule, native_codes, pool
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from vllm_magicpig import _C, reference
from vllm_magicpig.accuracy.methods import METHODS, MagicPig, MethodSettings, make_method
from vllm_magicpig.accuracy.transformers_attention import (
    MethodRun,
    capture,
    generate,
    use_method,
)
from vllm_magicpig.config import MagicPigOptions

OPTIONS = MagicPigOptions(
    index="buckets", K=4, L=30, sink_tokens=2, window_tokens=16, exact_below=0, dense_layers=()
)
SMALL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.25,  # peaked attention: what is missed changes the answer
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def prompt(num_tokens: int = 600, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 101, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def answer(
    model: Any, settings: MethodSettings, num: int = 12, sparse_from: int | None = None
) -> tuple[list[int], MethodRun]:
    with use_method(model, settings) as run:
        return generate(model, prompt(), num, [], run, sparse_from), run


@pytest.mark.parametrize("sparse_from", [None, 580])
def test_exact_generates_what_sdpa_does(model: Any, sparse_from: int | None) -> None:
    expected = model.generate(
        prompt()[None], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0, 600:]
    found, run = answer(model, MethodSettings("exact", options=OPTIONS), sparse_from=sparse_from)
    assert found == expected.tolist()
    assert run.mean_fraction == 1.0
    assert model.config._attn_implementation == "sdpa"  # as before


@pytest.mark.parametrize("name", [name for name in METHODS if name != "exact"])
def test_every_method_reads_its_share_of_the_sampled_layers(model: Any, name: str) -> None:
    options = replace(OPTIONS, dense_layers=(0,))
    tokens, run = answer(model, MethodSettings(name, 0.1, options), num=5, sparse_from=590)
    assert len(tokens) == 5
    steps = run.rows_read
    # 10 tokens of the prompt and 4 of the answer; the last one is not fed.
    assert [(step.layer_index, step.num_tokens) for step in steps] == [
        (1, n) for n in range(591, 605)
    ]
    assert {len(step.rows) for step in steps} == {4}
    assert all(0 < rows <= int(0.1 * s.middle_tokens) for s in steps for rows in s.rows)
    assert 0.02 < run.mean_fraction <= 0.1


def test_only_decode_is_sparse(model: Any) -> None:
    """The first token is the dense prefill's under one protocol, the method's under the other."""
    exact, _ = answer(model, MethodSettings("exact", options=OPTIONS), num=1)
    poor = MethodSettings("streaming", 1e-9, replace(OPTIONS, sink_tokens=0, window_tokens=1))
    dense_question, run = answer(model, poor, num=1)
    assert dense_question == exact
    assert run.rows_read == []
    sparse_question, run = answer(model, poor, num=1, sparse_from=599)
    assert sparse_question != exact
    assert [step.num_tokens for step in run.rows_read] == [600, 600]


def test_an_answer_depends_on_nothing_that_came_before(model: Any) -> None:
    """Not on an earlier prompt of the run, longer or shorter, the centre of magicpig aside."""
    for name in METHODS:
        settings = MethodSettings(name, 0.05, replace(OPTIONS, center="none"))
        with use_method(model, settings) as run:
            alone = generate(model, prompt(), 6, [], run)
            for length in (700, 550):
                generate(model, prompt(length, seed=1), 3, [], run)
                assert generate(model, prompt(), 6, [], run) == alone


def test_codes_of_a_run_are_those_made_at_once(model: Any) -> None:
    """Prefill, then a token at a time; the centre is the mean key of the first prompt."""
    with use_method(model, MethodSettings("magicpig", 0.05, OPTIONS)) as run:
        tokens = generate(model, prompt(), 8, [], run, sparse_from=590)
        for layer in capture_of_answer(model, tokens):
            method = run.methods[layer.layer_index]
            assert isinstance(method, MagicPig)
            assert method.keys.center is not None
            assert method.keys.num_tokens == 607
            if layer.layer_index == 0:  # above it the keys follow from sampled attention
                center = layer.keys[:, :590].double().mean(1).float()
                torch.testing.assert_close(method.keys.center, center, rtol=0, atol=1e-6)
                seed = reference.layer_seed(0, 0)
                directions = reference.hyperplanes(32, 30, 4, seed)
                centred = layer.keys[:, :607] - method.keys.center[:, None]
                codes = reference.hash_codes(centred, directions, 4)
                # Projections within rounding of zero may differ between a batch and a single token.
                unsure = (centred.double() @ directions.double()).abs() < 1e-4
                unsure = unsure.reshape(2, 607, 30, 4).any(-1)
                same = method.keys.codes.transpose(1, 2) == codes
                assert (same | unsure).all()
                assert unsure.double().mean() < 1e-3


def capture_of_answer(model: Any, tokens: list[int]) -> list[Any]:
    return capture(model, torch.cat([prompt(), torch.tensor(tokens)]), 1)


def test_capture_gives_what_the_layers_output_is_made_of(model: Any) -> None:
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.update({index: inputs[0]})
        )
        for index, layer in enumerate(model.model.layers)
    ]
    layers = capture(model, prompt(300), decode_tokens=7)
    for hook in hooks:
        hook.remove()
    assert [layer.layer_index for layer in layers] == [0, 1]
    for layer in layers:
        assert layer.queries.shape == (7, 4, 32)
        assert layer.keys.shape == layer.values.shape == (2, 300, 32)
        assert layer.query_positions.tolist() == list(range(293, 300))
        for q, position in zip(layer.queries, layer.query_positions.tolist(), strict=True):
            end = position + 1
            keys, values = layer.keys[:, :end], layer.values[:, :end]
            out, _ = reference.exact_attention(q, keys, values, layer.scale)
            # The model's is float32: 1e-5 is 100 roundings of values of order 1.
            expected = seen[layer.layer_index][0, position].reshape(4, 32)
            torch.testing.assert_close(out.float(), expected, rtol=1e-5, atol=1e-5)
    assert [layer.layer_index for layer in capture(model, prompt(300), 1, layers=[1])] == [1]


def test_captured_rows_are_sampled_as_by_the_native_kernel(model: Any) -> None:
    """Captured q and k, one decode step: the engine's pages and lookup take the method's rows."""
    layer = capture(model, prompt(), 1, layers=[1])[0]
    for rows in (0.0, 0.02):
        settings = MethodSettings("magicpig", rows, OPTIONS)
        method = make_method(settings, 1, layer.scale)
        assert isinstance(method, MagicPig)
        _, gathered = method.attend(layer.queries[0], layer.keys, layer.values)
        pages = Layer(19, 2, num_tables=30, num_bits=4, levels=[256], head_size=32)
        pages.store_codes(range(19), 0, method.keys.codes.transpose(1, 2).int())
        query_codes = native_codes(method.keys.hash_queries(layer.queries[0]).int())
        (heads,) = _C.sample(
            pages.pages,
            pages.rule(Rule(2, 2, 16, rows)),
            pages.index,
            query_codes[None],
            np.arange(19, dtype=np.int32)[None],
            np.array([600], np.int32),
            isa=_C.resolve_isa("auto"),
            pool=pool(),
        )
        assert [len(positions) for positions, _, _ in heads] == gathered.tolist()
        assert gathered.sum() > 0


def test_sliding_window_layers_stay_dense() -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, sliding_window=64)
    mistral = MistralForCausalLM(config).eval()
    with use_method(mistral, MethodSettings("streaming", 1e-9, OPTIONS)) as run:
        found = generate(mistral, prompt(200), 5, [], run)
    expected = mistral.generate(
        prompt(200)[None], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert found == expected[0, 200:].tolist()
    assert run.rows_read == []


def test_generation_ends_at_a_stop_token(model: Any) -> None:
    settings = MethodSettings("exact", options=OPTIONS)
    with use_method(model, settings) as run:
        free = generate(model, prompt(), 6, [], run)
        assert generate(model, prompt(), 6, [free[2]], run) == free[: free.index(free[2]) + 1]
        assert generate(model, prompt(), 0, [], run) == []


def test_what_is_unsupported_is_refused_in_a_sentence(model: Any) -> None:
    settings = MethodSettings("exact", options=OPTIONS)
    with use_method(model, settings) as run:
        for wrong in (0, 601):
            with pytest.raises(ValueError, match=f"sparse_from is {wrong}, but must be None or 1"):
                generate(model, prompt(), 2, [], run, sparse_from=wrong)
        with pytest.raises(ValueError, match="batch size is 2"):
            model(prompt().repeat(2, 1))
    t5 = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    bert = BertConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    for other in (T5ForConditionalGeneration(t5), BertModel(bert)):
        name = type(other).__name__
        with (
            pytest.raises(ValueError, match=f"{name} is not supported.*choose another model"),
            use_method(other, settings),
        ):
            pass
