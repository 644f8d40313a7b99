"""RULER's task families for any model and its tokenizer, written from the paper's description.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv 2404.06654, section 3 and appendix B. The texts are our own. A sample follows from (task,
length, index, seed) and the tokenizer alone; its haystack is as long as the length allows.

Every prompt ends where the answer's list of items begins ("...as a list:" and a new line), so that
the first generated token, which the dense prefill makes, is the dash of the list and no answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from ruler_prompt import PromptFormat
from ruler_sample import Sample, largest_fitting
from ruler_text import (
    NOISE,
    coded_words,
    essay_sentences,
    numbers,
    paired_words,
    single_words,
    uuids,
    variables,
)

CWE_COMMON, FWE_COMMON = 10, 3
VT_HOPS = 4
FWE_EXPONENT = 2.0  # of the Zipf law, as in the paper
SHORT = 4096  # tokens; a shorter list of common words repeats them 6 times rather than 30


@dataclass(frozen=True)
class Text:
    """A prompt in two parts and what its answer must hold; see ruler_sample.Sample."""

    context: str
    question: str
    references: tuple[str, ...]
    match: str = "all"


@dataclass(frozen=True)
class QaEntry:
    """An entry of --qa-file."""

    question: str
    context: str
    answers: tuple[str, ...]


# make(seed, units, length): the text with a haystack of so many units (sentences, lines or words).
Make = Callable[[str, int, int], Text]


@dataclass(frozen=True)
class Family:
    """max_tokens: room for the answer, as in the paper's set-up; smallest: least units."""

    make: Make
    max_tokens: int
    smallest: int = 1


def generate(family: Family, name: str, length: int, index: int, seed: int, form: PromptFormat
             ) -> Sample:  # fmt: skip
    """The sample; raises ValueError in one sentence where `length` cannot hold the task."""
    key = f"{seed} {name} {length} {index}"

    def tokens(units: int) -> int:
        text = family.make(key, units, length)
        return form.count_tokens(text.context, text.question) + family.max_tokens

    units = largest_fitting(lambda n: tokens(n) <= length, family.smallest)
    if units is None:
        raise ValueError(
            f"length {length} cannot hold a sample of {name}, whose shortest prompt takes "
            f"{tokens(family.smallest)} tokens with its answer; ask for at least as many."
        )
    text = family.make(key, units, length)
    return Sample(
        task=name,
        length=length,
        index=index,
        context=text.context,
        question=text.question,
        references=text.references,
        match=text.match,
        max_tokens=family.max_tokens,
    )


def families(qa: Sequence[QaEntry] | None) -> dict[str, Family]:
    """All task families by name, in the paper's order; "qa" only with a set of questions."""
    found = {
        "niah_single_1": Family(_niah(noise=True), 128, smallest=2),
        "niah_single_2": Family(_niah(), 128, smallest=2),
        "niah_single_3": Family(_niah(values="uuids"), 128, smallest=2),
        "niah_multikey_1": Family(_niah(keys=4), 128, smallest=8),
        "niah_multikey_2": Family(_needle_lines("words"), 128, smallest=2),
        "niah_multikey_3": Family(_needle_lines("uuids"), 128, smallest=2),
        "niah_multivalue": Family(_niah(values_per_key=4), 128, smallest=8),
        "niah_multiquery": Family(_niah(keys=4, queries=4), 128, smallest=8),
        "vt": Family(_variable_tracking, 60, smallest=2 * VT_HOPS + 2),
        "cwe": Family(_common_words, 120),
        "fwe": Family(_frequent_words, 50, smallest=50),
    }
    if qa is not None:
        found["qa"] = Family(_question_answering(qa), 48)
    return found


# ------------------------------------------------------------------------------ needle in a haystack


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the secret {kind} for {key} is: {value}."


