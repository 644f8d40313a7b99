"""The task families that the built-in recall model can do, in its own vocabulary: `--tasks recall`.

    recall_needle      a chain of seven words, asked by its first (RULER: single needle)
    recall_multikey    16 such chains, one of which is asked
    recall_multiquery  three needles, each of which names the next: one answer needs all of them
    recall_vt          variable tracking: six notes "x y ." far apart lead from one word to the next,
                       among two more such trails
    recall_fwe         the most frequent word, at about 5 times the frequency of the runners-up
    recall_fwe_loud    the same where a rare word counts 15-fold in attention: the answer is in the
                       sum of many small weights, which selecting the largest ones loses
    recall_cwe         one of three common words of a list without any prose

What decode must produce are the words after the first one: the first comes from the prefill.

Not there: several values for one key (RULER's multi-value). To name the second value the model has
to know that it said the first; its recall heads see one word and no list of what was said, and the
values that share a key differ in score by chance alone (3 nats), so that greedy decoding says one of
them. Questions whose answers are values of several keys are recall_multiquery.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import recall_model
from ruler_sample import Sample

NEEDLE_WORDS = 6
MULTIKEY_CHAINS = 16
MULTIQUERY_NEEDLES, MULTIQUERY_WORDS = 3, 3
VT_HOPS, VT_TRAILS = 6, 3
FWE_TOP = 0.024  # of all words; as one of the content words, 6 %
# Times that the loud word occurs for each occurrence of the most frequent one: their weights in
# attention are then 1 to 3 (recall_model.COUNT_LOUD_SCORE is a factor of 15).
FWE_LOUD = 1 / 45
CWE_COMMON, CWE_SHARE = 3, 0.15  # of all words, each
# Haystacks that samples share: their common prefix is then prefilled once where a cache keeps it.
SAMPLES_PER_HAYSTACK = 5

Parts = tuple[str, str, tuple[str, ...], str]  # context, question, words of the answer, match


def generate(name: str, length: int, index: int, seed: int) -> Sample:
    """A sample of exactly `length` tokens with its answer; raises ValueError where that is too few."""
    make = RECALL_TASKS[name]
    try:
        context, question, answer, match = make(length, index, f"{seed} {name} {length}")
    except ValueError as error:
        raise ValueError(
            f"length {length} cannot hold a sample of {name} ({error}); ask for more tokens."
        ) from None
    # The words that lead to a count are no part of its answer.
    references = answer[-1:] if name.startswith("recall_fwe") else answer[1:]
    max_tokens = len(answer)
    if match == "any":  # of the common words at the end of `answer`, the model says one
        references, max_tokens = answer[-CWE_COMMON:], len(answer) - CWE_COMMON + 1
    return Sample(name, length, index, context, question, references, match, max_tokens)


def _shared(index: int) -> tuple[int, int]:
    """(number of the haystack, number of the question in it)"""
    return divmod(index, SAMPLES_PER_HAYSTACK)


def _chains(num_chains: int) -> Callable[[int, int, str], Parts]:
    def make(length: int, index: int, key: str) -> Parts:
        number, asked = _shared(index)
        rng = random.Random(f"{key} {number}")
        num_tokens = length - len(recall_model.QUESTION) - 1 - NEEDLE_WORDS
        # A single needle has a haystack of its own.
        haystacks = random.Random(f"{key} {index}") if num_chains == 1 else rng
        hay = recall_model.haystack(
            num_tokens, num_chains, NEEDLE_WORDS, seed=haystacks.getrandbits(32)
        )
        chosen = 0 if num_chains == 1 else rng.sample(range(num_chains), num_chains)[asked]
        first, *words = hay.chains[chosen]
        return hay.text, _question(first), tuple(words), "all"

    return make


def _question(key: str) -> str:
    return " " + " ".join((*recall_model.QUESTION, key))


def _notes(length: int, rng: random.Random, trails: list[list[str]], span: int, rest: list[str]
           ) -> str:  # fmt: skip
    """Notes of `span` words and a STOP at random places in filler of the words `rest`; in a trail the
    last word of a note is the first of the next. An answer recites a trail but for its first word."""
    answer_words = len(trails[0]) - 1
    num_words = length - 1 - len(recall_model.QUESTION) - 1 - answer_words
    notes = [
        (*trail[start : start + span], recall_model.STOP)
        for trail in trails
        for start in range(0, len(trail) - 1, span - 1)
    ]
    rng.shuffle(notes)
    filler = recall_model.draw_filler(rng, num_words, rest)
    return " ".join(recall_model.plant(rng, filler, notes))


def _trails(num_trails: int, num_notes: int, span: int) -> Callable[[int, int, str], Parts]:
    """Each trail has num_notes notes of `span` words."""

    def make(length: int, index: int, key: str) -> Parts:
        number, asked = _shared(index)
        rng = random.Random(f"{key} {number}")
        words = recall_model.plain_words(rng)
        size = num_notes * (span - 1) + 1
        trails = [words[i * size : (i + 1) * size] for i in range(num_trails)]
        text = _notes(length, rng, trails, span, words[num_trails * size :])
        first, *answer = trails[asked % num_trails]
        return text, _question(first), tuple(answer), "all"

    return make


def _frequent(length: int, index: int, key: str) -> Parts:
    """The recital of a chain ends in COUNT: so the most frequent word is said by a decode step."""
    num_tokens = length - NEEDLE_WORDS - 2
    prompt, answer = recall_model.count_prompt(
        num_tokens, seed=random.Random(f"{key} {index}").getrandbits(32)
    )
    words = prompt.split()
    at = len(words) - len(recall_model.QUESTION) - 1
    return " ".join(words[:at]), " " + " ".join(words[at:]), answer, "all"


def _frequent_and_loud(length: int, index: int, key: str) -> Parts:
    """As _frequent, with a loud word whose few occurrences weigh a third of the answer's."""
    rng = random.Random(f"{key} {index}")
    loud = rng.choice(recall_model.loud_words())
    words = recall_model.plain_words(rng)
    first, *answer = words[: NEEDLE_WORDS + 1]
    top, rest = words[NEEDLE_WORDS + 1], words[NEEDLE_WORDS + 2 :]
    num_words = length - 1 - len(recall_model.QUESTION) - 1 - (len(answer) + 2)
    filler = recall_model.draw_filler(rng, num_words, rest)
    times = max(1, round(FWE_TOP * num_words)), max(1, round(FWE_LOUD * FWE_TOP * num_words))
    places = rng.sample(range(num_words), sum(times))
    for number, place in enumerate(places):
        filler[place] = top if number < times[0] else loud
    text = recall_model.plant(rng, filler, ((first, *answer, recall_model.COUNT),))
    return " ".join(text), _question(first), (*answer, recall_model.COUNT, top), "all"


