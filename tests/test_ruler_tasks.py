"""RULER's generators: one sample per seed, as long as asked, with the answer in it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import recall_model
import ruler_recall
import ruler_tasks
from ruler_helpers import CHAT_TEMPLATE, bpe_tokenizer
from ruler_prompt import PromptFormat
from ruler_sample import Sample, largest_fitting

QA = tuple(
    ruler_tasks.QaEntry(f"Who built house {i}?", f"House {i} was built by Person {i}.", (f"P{i}",))
    for i in range(6)
)
FAMILIES = ruler_tasks.families(QA)
LENGTHS = (1024, 4096)


@pytest.fixture(scope="module")
def form() -> PromptFormat:
    return PromptFormat(bpe_tokenizer())


@pytest.fixture(scope="module")
def recall_form(tmp_path_factory: pytest.TempPathFactory) -> PromptFormat:
    from transformers import AutoTokenizer

    model = recall_model.build(tmp_path_factory.mktemp("ruler") / "recall")
    return PromptFormat(AutoTokenizer.from_pretrained(model))


def _sample(form: PromptFormat, name: str, length: int, index: int = 0, seed: int = 0) -> Sample:
    return ruler_tasks.generate(FAMILIES[name], name, length, index, seed, form)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_seed_makes_one_sample(form: PromptFormat, name: str) -> None:
    sample = _sample(form, name, 1024)
    assert sample == _sample(form, name, 1024)
    assert len({sample, _sample(form, name, 1024, seed=1), _sample(form, name, 1024, index=1)}) == 3


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FAMILIES)
def test_length_is_the_largest_that_fits(form: PromptFormat, name: str, length: int) -> None:
    sample = _sample(form, name, length)
    tokens = form.count_tokens(sample.context, sample.question) + sample.max_tokens
    # One more unit would not have fitted: no unit of any family takes more than 90 of these tokens,
    # and an added word of `fwe` may make its neighbours more frequent too.
    assert length - 90 <= tokens <= length


@pytest.mark.parametrize("name", FAMILIES)
def test_the_context_holds_the_answer_and_the_question_does_not(
    form: PromptFormat, name: str
) -> None:
    sample = _sample(form, name, 2048, index=3)
    if name == "qa":
        (wanted,) = (entry for entry in QA if entry.answers == sample.references)
        assert sample.context.count(wanted.context) == 1
        assert wanted.question in sample.question
        return
    for reference in sample.references:
        assert reference in sample.context
        assert reference not in sample.question
    # The first generated token is that of a list, not of an answer.
    assert sample.question.endswith("after a dash:\n")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("niah")])
def test_needles(form: PromptFormat, name: str) -> None:
    sample = _sample(form, name, 4096)
    needles = dict(re.findall(r"([0-9a-f-]{36}|\d{7})()\.", sample.context))
    asked = 4 if name in ("niah_multivalue", "niah_multiquery") else 1
    hidden = 4 if name in ("niah_multikey_1", "niah_multivalue", "niah_multiquery") else 1
    assert len(sample.references) == asked
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert len(needles) > 20
    else:
        assert len(needles) == hidden
    for value in sample.references:
        (key,) = re.findall(rf"for ([\w-]+) is: {value}\.", sample.context)
        assert key in sample.question


def test_variables_lead_to_the_value(form: PromptFormat) -> None:
    sample = _sample(form, "vt", 2048)
    (value,) = re.findall(r"with the value (\d+), each", sample.question)
    assigned = dict(re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", sample.context))
    assert set(assigned) == set(sample.references)
    for name in sample.references:
        while name in assigned:
            name = assigned[name]
        assert name == value


@pytest.mark.parametrize("length", LENGTHS)
def test_common_words_are_the_most_common(form: PromptFormat, length: int) -> None:
    sample = _sample(form, "cwe", length)
    listed = re.findall(r"\d+\. ([a-z-]+)", sample.context)
    times = Counter(listed)
    top = times.most_common(ruler_tasks.CWE_COMMON)
    assert {word for word, _ in top} == set(sample.references)
    assert min(n for _, n in top) >= 6 * max(n for w, n in times.items() if w not in dict(top))


def test_frequent_words_follow_zipf(form: PromptFormat) -> None:
    sample = _sample(form, "fwe", 4096)
    times = Counter(sample.context.split("\n\n")[1].split())
    (a, n), (b, m), (c, k), (_, rest) = times.most_common(4)
    assert (a, b, c) == sample.references
    assert k > rest
    assert n / m == pytest.approx(4, rel=0.05)  # rank ** -2; counts of hundreds are whole numbers
    assert n / k == pytest.approx(9, rel=0.05)


def test_too_short_a_length_gets_one_sentence(form: PromptFormat) -> None:
    with pytest.raises(ValueError, match=r"length 100 cannot hold a sample of vt.* takes \d+ tok"):
        _sample(form, "vt", 100)


@pytest.mark.parametrize("last", [1, 2, 3, 7, 64, 65])
def test_largest_fitting(last: int) -> None:
    assert largest_fitting(lambda n: n <= last, 1) == last
    assert largest_fitting(lambda n: n <= last, last + 1) is None


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_the_prompt_is_parted_where_the_question_begins(chat_template: str | None) -> None:
    form = PromptFormat(bpe_tokenizer(chat_template), is_chat=chat_template is not None)
    sample = _sample(form, "niah_single_2", 1024)
    request = form.request(sample.context, sample.question, sample.max_tokens)
    ids = list(request.token_ids)
    assert len(ids) == form.count_tokens(sample.context, sample.question)
    assert ids.count(0) == 1  # one <s>, whoever added it
    context, question = (
        form.tokenizer.decode(part)
        for part in (ids[: request.question_start], ids[request.question_start :])
    )
    asked, _, reply = sample.question.rstrip("\n").rpartition("\n")
    if form.is_chat:
        assert context == "<s><user>" + sample.context
        assert question == f"{asked}</s><model>{reply}\n"
    else:
        assert (context, question) == ("<s>" + sample.context, sample.question)


def test_an_answer_is_parted_after_its_first_token(form: PromptFormat) -> None:
    ids = form.tokenizer.encode("- 1234567", add_special_tokens=False)
    first, rest = form.split_answer(ids)
    assert (first, first + rest) == ("-", "- 1234567")
    assert form.split_answer([]) == ("", "")


def test_chat_needs_a_template() -> None:
    with pytest.raises(ValueError, match="has no chat template; leave it out"):
        PromptFormat(bpe_tokenizer(), is_chat=True)


# ----------------------------------------------------------------------------- the built-in model's


@pytest.mark.parametrize("name", ruler_recall.RECALL_TASKS)
def test_recall_samples(recall_form: PromptFormat, name: str) -> None:
    for length in (2048, 3001):
        for index in (0, 6):
            sample = ruler_recall.generate(name, length, index, seed=1)
            assert sample == ruler_recall.generate(name, length, index, seed=1)
            assert sample != ruler_recall.generate(name, length, index, seed=2)
            request = recall_form.request(sample.context, sample.question, sample.max_tokens)
            assert len(request.token_ids) + sample.max_tokens == length
            start = request.question_start
            assert recall_form.tokenizer.decode(request.token_ids[start:]).split()[0] == "now"
            assert recall_model.UNK not in recall_form.tokenizer.decode(request.token_ids)
            assert set(sample.references) <= set(sample.context.split())


def test_samples_share_a_haystack() -> None:
    """So that a prefix cache prefills it once; the questions are different ones."""
    for name in ("recall_multikey", "recall_multiquery", "recall_vt"):
        samples = [ruler_recall.generate(name, 2048, index, seed=0) for index in (0, 1, 5)]
        assert samples[0].context == samples[1].context != samples[2].context
        assert samples[0].question != samples[1].question


def test_notes_of_a_trail_lie_apart() -> None:
    sample = ruler_recall.generate("recall_vt", 4096, 0, seed=0)
    words = sample.context.split()
    trail = [sample.question.split()[-1], *_whole_answer(sample)]
    assert len(trail) == ruler_recall.VT_HOPS + 1
    places = []
    for first, second in pairwise(trail):
        (place,) = (i for i, pair in enumerate(pairwise(words))
                    if pair == (first, second))  # fmt: skip
        assert words[place + 2] == recall_model.STOP
        places.append(place)
    assert places != sorted(places)  # not in the order in which they are read
    counts = Counter(words)
    assert [counts[word] for word in trail] == [1, *[2] * (ruler_recall.VT_HOPS - 1), 1]


def _whole_answer(sample: Sample) -> list[str]:
    """With its first word, which is no reference: that of the note that begins with the key."""
    words = sample.context.split()
    key = sample.question.split()[-1]
    return [words[words.index(key) + 1], *sample.references]


def test_a_loud_word_is_rare(recall_form: PromptFormat) -> None:
    sample = ruler_recall.generate("recall_fwe_loud", 8192, 2, seed=0)
    counts = Counter(sample.context.split())
    (top,) = sample.references
    ((loud, times),) = [
        (word, counts[word]) for word in recall_model.loud_words() if counts[word] > 0
    ]
    assert loud != top
    assert 40 < counts[top] / times < 50
    content = {w: n for w, n in counts.items() if w in set(recall_model.content_words())}
    assert max(content, key=lambda word: content[word]) == top


def test_too_short_a_recall_length_gets_one_sentence() -> None:
    for name in ruler_recall.RECALL_TASKS:
        with pytest.raises(ValueError, match=f"length 64 cannot hold a sample of {name} "):
            ruler_recall.generate(name, 64, 0, seed=0)


def test_sources_of_the_samples_are_there() -> None:
    import ruler

    for name in (*ruler.RECALL_SOURCES, *ruler.TEXT_SOURCES):
        assert (Path(ruler.__file__).parent / name).is_file()