def _insert(units: list[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """`units` with each needle at its depth, from 0 (in front) to 1 (at the end)."""
    places = sorted(zip((int(d * len(units)) for d in depths), needles, strict=True))
    out: list[str] = []
    before = 0
    for place, needle in places:
        out += units[before:place]
        out.append(needle)
        before = place
    return out + units[before:]


def _niah(
    noise: bool = False,
    keys: int = 1,
    queries: int = 1,
    values_per_key: int = 1,
    values: str = "numbers",
) -> Make:
    """Needles in prose: `keys` of them are there, each with values_per_key, `queries` are asked."""

    def make(key: str, units: int, length: int) -> Text:
        rng = random.Random(key)
        names = paired_words(rng, keys)
        drawn = (numbers if values == "numbers" else uuids)(rng, keys * values_per_key)
        needles = [_needle(values, names[i // values_per_key], v) for i, v in enumerate(drawn)]
        depths = [rng.random() for _ in needles]
        prose = [NOISE] * units if noise else list(islice(essay_sentences(rng), units))
        asked, wanted = names[:queries], tuple(drawn[: queries * values_per_key])
        return Text(
            _niah_head(values) + " ".join(_insert(prose, needles, depths)),
            _niah_question(values, asked, len(wanted)),
            wanted,
        )

    return make


def _needle_lines(keys: str) -> Make:
    """A haystack of needles only, of which one is asked; keys and values are words and numbers, or
    both UUIDs."""

    def make(key: str, units: int, length: int) -> Text:
        rng = random.Random(key)
        depth = rng.random()
        key_names = random.Random(key + " keys")
        values = random.Random(key + " values")
        if keys == "words":
            kind, names, drawn = "numbers", paired_words(key_names, units), numbers(values, units)
        else:
            kind, names, drawn = "uuids", uuids(key_names, units), uuids(values, units)
        asked = int(depth * units)
        lines = [_needle(kind, name, value) for name, value in zip(names, drawn, strict=True)]
        return Text(
            _niah_head(kind) + "\n".join(lines),
            _niah_question(kind, names[asked : asked + 1], 1),
            (drawn[asked],),
        )

    return make


def _niah_head(kind: str) -> str:
    return (
        f"Some secret {kind} are hidden in the following text. Remember them; a question about them "
        "follows the text.\n\n"
    )


def _niah_question(kind: str, asked: Sequence[str], count: int) -> str:
    number = kind[:-1] if count == 1 else kind
    return (
        f"\n\nWhich secret {number} does the text give for {_enumerated(asked)}? Name all of them, "
        f"{count} in number, and nothing else.\n"
        f"Answer: the secret {number} for {_enumerated(asked)}, each after a dash:\n"
    )


def _enumerated(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# --------------------------------------------------------------------------------- variable tracking


def _variable_tracking(key: str, units: int, length: int) -> Text:
    """One chain of VT_HOPS assignments of a value in repeated noise, in the order of the chain."""
    rng = random.Random(key)
    chain = variables(rng, VT_HOPS + 1)
    value = str(rng.randrange(10_000, 100_000))
    notes = [f"VAR {chain[0]} = {value}."]
    notes += [f"VAR {name} = VAR {source}." for source, name in pairwise(chain)]
    places = sorted(rng.random() for _ in notes)
    text = " ".join(_insert_in_order([NOISE] * units, notes, places))
    return Text(
        "The following text assigns values to variables. Follow the assignments.\n\n" + text,
        f"\n\nWhich variables have the value {value} at the end? There are {len(chain)} of them.\n"
        f"Answer: the variables with the value {value}, each after a dash:\n",
        tuple(chain),
    )


def _insert_in_order(units: list[str], notes: Sequence[str], depths: Sequence[float]) -> list[str]:
    """As _insert, where notes that share a place stay in their order."""
    out = list(units)
    for note, depth in zip(reversed(notes), reversed(depths), strict=True):
        out.insert(int(depth * len(units)), note)
    return out


# --------------------------------------------------------------------------- common and frequent words


def _common_words(key: str, units: int, length: int) -> Text:
    """A numbered list in which CWE_COMMON words are common and `units` others rare."""
    rng = random.Random(key)
    common_times, rare_times = (30, 3) if length >= SHORT else (6, 1)
    common = rng.sample(single_words(), CWE_COMMON)
    rest = [word for word in single_words() if word not in common]
    random.Random(key + " rest").shuffle(rest)
    rare = rest[:units]
    rare += paired_words(random.Random(key + " pairs"), units - len(rare))
    listed = common * common_times + rare * rare_times
    random.Random(key + " order").shuffle(listed)
    lines = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return Text(
        "Below is a numbered list of words. Some of them appear far more often than others. "
        "Remember the most common ones.\n\n" + lines,
        f"\n\nWhich are the {CWE_COMMON} most common words of the list?\n"
        f"Answer: the {CWE_COMMON} most common words of the list, each after a dash:\n",
        tuple(common),
    )


def _frequent_words(key: str, units: int, length: int) -> Text:
    """About `units` coded words whose frequencies follow Zipf's law."""
    rng = random.Random(key)
    vocabulary = coded_words(rng, max(20, min(2000, length // 50)))
    weights = [rank**-FWE_EXPONENT for rank in range(1, len(vocabulary) + 1)]
    scale = units / sum(weights)
    # Counts, not draws: the three most frequent words are then never a matter of chance.
    listed = [
        word
        for word, weight in zip(vocabulary, weights, strict=True)
        for _ in range(max(1, round(weight * scale)))
    ]
    random.Random(key + " order").shuffle(listed)
    return Text(
        "The following is a coded text. Remember which of its words are the most frequent ones.\n\n"
        + " ".join(listed),
        f"\n\nWhich are the {FWE_COMMON} most frequent words of the coded text?\n"
        f"Answer: the {FWE_COMMON} most frequent words, each after a dash:\n",
        tuple(vocabulary[:FWE_COMMON]),
    )


# -------------------------------------------------------------------------------- question answering


def _question_answering(qa: Sequence[QaEntry]) -> Make:
    """One entry's context among `units` - 1 others, which repeat where the set is too small.

    qa: entries of at least two different contexts.
    """

    def make(key: str, units: int, length: int) -> Text:
        rng = random.Random(key)
        asked = rng.choice(qa)
        depth = rng.random()
        others = sorted({entry.context for entry in qa} - {asked.context})
        random.Random(key + " documents").shuffle(others)
        documents = [others[i % len(others)] for i in range(units - 1)]
        documents.insert(int(depth * units), asked.context)
        text = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        return Text(
            "Answer a question from the following documents.\n\n" + text,
            f"\n\nQuestion: {asked.question}\nGive the answer alone, without a sentence around it.\n"
            "Answer, after a dash:\n",
            asked.answers,
            match="any",
        )

    return make
