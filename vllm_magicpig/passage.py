"""The tokens whose keys give the key centres: those of a built-in English text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle, islice
from typing import Any

PASSAGE_TOKENS = 3072
"""On SmolLM2-135M the centre of 512 tokens is .40 of the keys' spread away from the mean key of other
English texts of 1,500 tokens, that of 988 tokens .26: keys change with their positions. The recall
model counts right in 5 of 6 prompts of 8K with 1,024 tokens, in all with 2,048, 3,072 and 4,096
(tests/e2e/test_recall.py)."""

MAX_SHARE = 0.25
"""Of one id among the text's tokens, as of unknown words under a tokenizer. No English word has .1;
at .51, in the model of the demo, the centre is five times as far off as that of random ids."""


@dataclass(frozen=True)
class Passage:
    token_ids: list[int]
    is_text: bool

    def __str__(self) -> str:
        return f"{len(self.token_ids)} {'tokens of text' if self.is_text else 'random tokens'}"


def make_passage(
    tokenizer: Any | None, vocab_size: int, special_ids: Collection[int], num_tokens: int
) -> Passage:
    """The first num_tokens tokens of passage.txt, repeated where it has fewer; the same on all ranks.

    Random ids but for special_ids where there is no tokenizer, or one id takes MAX_SHARE of the text.
    """
    if tokenizer is not None:
        text = files("vllm_magicpig").joinpath("passage.txt").read_text("utf-8")
        known = [i for i in tokenizer.encode(text) if i < vocab_size]
        if known and max(Counter(known).values()) < MAX_SHARE * len(known):
            return Passage(list(islice(cycle(known), num_tokens)), is_text=True)
    ordinary = [i for i in range(vocab_size) if i not in special_ids]
    return Passage(random.Random(0).choices(ordinary, k=num_tokens), is_text=False)
