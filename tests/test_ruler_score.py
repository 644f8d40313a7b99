"""RULER's scores, on answers made by hand."""

from __future__ import annotations

import pytest
from ruler_score import score, string_match


@pytest.mark.parametrize(
    ("text", "references", "match", "expected"),
    [
        ("- 1234567", ["1234567"], "all", 1.0),
        ("The number is 1234568.", ["1234567"], "all", 0.0),
        ("- 11\n- 22\n- 44", ["11", "22", "33", "44"], "all", 0.75),
        ("44, 33, 22 and 11", ["11", "22", "33", "44"], "all", 1.0),  # in any order
        ("QXZAB qxzac", ["qxzab", "QXZAC"], "all", 1.0),  # case does not count
        ("", ["11"], "all", 0.0),
        ("It was Vienna, I think.", ["Wien", "Vienna"], "any", 1.0),
        ("It was Graz.", ["Wien", "Vienna"], "any", 0.0),
    ],
)
def test_string_match(text: str, references: list[str], match: str, expected: float) -> None:
    assert string_match(text, references, match) == expected
    assert score(text[:1], text[1:], references, match, score_from=1) == expected


@pytest.mark.parametrize(
    ("first", "rest", "references", "match", "expected"),
    [
        ("-", " 1234567", ["1234567"], "all", 1.0),
        (" 123", "4567", ["1234567"], "all", 1.0),  # decode completed what prefill began
        (" 123", "9567", ["1234567"], "all", 0.0),
        (" 999", "4567", ["1234567"], "all", 0.0),  # the end alone is no answer
        (" 123", " 4567", ["1234567"], "all", 0.0),
        ("walnut", " river candle", ["walnut", "river", "candle"], "all", 1.0),
        ("walnut", " stone candle", ["walnut", "river", "candle"], "all", 0.5),
        ("walnut", " river walnut", ["walnut", "river"], "all", 1.0),  # said once more: scored
        ("walnut", "", ["walnut"], "all", None),  # prefill said all of it
        ("Vienna", " of course", ["Wien", "Vienna"], "any", 0.0),
        ("Vienna", " of course", ["Vienna"], "any", None),
        ("", "", ["11"], "all", 0.0),  # an answer that ended at once
    ],
)
def test_the_first_token_is_no_answer(
    first: str, rest: str, references: list[str], match: str, expected: float | None
) -> None:
    assert score(first, rest, references, match, score_from=2) == expected
