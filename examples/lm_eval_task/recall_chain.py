"""Functions of the task recall_chain.yaml: its samples, and a score of what decode produced."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

# The harness loads this file by its path, so that the modules beside its folder are not found.
sys.path.append(str(Path(__file__).parents[1]))

from ruler_recall import generate


def samples(
    length: int = 4096, samples: int = 8, seed: int = 0, **model_arguments: Any
) -> dict[str, Dataset]:
    """Chains to recite, with one of 16 asked; words: without the first, which the prefill makes.

    The arguments are those of --metadata; the harness adds all of --model_args to them.
    """
    found = [generate("recall_multikey", length, index, seed) for index in range(samples)]
    documents = [{"prompt": s.prompt, "words": " ".join(s.references)} for s in found]
    return {"test": Dataset.from_list(documents)}


def process_results(document: dict[str, str], results: list[str]) -> dict[str, float]:
    """Share of the words that are right in their place, the first generated one aside."""
    said = results[0].split()[1:]
    wanted = document["words"].split()
    right = sum(a == b for a, b in zip(said, wanted, strict=False))
    return {"words_from_decode": right / len(wanted)}
