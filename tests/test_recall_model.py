"""The closed-form recall model: always the same bytes, right at 1K-2K tokens, honest prompts."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SOURCE = Path(__file__).parents[1] / "examples" / "recall_model.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recall_model", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall_model"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


recall_model = _example()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recall_model.build(tmp_path_factory.mktemp("recall") / "model")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()


@torch.no_grad()
def _says(model: Any, tokenizer: Any, prompt: str, answer: Sequence[str]) -> tuple[str, ...]:
    """What the model says at each place of `answer`, given the prompt and the answer so far.

    Equal to `answer` exactly when greedy decoding produces `answer`; one forward pass.
    """
    ids = tokenizer(" ".join((prompt, *answer)), return_tensors="pt").input_ids
    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return tuple(tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist()))


def _files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_two_builds_are_equal_to_the_byte(model_dir: Path, tmp_path: Path) -> None:
    again = recall_model.build(tmp_path / "again")
    assert _files(again) == _files(model_dir)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= _files(again).keys()


def test_a_complete_build_is_kept_and_an_old_one_replaced(tmp_path: Path) -> None:
    out = recall_model.build(tmp_path / "model")
    files = _files(out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert recall_model.build(out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    (out / recall_model.STAMP).write_text("an older version")
    (out / "config.json").unlink()
    recall_model.build(out)
    assert _files(out) == files
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no scratch is left behind


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(recall_model, "_tokenizer", fail)  # after the weights were written
    with pytest.raises(OSError, match="disk full"):
        recall_model.build(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="no recall model"):
        recall_model.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_every_word_is_one_token_and_comes_back(tokenizer: Any) -> None:
    words = recall_model.vocabulary()
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.islower() for word in recall_model.content_words())
    text = " ".join(words)
    ids = tokenizer(text).input_ids
    assert ids == [words.index(recall_model.BOS), *range(len(words))]
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("zyzzyva").input_ids[1] == words.index(recall_model.UNK)


def test_all_embeddings_have_one_norm() -> None:
    table = recall_model.state_dict()["model.embed_tokens.weight"].float()
    # PAD is rounded to bf16, so that its square, at most NORM2 - FLAG^2, is off by 2^-8 of itself.
    torch.testing.assert_close(
        table.square().sum(1), torch.full((len(table),), 160.0), rtol=0, atol=144 / 256
    )


@pytest.mark.parametrize("num_tokens", [512, 1021, 4096])
def test_haystack(tokenizer: Any, num_tokens: int) -> None:
    haystack = recall_model.haystack(num_tokens, num_chains=8, seed=3)
    assert haystack == recall_model.haystack(num_tokens, num_chains=8, seed=3)
    assert haystack.text != recall_model.haystack(num_tokens, num_chains=8, seed=4).text
    ids = tokenizer(haystack.text).input_ids
    assert len(ids) == haystack.num_tokens == num_tokens
    counts = Counter(haystack.text.split())
    planted = [word for chain in haystack.chains for word in chain]
    assert len(planted) == 8 * 7
    assert {counts[word] for word in planted} == {1}
    for index, chain in enumerate(haystack.chains):
        place = haystack.text.split().index(chain[0])
        assert recall_model.EDGE <= place <= num_tokens - 1 - recall_model.EDGE - len(chain)
        assert f" {' '.join(chain)} " in haystack.text
        question = haystack.question(index)
        assert question.answer == chain[1:]
        assert question.prompt.startswith(haystack.text + " ")
        assert question.prompt.endswith(" " + chain[0])
        assert tokenizer(question.prompt).input_ids[:num_tokens] == ids


def test_count_prompt(tokenizer: Any) -> None:
    prompt, answer = recall_model.count_prompt(3000, seed=5)
    assert len(tokenizer(prompt).input_ids) == 3000
    content = set(recall_model.content_words())
    (top, most), (_, next_most) = Counter(w for w in prompt.split() if w in content).most_common(2)
    assert answer[-2:] == (recall_model.COUNT, top)
    assert 3 * next_most < most < 0.1 * 3000
    assert " ".join(answer[:-1]) in prompt


def test_loop_prompt(tokenizer: Any) -> None:
    loop = recall_model.loop_prompt(2500, seed=5)
    assert len(tokenizer(loop.prompt).input_ids) == 2500
    counts = Counter(loop.prompt.split())
    assert counts[loop.tally] > 0.9 * recall_model.LOOP_TALLY
    assert {counts[word] for word in loop.cycle} == {1}
    words = loop.continuation(60, tally_rounds=2)
    assert len(words) == 60
    assert loop.tally_rounds(words) == 2
    assert words.count(loop.tally) == 2
    assert words[:16] == words[16:32] == (*loop.cycle, loop.tally, recall_model.AGAIN)
    assert words[32:46] == words[46:60] == loop.cycle


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recall_model.haystack(4096, num_chains=200), "200 chains"),
        (lambda: recall_model.haystack(200, num_chains=2), "cannot hold 2 chains"),
        (lambda: recall_model.haystack(1, num_chains=0), "ask for more tokens"),
        (lambda: recall_model.loop_prompt(1000), "num_tokens is 1000"),
    ],
)
def test_impossible_prompts_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("index", range(0, 12, 2))
def test_it_recites_the_chain(model: Any, tokenizer: Any, index: int) -> None:
    prompt, answer = recall_model.haystack(1500, num_chains=12, seed=1).question(index)
    assert _says(model, tokenizer, prompt, answer) == answer


@pytest.mark.parametrize("seed", range(4))
def test_it_names_the_most_frequent_word(model: Any, tokenizer: Any, seed: int) -> None:
    prompt, answer = recall_model.count_prompt(2000, seed)
    assert _says(model, tokenizer, prompt, answer) == answer


def test_it_generates_in_fp32(model_dir: Path, tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt, answer = recall_model.count_prompt(1200, seed=2)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.eval().generate(**inputs, max_new_tokens=len(answer), do_sample=False)
    assert tokenizer.decode(tokens[0, 1200:]) == " ".join(answer)


def test_generated_words_turn_the_loop(model: Any, tokenizer: Any) -> None:
    loop = recall_model.loop_prompt(2048, seed=0)
    # Had the model always answered COUNT with the tally word, when would it first have objected?
    never = loop.continuation(600, tally_rounds=40)
    rounds = loop.tally_rounds(_says(model, tokenizer, loop.prompt, never))
    # A loud word counts exp(2.7) = 15-fold: level after 240 / 14 = 17 rounds, and the noise of the
    # keys, which weighs both, may shift that by exp(0.4) either way.
    assert 11 <= rounds <= 26
    words = loop.continuation(600, rounds)
    assert _says(model, tokenizer, loop.prompt, words) == words


def test_keys_form_a_cone_and_the_first_token_a_sink(model: Any, tokenizer: Any) -> None:
    """Layer 1, kv head 0: the needle's key is near its query once centred, and far before."""
    haystack = recall_model.haystack(2048, num_chains=30, seed=2)
    inputs = tokenizer(haystack.text, return_tensors="pt")
    captured: dict[str, torch.Tensor] = {}
    attention = model.model.layers[1].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda _, __, out, name=name: captured.__setitem__(name, out[0].float())
        )
        for name in ("q_proj", "k_proj")
    ]
    with (
        torch.no_grad()
    ):  # RoPE leaves this head's dims alone, so the projections are the final queries and keys
        model(**inputs, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    keys = captured["k_proj"][:, : recall_model.HEAD_DIM]
    queries = captured["q_proj"][:, : recall_model.HEAD_DIM]
    ids = inputs.input_ids[0].tolist()
    at = torch.tensor([ids.index(tokenizer.convert_tokens_to_ids(c[0])) for c in haystack.chains])
    cosine = torch.nn.functional.cosine_similarity
    centre = keys.mean(0)
    assert cosine(keys[1:], centre[None]).min() > 0.5  # a cone
    assert cosine(keys[:1], centre[None]).max() < -0.8  # and its opposite
    # u = P[Binomial(150, p^10) >= 2] is 0.998 at cosine 0.70 and 0.09 at 0.20.
    assert cosine(queries[at], keys[at + 1] - centre).mean() > 0.7
    assert cosine(queries[at], keys[at + 1]).mean() < 0.3


def _notes_prompt(words: Sequence[str], seed: int) -> str:
    """2,000 tokens with the notes "a b ." of consecutive `words`, the last note first."""
    rng = random.Random(seed)
    rest = [word for word in recall_model.content_words()[64:] if word not in words]
    filler = recall_model.draw_filler(rng, 1994, rest)
    notes = [(a, b, recall_model.STOP) for a, b in pairwise(words)]
    text = recall_model.plant(rng, filler, notes[::-1])
    return " ".join((*text, *recall_model.QUESTION, words[0]))


@pytest.mark.parametrize("seed", range(3))
def test_it_follows_notes(model: Any, tokenizer: Any, seed: int) -> None:
    """Each word is in two notes; only in the one that it begins does anything follow it."""
    words = random.Random(f"notes {seed}").sample(recall_model.content_words()[64:], 6)
    prompt = _notes_prompt(words, seed)
    assert _says(model, tokenizer, prompt, words[1:]) == tuple(words[1:])


def test_without_stops_notes_mislead(model: Any, tokenizer: Any) -> None:
    """Then a word is followed by the filler after its first note as well, and chance decides."""
    wrong = 0
    for seed in range(6):
        words = random.Random(f"notes {seed}").sample(recall_model.content_words()[64:], 6)
        prompt = _notes_prompt(words, seed).replace(f" {recall_model.STOP}", "")
        wrong += _says(model, tokenizer, prompt, words[1:]) != tuple(words[1:])
    assert wrong >= 3
