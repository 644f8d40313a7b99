"""The part that compares exact mode (K = 0) with dense attention, answer by answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_check_children import DONE
from gpu_check_jobs import (
    EAGER,
    EXACT_FLOAT32,
    EXAMPLES,
    IN_PROCESS,
    AnswerJob,
    Task,
    engine_task,
)
from gpu_check_parts import Answered, Context, ask, ended_row
from gpu_check_report import Part, Row, checked
from gpu_check_scale import Scale

sys.path.append(str(EXAMPLES))
from compare_setup import SHAPES

# As in tests/e2e/parity.py: two tokens whose float32 log-probs are closer than this may change
# places between two correct implementations: logits of size 10 carry an error of about
# 10 * 2**-24 * sqrt(operations) = 1e-4. At most one request of a model may part at such a tie.
TIE = 1e-4
MAX_TIES = 1

SHAPE_LAYERS = 2
EXACT: dict[str, Any] = {"K": 0, "dense_layers": [0]}


@dataclass(frozen=True)
class Answer:
    """logprobs: of the likeliest tokens of each step."""

    tokens: list[int]
    logprobs: list[dict[int, float]]

    @staticmethod
    def from_event(given: Mapping[str, Any]) -> Answer:
        return Answer(list(given["tokens"]), [dict(map(tuple, step)) for step in given["logprobs"]])


@dataclass(frozen=True)
class Agreement:
    """ties: requests that part where the dense backend had two tokens equally likely; wrong: what
    the others say."""

    requests: int
    tokens: int
    ties: int
    wrong: list[str]

    @property
    def is_right(self) -> bool:
        return not self.wrong and self.ties <= MAX_TIES


def agreement(ours: Sequence[Answer], dense: Sequence[Answer]) -> Agreement:
    """tokens: equal ones, up to where requests part: after that they continue different texts."""
    equal, ties, wrong = 0, 0, []
    for request, (a, b) in enumerate(zip(ours, dense, strict=True)):
        pairs = list(zip(a.tokens, b.tokens, strict=True))
        parted = next((step for step, (token, other) in enumerate(pairs) if token != other), None)
        if parted is None:
            equal += len(pairs)
            continue
        equal += parted
        token, expected = pairs[parted]
        first, second = (b.logprobs[parted].get(one) for one in (expected, token))
        if first is not None and second is not None and abs(first - second) < TIE:
            ties += 1
        else:
            wrong.append(
                f"request {request} differs at token {parted}: {token} for {expected}, whose "
                f"log-probs under the dense backend are {second} and {first}"
            )
    return Agreement(len(ours), equal, ties, wrong)


def log_prob_errors(answers: Sequence[Answer], exact: Sequence[Answer]) -> list[float]:
    """Of the exact answers' tokens, as long as both say the same text."""
    errors = []
    for ours, right in zip(answers, exact, strict=True):
        for step, (token, expected) in enumerate(zip(ours.tokens, right.tokens, strict=True)):
            a, b = ours.logprobs[step].get(expected), right.logprobs[step].get(expected)
            if a is None or b is None:
                break
            errors.append(abs(a - b))
            if token != expected:
                break
    return errors


def run_parity(part: Part, budget_s: float, context: Context) -> None:
    tasks = parity_tasks(context)
    answered = ask(part, context, list(tasks.values()), budget_s, context.scale.at_once)
    for model in dict.fromkeys(name.rsplit("-", 2)[0] for name in tasks):
        part.rows += parity_rows(model, answered, context.scale)
    part.notes.append(
        "K = 0: exact attention over the pages in host memory; layer 0 is dense, the others are "
        "not. Float32 matrix products of Triton run in full float32 here (TRITON_F32_DEFAULT=ieee). "
        f"The {SHAPE_LAYERS}-layer shape has random weights of unit gain, drawn at loading in place "
        "of load_format=dummy's, whose logits would hide any error."
    )


