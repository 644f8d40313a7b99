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
    script_task,
)
from gpu_check_parts import Answered, Context, ask, ended_row
from gpu_check_report import Part, Row, checked, measured

sys.path.append(str(EXAMPLES))
from compare_setup import SHAPES

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
    answered = ask(part, context, list(tasks.values()), budget_s, at_once=len(tasks))
    part.rows += parity_rows(f"{context.scale.parity.shape} shape", answered)
    part.notes.append(
        "K = 0: exact attention over the pages in host memory; layer 0 is dense, layer 1 is not. "
        "Float32 matrix products of Triton run in full float32 here (TRITON_F32_DEFAULT=ieee). "
        f"The {SHAPE_LAYERS} layers have random weights of unit gain, drawn at loading in place "
        "of load_format=dummy's, whose logits would hide any error."
    )


def two_layers(shape: str, max_len: int) -> dict[str, Any]:
    """The config.json of a shape, cut."""
    lengths = {"max_position_embeddings": max_len}
    return SHAPES[shape] | {"num_hidden_layers": SHAPE_LAYERS} | lengths


def parity_tasks(context: Context) -> dict[str, Task]:
    """DTYPE-SIDE, SIDE one of dense and ours, all at once: the float32 answers are what both sides of
    bfloat16 are measured by."""
    scale, sizes = context.scale, context.scale.parity
    max_len = max(sizes.lengths) + sizes.tokens
    tasks = {}
    for dtype, side in PARITY_RUNS:
        name = f"{dtype}-{side}"
        dense = scale.fp32_backend if dtype == "float32" else scale.dense_backend
        job = AnswerJob(
            config=two_layers(sizes.shape, max_len),
            backend="magicpig" if side == "ours" else dense,
            options=scale.small_engine_options(EXACT) if side == "ours" else None,
            lengths=list(sizes.lengths),
            tokens=sizes.tokens,
            arguments={
                "dtype": dtype,
                "block_size": 32,
                "max_model_len": max_len,
                "max_num_batched_tokens": 1024,
                "max_num_seqs": 8,
                "kv_cache_memory_bytes": sizes.kv_cache_bytes,
                **scale.small_engine_arguments(),
            },
        )
        environment = IN_PROCESS | EAGER | EXACT_FLOAT32
        tasks[name] = script_task(
            name, "gpu_check_engine.py", job, environment, context.scratch, context.results
        )
    return tasks


PARITY_RUNS = (("bfloat16", "ours"), ("bfloat16", "dense"), ("float32", "dense"))
COMPARED = "bfloat16-ours", "bfloat16-dense"


def parity_rows(model: str, answered: Mapping[str, Answered]) -> list[Row]:
    """magicpig's bfloat16 answers beside the dense backend's, by the float32 ones where they exist."""
    rows = [
        ended_row(f"{model}: {name}", run.ended)
        for name, run in answered.items()
        if run.ended.state != DONE
    ]
    ours = answered["bfloat16-ours"]
    names = set((ours.first("backends") or {}).values())
    if names and "MAGICPIG" not in names:
        figure = f"every layer runs {', '.join(sorted(names))}"
        rows.append(checked(f"{model}: layers of magicpig", False, figure, "some"))
    said = {
        name: [Answer.from_event(one) for one in run.all("answer")]
        for name, run in answered.items()
        if run.ended.state == DONE
    }
    if not set(COMPARED) <= set(said):
        return rows
    dense_name = backend_name(answered["bfloat16-dense"])
    rows.append(agreement_row(model, dense_name, said["bfloat16-ours"], said["bfloat16-dense"]))
    if "float32-dense" in said:
        rows.append(
            bfloat16_row(model, dense_name, *(said[n] for n in COMPARED), said["float32-dense"])
        )
    return rows


def backend_name(answered: Answered) -> str:
    return ", ".join(sorted(set(answered.first("backends").values())))


def agreement_row(model: str, dense_name: str, ours: list[Answer], dense: list[Answer]) -> Row:
    """How far two roundings to bfloat16 go together: told, not judged. Judged is that texts vary, so
    that there is something to differ in."""
    equal, parts = 0, []
    for request, (a, b) in enumerate(zip(ours, dense, strict=True)):
        pairs = zip(a.tokens, b.tokens, strict=True)
        parted = next((step for step, (x, y) in enumerate(pairs) if x != y), len(a.tokens))
        equal += parted
        if parted < len(a.tokens):
            parts.append(f"request {request} parts at token {parted}")
    varied = len({tuple(answer.tokens) for answer in dense}) == len(dense)
    total = sum(len(answer.tokens) for answer in dense)
    figure = "; ".join([f"{equal} of {total} tokens equal to {dense_name}'s", *parts])
    if not varied:
        return checked(f"{model}: tokens", False, f"{figure}; the answers do not vary", "they vary")
    return measured(f"{model}: tokens", figure)


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
