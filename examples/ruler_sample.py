"""A question of a task: what every generator makes, every engine answers and every scorer reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MATCHES = ("all", "any")


@dataclass(frozen=True)
class Sample:
    """context + question is the prompt; a run that decodes the question sparsely parts it there.

    length: tokens that prompt and answer may take together; index: which sample of its task and
    length; max_tokens: of the answer; references: texts of which the answer must hold `match`,
    "all" (the score is the share it holds) or "any".
    """

    task: str
    length: int
    index: int
    context: str
    question: str
    references: tuple[str, ...]
    match: str
    max_tokens: int

    @property
    def prompt(self) -> str:
        return self.context + self.question


def largest_fitting(fits: Callable[[int], bool], smallest: int) -> int | None:
    """The largest n >= smallest for which fits(n), if fits is true up to some n and false after it.

    None where even fits(smallest) is false. Doubles, then bisects: about 2 log2(n) calls.
    """
    if not fits(smallest):
        return None
    low, high = smallest, max(2 * smallest, smallest + 1)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
