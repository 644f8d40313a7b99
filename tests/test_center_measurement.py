"""Key centres at start-up over a runner that stands for vLLM's: which steps it gets, what the centres
are of, and what is said where they are not to be trusted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_magicpig import center_measurement
from vllm_magicpig.backend import MagicPigImpl
from vllm_magicpig.center_measurement import REQUEST_ID, measure_centers
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.passage import PASSAGE_TOKENS, make_passage

VOCAB_SIZE, KV_HEADS, HEAD_SIZE = 500, 2, 16


class WordTokenizer:
    """An id for each word, `num_words` of them; others are unknown and have id 0."""

    all_special_ids = (0, 1, 2)

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words

    def encode(self, text: str) -> list[int]:
        ids: dict[str, int] = {}
        for word in text.split():
            ids.setdefault(word, 3 + len(ids))
        words = (ids[word] for word in text.split())
        return [i if i < 3 + self._num_words else 0 for i in words]


class Runner:
    """Layers whose keys are rows of an embedding; it keeps requests as vLLM's runners do."""

    def __init__(self, num_layers: int = 2, source: str = "passage") -> None:
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(
            num_layers, VOCAB_SIZE, KV_HEADS, HEAD_SIZE, generator=generator
        )
        self.impls = []
        for index in range(num_layers):
            impl = MagicPigImpl.__new__(MagicPigImpl)  # its __init__ asks vLLM's configuration
            impl.layer_index, impl.head_size = index, HEAD_SIZE
            impl.center = KeyCenter(source, index, 0, KV_HEADS)
            impl.center.prepare(HEAD_SIZE)
            impl.sampled = SimpleNamespace(  # type: ignore[assignment]
                forward=lambda *tensors: None, take_center=self.note_center
            )
            self.impls.append(impl)
        self.requests: dict[str, tuple[list[int], int]] = {}
        self.steps: list[SchedulerOutput] = []
        self.centers_taken = 0

    def note_center(self) -> None:
        self.centers_taken += 1

    def run_step(self, step: SchedulerOutput) -> None:
        self.steps.append(step)
        for request_id in step.finished_req_ids:
            del self.requests[request_id]
        for request in step.scheduled_new_reqs:
            assert request.prompt_token_ids == request.prefill_token_ids
            self.requests[request.req_id] = (request.prompt_token_ids or [], 0)
        for request_id, computed in zip(
            step.scheduled_cached_reqs.req_ids,
            step.scheduled_cached_reqs.num_computed_tokens,
            strict=True,
        ):
            assert self.requests[request_id][1] == computed
        for request_id, count in step.num_scheduled_tokens.items():
            token_ids, computed = self.requests[request_id]
            self.requests[request_id] = (token_ids, computed + count)
            self.forward(token_ids[computed : computed + count])

    def forward(self, token_ids: list[int]) -> None:
        padding = [0] * 3
        for impl, embedding in zip(self.impls, self.embeddings, strict=True):
            key = embedding[token_ids + padding]
            impl.forward(
                None, key, key, key, torch.empty(0), SimpleNamespace(num_tokens=len(token_ids)), key
            )

    @property
    def token_ids(self) -> list[int]:
        return self.steps[0].scheduled_new_reqs[0].prompt_token_ids or []


def measure(
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Any = None,
    *,
    max_model_len: int = 4096,
    max_tokens: int = 2048,
    num_blocks: int = 200,
    block_sizes: tuple[int, ...] = (32,),
    runner_type: str = "generate",
) -> None:
    monkeypatch.setattr(center_measurement, "cached_tokenizer_from_config", lambda _: tokenizer)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=max_model_len,
            runner_type=runner_type,
            get_vocab_size=lambda: VOCAB_SIZE,
            hf_text_config=SimpleNamespace(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None),
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=max_tokens),
    )
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=n)) for n in block_sizes]
    kv_cache = SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups)
    measure_centers(runner.impls, config, kv_cache, runner.run_step)


