"""The part that asks the built-in recall model, whose right answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_check_children import DONE
from gpu_check_jobs import EAGER, IN_PROCESS, RecallJob, script_task
from gpu_check_parts import Context, ask, ended_row
from gpu_check_report import Part, Row, checked

# As in tests/e2e/test_recall.py.
MIN_DENSE_SCORE = 0.95
MIN_SCORE_SHARE = 0.98


def run_recall(part: Part, budget_s: float, context: Context) -> None:
    scale, sizes = context.scale, context.scale.recall
    environment = IN_PROCESS if scale.compiles else IN_PROCESS | EAGER
    tasks = []
    for name, backend in (("recall-magicpig", "magicpig"), ("recall-dense", scale.dense_backend)):
        job = RecallJob(
            backend=backend,
            options=scale.small_engine_options(sizes.options) if backend == "magicpig" else None,
            lengths=list(sizes.lengths),
            num_questions=sizes.num_questions,
            arguments={
                "dtype": "bfloat16",
                "max_model_len": max(sizes.lengths) + 256,
                "max_num_batched_tokens": min(8192, max(sizes.lengths)),
                "max_num_seqs": 8,
                "enforce_eager": not scale.compiles,
                "kv_cache_memory_bytes": sizes.kv_cache_bytes,
                **scale.small_engine_arguments(),
            },
        )
        tasks.append(
            script_task(
                name, "gpu_check_engine.py", job, environment, context.scratch, context.results
            )
        )
    answered = ask(part, context, tasks, budget_s, at_once=len(tasks))
    ours, dense = answered["recall-magicpig"], answered["recall-dense"]
    for one in (ours, dense):
        part.raw[one.ended.name]["recall"] = one.all("recall")
        if one.ended.state != DONE:
            part.rows.append(ended_row(one.ended.name, one.ended))
    by_length = {event["length"]: event for event in dense.all("recall")}
    for event in ours.all("recall"):
        if event["length"] in by_length:
            part.rows.append(
                recall_row(
                    event,
                    by_length[event["length"]],
                    scale.dense_backend,
                    sizes.max_sampled_fraction,
                )
            )


def recall_row(
    ours: Mapping[str, Any], dense: Mapping[str, Any], dense_name: str, max_fraction: float
) -> Row:
    our_words, dense_words = sum(ours["words_right"]), sum(dense["words_right"])
    words = dense["words_each"] * len(dense["words_right"])
    middle = ours["after"]["middle_rows"] - ours["before"]["middle_rows"]
    rows = ours["after"]["sampled_rows"] - ours["before"]["sampled_rows"]
    fraction = rows / middle if middle else 0.0
    is_right = (
        dense_words >= MIN_DENSE_SCORE * words
        and our_words >= MIN_SCORE_SHARE * dense_words
        and 0 < fraction < max_fraction
    )
    return checked(
        f"recall at {dense['length']:,} tokens",
        is_right,
        f"magicpig {_score(ours)}, {dense_name} {_score(dense)}; rows sampled: "
        f"{100 * fraction:.2f} % of the middle",
        f"{dense_name} >= {MIN_DENSE_SCORE:.0%} of the words, magicpig >= {MIN_SCORE_SHARE:.0%} of "
        f"{dense_name}'s, from above 0 to {max_fraction:.0%} of the rows",
    )


def _score(event: Mapping[str, Any]) -> str:
    right, each = event["words_right"], event["words_each"]
    questions = sum(words == each for words in right)
    return f"{questions} of {len(right)} questions ({sum(right)} of {each * len(right)} words)"
