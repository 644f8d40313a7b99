"""From the two parts of a prompt to tokens of the model's own tokenizer, in chat format if asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """token_ids[question_start:] is the question; at most max_tokens are generated, up to a stop id."""

    token_ids: tuple[int, ...]
    question_start: int
    max_tokens: int


class PromptFormat:
    """Renders context + question as the model expects it.

    tokenizer: of transformers, a fast one. is_chat: the text becomes a user's message in the
    tokenizer's chat template, and the question's last line ("Answer: ...") the begin of the reply.
    """

    def __init__(self, tokenizer: Any, is_chat: bool = False) -> None:
        """Raises ValueError in one sentence for a tokenizer that cannot do this."""
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} does not say which text a token stands for, "
                "which only fast tokenizers do; choose a model with a tokenizer.json."
            )
        if is_chat and not tokenizer.chat_template:
            raise ValueError(
                "--chat is given, but the model's tokenizer has no chat template; leave it out."
            )
        self.tokenizer, self.is_chat = tokenizer, is_chat

    def request(self, context: str, question: str, max_tokens: int) -> Request:
        text = self._render(context, question)
        encoded = self.tokenizer(
            text, add_special_tokens=not self.is_chat, return_offsets_mapping=True
        )
        end = text.index(context) + len(context)
        # A token that spans the border belongs to the question.
        start = next(
            i for i, (_, token_end) in enumerate(encoded["offset_mapping"]) if token_end > end
        )
        return Request(tuple(encoded["input_ids"]), start, max_tokens)

    def count_tokens(self, context: str, question: str) -> int:
        text = self._render(context, question)
        return len(self.tokenizer(text, add_special_tokens=not self.is_chat)["input_ids"])

    def _render(self, context: str, question: str) -> str:
        if not self.is_chat:
            return context + question
        asked, _, reply = question.rstrip("\n").rpartition("\n")
        message = [{"role": "user", "content": context + asked}]
        rendered: str = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return rendered + reply + question[len(question.rstrip("\n")) :]

    def split_answer(self, token_ids: list[int]) -> tuple[str, str]:
        """(text of the first token, text of the others)"""
        first: str = self.tokenizer.decode(token_ids[:1], skip_special_tokens=True)
        whole: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        if whole.startswith(first):
            return first, whole[len(first) :]
        return first, self.tokenizer.decode(token_ids[1:], skip_special_tokens=True)
