"""The words that RULER's haystacks and needles are made of: our own, by seed, of any length."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# The one-line noise of passkey retrieval (RULER's "repeated noise").
NOISE = "The harbour was quiet. A boat came in. It left again at noon. Nobody wrote it down."

_OPENINGS = (
    "For a long time", "In those years", "As far as anyone could tell", "On most mornings",
    "When the rain had stopped", "Before the road was built", "After the second winter",
    "Whatever the reason", "To the surprise of the visitors", "Without much discussion",
)  # fmt: skip
_SUBJECTS = (
    "the keeper of the mill", "a teacher from the valley", "the younger of the two brothers",
    "the council", "a man who repaired clocks", "the owner of the orchard", "her neighbour",
    "the crew of the ferry", "an old surveyor", "the people at the station",
)  # fmt: skip
_VERBS = (
    "believed that", "had often remarked that", "wrote in a letter that", "would not admit that",
    "explained to the children that", "took it for granted that", "noticed one day that",
    "kept repeating that", "had learned from the farmers that", "was among the first to say that",
)  # fmt: skip
_CLAIMS = (
    "a good tool outlives its maker", "the river decides where the town may stand",
    "nothing is as slow as a careful decision", "the best maps leave most things out",
    "a garden is never finished", "bread tells more about a house than its windows",
    "work done at night has to be done again", "the price of salt follows the weather",
    "every bridge is an argument", "the quiet months are the useful ones",
    "a fence says what its builder was afraid of", "one honest measurement is worth ten opinions",
)  # fmt: skip
_ENDINGS = (
    "and few who had seen the place disagreed", "although the accounts said otherwise",
    "which was more than the newspaper reported", "and went on sorting the nails by length",
    "but the younger people only smiled at it", "so the matter was left for another year",
    "and the lamp in the window stayed lit", "as if the hills themselves had been consulted",
)  # fmt: skip


def essay_sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of an essay about nothing, without end: 96,000 different ones."""
    while True:
        opening, subject, verb, claim, ending = (
            rng.choice(part) for part in (_OPENINGS, _SUBJECTS, _VERBS, _CLAIMS, _ENDINGS)
        )
        yield f"{opening}, {subject} {verb} {claim}, {ending}."


@cache
def single_words() -> tuple[str, ...]:
    """English nouns, verbs and adjectives, those of the recall model."""
    return tuple(Path(__file__).with_name("recall_words.txt").read_text("utf-8").split())


def paired_words(rng: random.Random, count: int) -> list[str]:
    """`count` different compounds such as "amber-walnut", of more than two million."""
    words = single_words()
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen.setdefault("-".join(rng.sample(words, 2)))
    return list(chosen)


def numbers(rng: random.Random, count: int) -> list[str]:
    """`count` different numbers of seven digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def coded_words(rng: random.Random, count: int) -> list[str]:
    """`count` different words that mean nothing, six letters each, every second one a vowel."""
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        letters = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)]
        chosen.setdefault("".join(letters))
    return list(chosen)


def variables(rng: random.Random, count: int) -> list[str]:
    """`count` different names of variables, five capitals each."""
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen.setdefault("".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)))
    return list(chosen)
