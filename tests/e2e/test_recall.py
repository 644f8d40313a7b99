"""Sampled decode through the engine, on the built-in model whose right answers are known.

One engine per backend and setting answers everything; the tests look at what it said. Words after
the first are scored: the first comes from the dense prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recall_model
from engines import engine, greedy
from vllm import LLM

from vllm_magicpig import _C
from vllm_magicpig.host_layer import HostLayer

CHAIN_LENGTHS = (8192, 16384)
NUM_QUESTIONS = 30
COUNT_LENGTH, NUM_COUNTS = 8192, 6
LOOP_PROMPT, LOOP_TOKENS = 4200, 2000  # after the first segment of 4,096, two of output follow
SERVE = {"max_model_len": 17_000, "max_num_batched_tokens": 4096, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Answers:
    chain_scores: dict[int, float]  # share of words 2 to 6 that are right, per context length
    counts_right: int
    loop: tuple[str, ...]
    stats: dict[str, dict[str, Any]]  # magicpig_stats after each stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recall_model.build(tmp_path_factory.mktemp("models") / "recall")


def _say(llm: LLM, prompts: list[str], num_words: int) -> list[tuple[str, ...]]:
    outputs = llm.generate(prompts, greedy(num_words), use_tqdm=False)
    return [tuple(output.outputs[0].text.split()) for output in outputs]


def _drain(worker: Any) -> None:
    if worker._builder is not None:
        worker._builder.drain()


def _chain_score(llm: LLM, length: int, is_sampled: bool) -> float:
    """The first question alone, so that the others find the haystack in the prefix cache, and its
    segments in the index."""
    haystack = recall_model.haystack(length, num_chains=NUM_QUESTIONS, seed=length)
    questions = [haystack.question(i) for i in range(NUM_QUESTIONS)]
    prompts = [question.prompt for question in questions]
    said = _say(llm, prompts[:1], 6)
    if is_sampled:
        llm.collective_rpc(_drain)
    said += _say(llm, prompts[1:], 6)
    right = [
        word == expected
        for words, question in zip(said, questions, strict=True)
        for word, expected in zip(words[1:], question.answer[1:], strict=True)
    ]
    return sum(right) / len(right)


def _counts_right(llm: LLM) -> int:
    questions = [recall_model.count_prompt(COUNT_LENGTH, seed=seed) for seed in range(NUM_COUNTS)]
    said = [_say(llm, [question.prompt], len(question.answer))[0] for question in questions]
    return sum(
        words[-1] == question.answer[-1] for words, question in zip(said, questions, strict=True)
    )


def _answer(
    model: Path,
    backend: str,
    stages: str,
    options: dict[str, Any] | None,
    lengths: tuple[int, ...] = CHAIN_LENGTHS,
) -> Answers:
    """stages: any of "chains", "counts" and "loop"."""
    stats: dict[str, dict[str, Any]] = {}
    scores: dict[int, float] = {}
    counts, loop = 0, ()
    with engine(model, backend, options, **SERVE) as llm:

        def note(stage: str) -> None:
            if options is not None:
                llm.collective_rpc(_drain)
                stats[stage] = llm.collective_rpc("magicpig_stats")[0]

        note("start")
        if "chains" in stages:
            for length in lengths:
                scores[length] = _chain_score(llm, length, options is not None)
                note(f"chains {length}")
        if "counts" in stages:
            counts = _counts_right(llm)
            note("counts")
        if "loop" in stages:
            prompt = recall_model.loop_prompt(LOOP_PROMPT, seed=1).prompt
            loop = _say(llm, [prompt], LOOP_TOKENS)[0]
            note("loop")
    return Answers(scores, counts, loop, stats)


@pytest.fixture(scope="module")
def dense(model: Path) -> Answers:
    return _answer(model, "CPU_ATTN", "chains counts", None)


class SampleSpy:
    """Looks up, now and then during a generation, which positions the decode step sampled."""

    def __init__(self, every: int) -> None:
        self._every, self._calls = every, 0
        self.positions: list[
            tuple[int, np.ndarray]
        ] = []  # (context length, positions of all heads)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = HostLayer.forward

        def forward(
            layer: HostLayer, query: Any, key: Any, value: Any, output: Any, step: Any
        ) -> None:
            original(layer, query, key, value, output, step)
            index, rows = layer.index, step.decode_rows
            if len(rows) != 1 or step.is_dummy or index is None or index.center.value is None:
                return
            self._calls += 1
            if self._calls % self._every == 0:
                codes = index.projection.hash_queries(query[step.decode_tokens].float())
                heads = _C.sample(
                    *(index.pages, index.rule, index.native, codes),
                    *(step.block_tables[rows], step.seq_lens[rows]),
                    isa=_C.resolve_isa("auto"),
                    pool=layer.pool,
                )[0]
                positions = np.concatenate([found for found, _, _ in heads])
                self.positions.append((int(step.seq_lens[rows[0]]), positions))

        monkeypatch.setattr(HostLayer, "forward", forward)


@pytest.fixture(scope="module")
def spy() -> SampleSpy:
    return SampleSpy(every=25)


@pytest.fixture(scope="module")
def sampled(model: Path, spy: SampleSpy) -> Iterator[Answers]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy.install(monkeypatch)
        yield _answer(
            model, "magicpig", "chains counts loop", {"index": "buckets", "K": 10, "L": 150}
        )


@pytest.fixture(scope="module")
def signed(model: Path) -> Answers:
    return _answer(model, "magicpig", "chains counts", {"index": "signatures"}, CHAIN_LENGTHS[-1:])


@pytest.fixture(scope="module")
def uncentred(model: Path) -> Answers:
    return _answer(
        model,
        "magicpig",
        "chains",
        {"index": "buckets", "K": 10, "L": 150, "center": "none"},
        CHAIN_LENGTHS[:1],
    )


# One more engine in each of the first tests, as each has its own limit of time.


def test_the_model_knows_the_answers(dense: Answers) -> None:
    assert min(dense.chain_scores.values()) >= 0.95
    assert dense.counts_right >= NUM_COUNTS - 1


@pytest.mark.parametrize("length", CHAIN_LENGTHS)
def test_chains_are_recited_as_with_dense_attention(
    dense: Answers, sampled: Answers, length: int
) -> None:
    print(f"{length} tokens: dense {dense.chain_scores[length]:.3f}, "
          f"buckets {sampled.chain_scores[length]:.3f}")  # fmt: skip
    assert sampled.chain_scores[length] >= 0.98 * dense.chain_scores[length]


def test_signatures_recite_chains_as_dense_attention_does(dense: Answers, signed: Answers) -> None:
    length = CHAIN_LENGTHS[-1]
    print(f"{length} tokens: signatures {signed.chain_scores[length]:.3f}")
    assert signed.chain_scores[length] >= dense.chain_scores[length]


def test_without_centring_recall_breaks(dense: Answers, uncentred: Answers) -> None:
    length = CHAIN_LENGTHS[0]
    print(f"{length} tokens: uncentred {uncentred.chain_scores[length]:.3f}")
    assert uncentred.chain_scores[length] < 0.5 * dense.chain_scores[length]


def test_the_most_frequent_word_is_named_as_often(
    dense: Answers, sampled: Answers, signed: Answers
) -> None:
    print(f"of {NUM_COUNTS}: dense {dense.counts_right}, buckets {sampled.counts_right}, "
          f"signatures {signed.counts_right}")  # fmt: skip
    assert sampled.counts_right >= dense.counts_right
    assert signed.counts_right >= dense.counts_right


def test_only_a_few_rows_are_read(sampled: Answers, signed: Answers) -> None:
    stage = f"chains {CHAIN_LENGTHS[-1]}"
    assert 0 < sampled.stats[stage]["sampled_fraction"] < 0.05
    # of the whole group, and at most 3 % from the budget
    assert abs(signed.stats[stage]["sampled_fraction"] / 0.02 - 1) < 0.03


def test_signatures_take_their_planned_bytes(signed: Answers) -> None:
    """Beside each page of 2 kv heads: at head size 128, 36.5 bytes a token and kv head."""
    stats = signed.stats["counts"]
    rows, signatures = stats["page_bytes"], stats["index_bytes"]
    assert rows > 0
    assert signatures / rows == pytest.approx(36.5 / 512, rel=1e-6)


def test_a_shared_prefix_is_indexed_once(sampled: Answers) -> None:
    """30 questions share 8,192 tokens: their segment is found 29 times and not built again.

    The first 4,096 get one of their own while the rest is prefilled, if the builder is that quick.
    """
    stats = sampled.stats[f"chains {CHAIN_LENGTHS[0]}"]
    assert stats["segments_built"] in (1, 2)
    assert stats["segments_reused"] == NUM_QUESTIONS - 1
    assert stats["builds_refused"] == 0


def test_generation_keeps_sampling_its_own_output(sampled: Answers, spy: SampleSpy) -> None:
    """The index grows over generated tokens, and tokens generated early are found late."""
    built = sampled.stats["loop"]["segments_built"] - sampled.stats["counts"]["segments_built"]
    assert built == 3, "4,096 tokens of the prompt, then 1,024 and 2,048, nearly all of them output"
    # Looked at with the third segment sealed, and where those tokens still are the unsealed tail.
    late = [positions for length, positions in spy.positions if length > LOOP_PROMPT + 1500]
    assert any(length >= 6 * 1024 for length, _ in spy.positions)
    early_output = range(LOOP_PROMPT, LOOP_PROMPT + 500)
    found = sum(np.isin(positions, early_output).sum() for positions in late)
    assert found > 0
    # And the answer depends on them: the loud word outweighs the prompt's most frequent one only
    # once the counting heads see how often it was generated (recall_model.Loop). How many rounds
    # that takes varies with the sample; never is what a server does that cannot see its output.
    task = recall_model.loop_prompt(LOOP_PROMPT, seed=1)
    rounds = task.tally_rounds(sampled.loop)
    print(f"rounds before the answer changes: {rounds}; rows of early output found late: {found}")
    assert len(sampled.loop) == LOOP_TOKENS
    assert sampled.loop == task.continuation(LOOP_TOKENS, rounds)
    assert 0 < rounds < 60
