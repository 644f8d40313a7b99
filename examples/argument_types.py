"""Types of command-line arguments that several examples take: one sentence for what they refuse."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST = 1 << 40
"""Of any count: beyond it arithmetic of arrays overflows, or a run never ends."""


def positive(text: str) -> int:
    return whole(1)(text)


def whole(least: int) -> Callable[[str], int]:
    """A type: whole numbers from `least` up."""

    def whole_number(text: str) -> int:
        # int() takes blanks and underscores, too.
        value = int(text) if text.isascii() and text.isdecimal() else -1
        if not least <= value <= MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up.")
        return value

    return whole_number


def positive_list(text: str) -> tuple[int, ...]:
    """In ascending order, each once."""
    return tuple(sorted(set(positives(text))))


def positives(text: str) -> list[int]:
    """In the order given."""
    return [positive(part.strip()) for part in text.split(",")]


def positive_number(text: str) -> float:
    value = _number(text)
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0.")
    return value


def _number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object.")
    return value


def folder_for_results(text: str) -> Path:
    """A folder that files can be written into; made where it does not exist."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no folder that can be written ({error.strerror}); name another."
        ) from None
