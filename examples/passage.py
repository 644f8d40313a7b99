"""Long English prompts with a needle, for any model and its tokenizer."""

from __future__ import annotations

import random
from typing import Any

_SUBJECTS = ("The river", "A merchant", "The old mill", "Her brother", "The garden", "A letter")
_VERBS = ("crossed", "remembered", "waited for", "described", "passed", "followed")
_OBJECTS = (
    "the quiet valley",
    "the northern road",
    "a small harbour",
    "the winter market",
    "a song",
)
_WORDS = ("walnut", "river", "candle", "anchor", "velvet", "thunder", "copper", "meadow", "lantern")


def passage_questions(
    tokenizer: Any, num_tokens: int, num_words: int = 6, seed: int = 0
) -> tuple[str, tuple[str, ...]]:
    """(prompt, words): about num_tokens tokens of filler with a sentence that names the words at a
    random place in its middle half, and a request to recite them at the end."""
    rng = random.Random(f"{seed} {num_tokens}")
    words = tuple(rng.sample(_WORDS, num_words))
    needle = f"The secret words, in order, are: {', '.join(words)}."
    question = "\n\nAs the text above says, the secret words, in order, are:"
    budget = num_tokens - sum(len(tokenizer.encode(part)) for part in (needle, question))
    sentences: list[str] = []
    while budget > 0:
        subject, verb, target = (rng.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS))
        sentence = f"{subject} {verb} {target}."
        budget -= len(tokenizer.encode(" " + sentence, add_special_tokens=False))
        sentences.append(sentence)
    place = rng.randrange(len(sentences) // 4, max(len(sentences) * 3 // 4, 1))
    sentences.insert(place, needle)
    return " ".join(sentences) + question, words