def _common(length: int, index: int, key: str) -> Parts:
    """A list of content words alone; the two words before COUNT lead to it."""
    rng = random.Random(f"{key} {index}")
    words = recall_model.plain_words(rng)
    lead, common, rest = words[:3], words[3 : 3 + CWE_COMMON], words[3 + CWE_COMMON :]
    num_words = length - 1 - len(recall_model.QUESTION) - 1 - (len(lead) + 1)
    if num_words <= 0:
        raise ValueError(f"a list of {num_words} words is empty")
    weights = [CWE_SHARE] * CWE_COMMON + [(1 - CWE_SHARE * CWE_COMMON) / len(rest)] * len(rest)
    listed = rng.choices([*common, *rest], weights, k=num_words)
    text = recall_model.plant(rng, listed, ((*lead, recall_model.COUNT),))
    return " ".join(text), _question(lead[0]), (*lead[1:], recall_model.COUNT, *common), "any"


RECALL_TASKS: dict[str, Callable[[int, int, str], Parts]] = {
    "recall_needle": _chains(1),
    "recall_multikey": _chains(MULTIKEY_CHAINS),
    "recall_multiquery": _trails(VT_TRAILS, MULTIQUERY_NEEDLES, MULTIQUERY_WORDS + 2),
    "recall_vt": _trails(VT_TRAILS, VT_HOPS, 2),
    "recall_fwe": _frequent,
    "recall_fwe_loud": _frequent_and_loud,
    "recall_cwe": _common,
}
