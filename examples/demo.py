"""`make demo`: serves a model with magicpig and with dense attention, and asks both the same questions.

    python examples/demo.py                  the built-in recall model, made on the spot
    python examples/demo.py --model NAME     any Hugging Face model or local checkpoint

Built-in model: a six-word chain to recite at 2K, 8K and 16K tokens and the most frequent word of a
text. The first generated word comes from the dense prefill, so right or wrong is judged on the
words after it. Exit code 1 when magicpig answers wrongly; with --model, when it does where dense
attention (FLASH_ATTN on a GPU, else CPU_ATTN) answers rightly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import recall_model
import torch
from argument_types import folder_for_results
from passage import passage_questions
from serving import Completion, VllmServer

CHAIN_LENGTHS = (2048, 8192, 16384)
COUNT_LENGTH = 8192
SERVE_ARGUMENTS = ("--enforce-eager", "--max-num-seqs", "4", "--no-enable-log-requests")
# Room for 17K tokens of an 8B model, so that a machine with little free memory starts too.
KV_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Question:
    """scored: words of which all must be in the answer, in this order; skip_first: leave the first
    generated word, which no sampling made, out of the score."""

    name: str
    prompt: str
    asked: str
    scored: tuple[str, ...]
    max_tokens: int
    skip_first: bool

    def is_answered_by(self, text: str) -> bool:
        words = [word.strip(".,;:!?\"'").lower() for word in text.split()]
        expected = [word.lower() for word in self.scored]
        if self.skip_first:
            return words[1 : 1 + len(expected)] == expected
        remaining = iter(words)
        return all(word in remaining for word in expected)


@dataclass(frozen=True)
class Answer:
    completion: Completion
    right: bool
    sampled_fraction: float | None  # of the rows in the middle; None where nothing was sampled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="Hugging Face name or local folder; default: built-in model"
    )
    parser.add_argument(
        "--logs", type=folder_for_results, default=".logs", help="folder of server logs"
    )
    arguments = parser.parse_args()
    started = time.monotonic()

    if arguments.model:
        model = arguments.model
        questions = model_questions(model)
    else:
        model = str(recall_model.build(Path(".models") / "recall"))
        questions = built_in_questions()

    longest = max(CHAIN_LENGTHS) + 1024
    serve = (
        *SERVE_ARGUMENTS,
        "--max-model-len",
        str(longest),
        "--kv-cache-memory-bytes",
        str(KV_CACHE_BYTES if arguments.model else KV_CACHE_BYTES // 8),
    )
    answers: dict[str, list[Answer]] = {}
    dense_backend = "FLASH_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    for backend in ("magicpig", dense_backend):
        log = arguments.logs / f"demo-{backend.lower()}.log"
        with VllmServer(model, backend, *serve, log_path=log) as server:
            answers[backend] = ask(server, questions, samples=backend == "magicpig")

    print()
    print(table(questions, answers["magicpig"], answers[dense_backend], dense_backend))
    wrong = [
        question.name
        for question, ours, dense in zip(
            questions, answers["magicpig"], answers[dense_backend], strict=True
        )
        if not ours.right and (dense.right or not arguments.model)
    ]
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if wrong:
        print(f"WRONG with magicpig: {', '.join(wrong)}")
        return 1
    print("every answer of magicpig is right" if not arguments.model else "no answer was lost")
    return 0


def built_in_questions() -> list[Question]:
    questions = []
    for length in CHAIN_LENGTHS:
        question = recall_model.haystack(length, num_chains=4, seed=length).question(0)
        questions.append(_scored(f"chain at {length // 1024}K", question))
    count = recall_model.count_prompt(COUNT_LENGTH, seed=1)
    questions.append(_scored(f"most frequent word of {COUNT_LENGTH // 1024}K", count))
    return questions


def _scored(name: str, question: recall_model.Question) -> Question:
    asked = " ".join(question.prompt.split()[-5:])
    return Question(
        name=name,
        prompt=question.prompt,
        asked=f"... {asked}",
        scored=tuple(question.answer[1:]),
        max_tokens=len(question.answer),
        skip_first=True,
    )


def model_questions(model: str) -> list[Question]:
    """The same kind of question for a model that reads English, sized by its own tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(
            f"model {model!r} cannot be loaded ({reason}); give the name of a Hugging Face model "
            "that this machine can download, or a local folder."
        )
    return [
        Question(
            name=f"chain at {length // 1024}K",
            prompt=prompt,
            asked="... the secret words, in order, are:",
            scored=words,
            max_tokens=48,
            skip_first=False,
        )
        for length in CHAIN_LENGTHS
        for prompt, words in [passage_questions(tokenizer, length)]
    ]


def ask(server: VllmServer, questions: Sequence[Question], samples: bool) -> list[Answer]:
    answers = []
    for question in questions:
        before = server.stats() if samples else None
        completion = server.complete(
            question.prompt, question.max_tokens, extra_body={"ignore_eos": question.skip_first}
        )
        fraction = None
        if before is not None:
            after = server.stats()
            rows = after["sampled_rows"] - before["sampled_rows"]
            middle = after["middle_rows"] - before["middle_rows"]
            fraction = rows / middle if middle else None
        right = question.is_answered_by(completion.text)
        print(f"  {question.name}: {question.asked!r} -> {completion.text.strip()!r}", flush=True)
        answers.append(Answer(completion, right, fraction))
    return answers


def table(
    questions: Sequence[Question],
    ours: Sequence[Answer],
    dense: Sequence[Answer],
    dense_backend: str,
) -> str:
    header = (
        f"{'question':<28}{'magicpig':>10}{dense_backend:>12}{'rows read':>11}"
        f"{'ms/token':>10}{dense_backend:>12}"
    )
    lines = [header, "-" * len(header)]
    for question, a, b in zip(questions, ours, dense, strict=True):
        fraction = "all" if a.sampled_fraction is None else f"{100 * a.sampled_fraction:.2f} %"
        lines.append(
            f"{question.name:<28}{_verdict(a):>10}{_verdict(b):>12}{fraction:>11}"
            f"{1e3 * a.completion.tpot_s:>10.1f}{1e3 * b.completion.tpot_s:>12.1f}"
        )
    return "\n".join(lines)


def _verdict(answer: Answer) -> str:
    return "right" if answer.right else "WRONG"


if __name__ == "__main__":
    sys.exit(main())
