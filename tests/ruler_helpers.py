"""A small BPE tokenizer made on the spot, and a backend that answers by a table."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from ruler_backends import Answer
from ruler_prompt import PromptFormat, Request
from ruler_text import essay_sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def bpe_tokenizer(chat_template: str | None = None) -> Any:
    """Byte-level BPE of 700 tokens, trained on an essay of ours; adds `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>", "<user>", "<model>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = itertools.islice(essay_sentences(random.Random(0)), 2000)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


class TableBackend:
    """Answers each request with `say(request's text)`; `asked` keeps the requests of every call.

    Raises KeyboardInterrupt in place of the call number `dies_at`, as a user who ends the run.
    """

    def __init__(
        self, form: PromptFormat, say: Callable[[str], str], dies_at: int | None = None
    ) -> None:
        self._tokenizer, self._say, self._dies_at = form.tokenizer, say, dies_at
        self.asked: list[list[Request]] = []
        self.is_closed = False

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        if len(self.asked) == self._dies_at:
            raise KeyboardInterrupt
        self.asked.append(list(requests))
        texts = [self._say(self._tokenizer.decode(request.token_ids)) for request in requests]
        return [
            Answer(self._tokenizer.encode(text, add_special_tokens=False), 0.02) for text in texts
        ]

    def close(self) -> None:
        self.is_closed = True