def parity_tasks(context: Context) -> dict[str, Task]:
    """MODEL-DTYPE-SIDE, SIDE one of dense and ours."""
    scale, sizes = context.scale, context.scale.parity
    config = SHAPES[sizes.shape] | {
        "num_hidden_layers": SHAPE_LAYERS,
        "max_position_embeddings": max(sizes.shape_lengths) + sizes.shape_tokens,
    }
    models: list[tuple[str, str | None, tuple[int, ...], int]] = [
        (name, name, sizes.lengths, sizes.tokens) for name in sizes.random_models
    ]
    models.append((f"{sizes.shape}-shape", None, sizes.shape_lengths, sizes.shape_tokens))
    tasks = {}
    for model, random_model, lengths, tokens in models:
        for dtype, side in PARITY_RUNS:
            if random_model is None and (dtype, side) == ("float32", "ours"):
                continue  # the small models have shown it, token for token
            if random_model is not None and dtype not in sizes.random_dtypes:
                continue
            name = f"{model}-{dtype}-{side}"
            dense = scale.fp32_backend if dtype == "float32" else scale.dense_backend
            job = AnswerJob(
                random_model=random_model,
                config=config if random_model is None else None,
                backend="magicpig" if side == "ours" else dense,
                options=scale.small_engine_options(EXACT) if side == "ours" else None,
                lengths=list(lengths),
                tokens=tokens,
                arguments={
                    "dtype": dtype,
                    "block_size": 32,
                    "max_model_len": max(lengths) + tokens,
                    "max_num_batched_tokens": 1024,
                    "max_num_seqs": 8,
                    "kv_cache_memory_bytes": sizes.kv_cache_bytes,
                    **scale.small_engine_arguments(),
                },
            )
            environment = IN_PROCESS | EAGER | EXACT_FLOAT32
            tasks[name] = engine_task(name, job, environment, context.scratch)
    return tasks


PARITY_RUNS = (
    ("float32", "dense"),
    ("float32", "ours"),
    ("bfloat16", "dense"),
    ("bfloat16", "ours"),
)


def parity_rows(model: str, answered: Mapping[str, Answered], scale: Scale) -> list[Row]:
    """Of one model: float32 token for token, and bfloat16 within the derived bound."""
    runs = {
        (dtype, side): answered[f"{model}-{dtype}-{side}"]
        for dtype, side in PARITY_RUNS
        if f"{model}-{dtype}-{side}" in answered
    }
    rows = [
        ended_row(f"{model}: {dtype}, {side}", run.ended, is_correctness=True)
        for (dtype, side), run in runs.items()
        if run.ended.state != DONE
    ]
    said = {key: [Answer.from_event(one) for one in run.all("answer")] for key, run in runs.items()}
    whole = {key for key, run in runs.items() if run.ended.state == DONE}
    exact = said["float32", "dense"]
    if {("float32", "dense"), ("float32", "ours")} <= whole:
        name = backend_name(runs["float32", "dense"])
        rows.append(float32_row(model, name, said["float32", "ours"], exact))
    if {("float32", "dense"), ("bfloat16", "dense"), ("bfloat16", "ours")} <= whole:
        name = backend_name(runs["bfloat16", "dense"])
        rows.append(
            bfloat16_row(model, name, said["bfloat16", "ours"], said["bfloat16", "dense"], exact)
        )
    sampling = [run for (_, side), run in runs.items() if side == "ours" and run.first("backends")]
    for run in sampling:
        names = set(run.first("backends").values())
        if "MAGICPIG" not in names:
            figure = f"every layer runs {', '.join(sorted(names))}"
            rows.append(checked(f"{run.ended.name}: layers of magicpig", False, figure, "some"))
    return rows


def backend_name(answered: Answered) -> str:
    return ", ".join(sorted(set(answered.first("backends").values())))


def float32_row(model: str, dense_name: str, ours: list[Answer], dense: list[Answer]) -> Row:
    found = agreement(ours, dense)
    varied = len({tuple(answer.tokens) for answer in dense}) == len(dense)
    figure = (
        f"{found.requests} requests, {found.tokens} tokens equal, {found.ties} part at a tie; dense "
        f"backend of float32: {dense_name}"
    )
    problems = [*found.wrong, *(["the answers do not vary"] if not varied else [])]
    return checked(
        f"{model}: float32 tokens",
        found.is_right and varied,
        "; ".join([figure, *problems]),
        f"{sum(len(answer.tokens) for answer in dense)} equal, at most {MAX_TIES} tie (log-probs "
        f"within {TIE:g})",
    )


def bfloat16_row(
    model: str, dense_name: str, ours: list[Answer], dense: list[Answer], exact: list[Answer]
) -> Row:
    """Both against the dense float32 answers; ours may be off by twice what the dense backend is."""
    our_errors, dense_errors = log_prob_errors(ours, exact), log_prob_errors(dense, exact)
    check = f"{model}: bfloat16 log-probs"
    if min(len(our_errors), len(dense_errors)) < len(exact) or max(dense_errors) == 0:
        figure = f"{len(our_errors)} and {len(dense_errors)} to compare, or without any error"
        return checked(check, False, figure, "one a request and more")
    error, own, bound = max(our_errors), max(dense_errors), 2 * max(dense_errors)
    means = tuple(sum(errors) / len(errors) for errors in (our_errors, dense_errors))
    return checked(
        check,
        error <= bound,
        f"largest error {error:.4f}, mean {means[0]:.4f} ({len(our_errors)} log-probs); {dense_name} "
        f"itself {own:.4f}, mean {means[1]:.4f} ({len(dense_errors)})",
        f"<= {bound:.4f}, twice {dense_name}'s largest",
    )