class Log:
    """Stands for the logger."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str, *values: Any) -> None:
        self.infos.append(message % values)

    def warning(self, message: str, *values: Any) -> None:
        self.warnings.append(message % values)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(center_measurement, "logger", log)
    return log


@pytest.mark.parametrize("max_tokens", [2048, 100, 511])
def test_a_centre_is_the_mean_key_of_the_passage(
    max_tokens: int, monkeypatch: pytest.MonkeyPatch, logged: Log
) -> None:
    """Whatever the chunks, the padding of a step and the steps of others before and after."""
    runner = Runner()
    runner.forward([7] * 600)
    measure(runner, monkeypatch, WordTokenizer(400), max_tokens=max_tokens)
    runner.forward([7] * 600)
    assert len(runner.token_ids) == PASSAGE_TOKENS
    assert len(set(runner.token_ids)) > 200
    for impl, embedding in zip(runner.impls, runner.embeddings, strict=True):
        assert impl.center is not None
        mean = embedding[runner.token_ids].double().mean(0).float()
        torch.testing.assert_close(impl.center.value, mean, rtol=0, atol=1e-6)
    assert runner.centers_taken == 2
    assert runner.requests == {}, "the runner has forgotten the passage"
    assert [max(s.num_scheduled_tokens.values(), default=0) for s in runner.steps] == [
        *[max_tokens] * (PASSAGE_TOKENS // max_tokens),
        *[PASSAGE_TOKENS % max_tokens] * (PASSAGE_TOKENS % max_tokens > 0),
        0,
    ]
    assert len(logged.infos) == 1
    told = f"key centres of 2 layers measured over {PASSAGE_TOKENS} tokens of text in "
    assert told in logged.infos[0]
    assert logged.warnings == []


def test_groups_share_the_pool_and_its_null_block_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Runner()
    measure(runner, monkeypatch, WordTokenizer(400), block_sizes=(32, 128), max_tokens=300)
    blocks = runner.steps[0].scheduled_new_reqs[0].block_ids
    many, few = PASSAGE_TOKENS // 32, PASSAGE_TOKENS // 128
    assert blocks == (list(range(1, 1 + many)), list(range(1 + many, 1 + many + few)))
    assert runner.steps[1].scheduled_cached_reqs.new_block_ids == [None]


@pytest.mark.parametrize(
    ("limit", "num_tokens"),
    [({"max_model_len": 200}, 199), ({"num_blocks": 7}, 6 * 32), ({"num_blocks": 33}, 32 * 32)],
)
def test_the_passage_is_as_long_as_fits(
    limit: dict[str, int], num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner()
    measure(runner, monkeypatch, WordTokenizer(400), **limit)  # type: ignore[arg-type]
    assert len(runner.token_ids) == num_tokens
    assert all(impl.is_centred for impl in runner.impls)


@pytest.mark.parametrize("num_words", [None, 0, 150])
def test_where_the_text_cannot_be_read_random_tokens_give_the_centre_and_it_is_said(
    num_words: int | None, monkeypatch: pytest.MonkeyPatch, logged: Log
) -> None:
    runner = Runner()
    tokenizer = None if num_words is None else WordTokenizer(num_words)
    measure(runner, monkeypatch, tokenizer)
    assert len(set(runner.token_ids)) > 250
    special = {1, 2, 3} if tokenizer is None else {0, 1, 2}
    assert special.isdisjoint(runner.token_ids)
    assert all(impl.is_centred for impl in runner.impls)
    assert len(logged.warnings) == 1
    assert "means over random tokens" in logged.warnings[0]
    assert "`vllm-magicpig tune`" in logged.warnings[0]
    again = Runner()
    measure(again, monkeypatch, tokenizer)
    assert again.token_ids == runner.token_ids, "every rank runs the same"


def test_a_layer_whose_keys_are_not_finite_goes_without_and_is_named(
    monkeypatch: pytest.MonkeyPatch, logged: Log
) -> None:
    runner = Runner(num_layers=3)
    runner.embeddings[1, 40] = torch.inf
    measure(runner, monkeypatch, WordTokenizer(400))
    assert 40 in runner.token_ids
    assert [impl.is_centred for impl in runner.impls] == [True, False, True]
    assert runner.centers_taken == 3, "all layers sample"
    (warning,) = logged.warnings
    assert f"the keys of layers 1 are not finite over {PASSAGE_TOKENS} tokens of text" in warning
    assert "`vllm-magicpig tune`" in warning


def test_a_model_that_generates_nothing_runs_no_passage(
    monkeypatch: pytest.MonkeyPatch, logged: Log
) -> None:
    runner = Runner()
    measure(runner, monkeypatch, WordTokenizer(400), runner_type="pooling")
    assert runner.steps == []
    assert not any(impl.needs_center for impl in runner.impls)
    assert logged.infos == logged.warnings == []


def test_centres_that_are_known_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of "none" and of a file; and those measured, as after a reload of weights."""
    runner = Runner(source="none")
    measure(runner, monkeypatch, WordTokenizer(400))
    assert runner.steps == []
    runner = Runner()
    measure(runner, monkeypatch, WordTokenizer(400))
    num_steps = len(runner.steps)
    measure(runner, monkeypatch, WordTokenizer(400))
    assert len(runner.steps) == num_steps
    assert runner.steps[0].scheduled_new_reqs[0].req_id == REQUEST_ID


def test_ids_beyond_the_models_vocabulary_are_left_out() -> None:
    passage = make_passage(WordTokenizer(400), 100, (), 90)
    assert passage.is_text
    assert max(passage.token_ids) < 100
