"""RULER's scores: string match, as in arXiv 2404.06654, section 4, with and without the first token."""

from __future__ import annotations

from collections.abc import Sequence

SCORE_FROM = (1, 2)


def string_match(text: str, references: Sequence[str], match: str) -> float:
    """Share of `references` that `text` contains (match "all"), or 1 if any of them ("any").

    Case does not count, nor does what else the text says. In [0, 1].
    """
    found = [reference.lower() in text.lower() for reference in references]
    return float(any(found)) if match == "any" else sum(found) / len(found)


def score(first: str, rest: str, references: Sequence[str], match: str, score_from: int
          ) -> float | None:  # fmt: skip
    """Score of an answer whose first generated token reads `first` and whose others read `rest`.

    score_from = 1 scores the whole answer. score_from = 2 scores `rest` alone, since where the
    question was prefilled densely no decode step made the first token. Where that token begins a
    reference, the reference's remainder must follow at once; a reference that it says in full is
    not scored. None where that leaves nothing to score.
    """
    if score_from == 1:
        return string_match(first + rest, references, match)
    begun = first.strip().lower()
    scored = []
    for reference in references:
        lower = reference.lower()
        if lower in rest.lower():
            scored.append(True)
        elif begun != lower:
            remainder = lower[len(begun) :]
            scored.append(
                bool(begun) and lower.startswith(begun) and rest.lower().startswith(remainder)
            )
    if not scored:
        return None
    return float(any(scored)) if match == "any" else sum(scored) / len(scored)
