"""The parts of gpu-check that judge answers: exact mode and the recall model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_check_parts as parts
import pytest
from gpu_check_children import DONE, Ended
from gpu_check_helpers import context
from gpu_check_jobs import read_job
from gpu_check_parity import (
    Answer,
    agreement_row,
    bfloat16_row,
    log_prob_errors,
    parity_rows,
    parity_tasks,
)
from gpu_check_recall import recall_row
from gpu_check_report import FAILED, MEASURED, NOT_RUN, PASSED, Row
from gpu_check_scale import GPU

from vllm_magicpig.config import parse_options

# ------------------------------------------------------------------------------------------- parity


def answer(tokens: list[int], gap: float = 1.0, best: float = -1.0) -> Answer:
    """The runner-up of each step is the token's successor, `gap` below it."""
    return Answer(tokens, [{token: best, token + 1: best - gap} for token in tokens])


def test_how_far_two_roundings_agree_is_told() -> None:
    dense = [answer([1, 2, 3]), answer([4, 5, 6])]
    ours = [answer([1, 2, 3]), answer([4, 9, 6])]
    row = agreement_row("llama", "FLASH_ATTN", ours, dense)
    assert row.result == MEASURED
    assert row.figure == "4 of 6 tokens equal to FLASH_ATTN's; request 1 parts at token 1"


def test_answers_have_to_vary() -> None:
    same = [answer([1, 2])] * 2
    row = agreement_row("llama", "FLASH_ATTN", same, same)
    assert row.result == FAILED
    assert "do not vary" in row.figure


def answered(
    name: str, tokens: list[list[int]], backend: str, state: str = DONE, best: float = -1.0
) -> parts.Answered:
    events: list[dict[str, Any]] = [{"backends": {"0": backend}}]
    for one in tokens:
        logprobs = [list(step.items()) for step in answer(one, best=best).logprobs]
        events.append({"answer": {"tokens": one, "logprobs": logprobs}})
    return parts.Answered(Ended(name, state, "cut after 9 s", 9.0, ""), events)


def parity_of(**changed: parts.Answered) -> list[Row]:
    texts = [[1, 2, 3], [4, 5, 6]]
    runs = {
        "bfloat16-ours": answered("bfloat16-ours", texts, "MAGICPIG", best=-1.1),
        "bfloat16-dense": answered("bfloat16-dense", texts, "FLASH_ATTN", best=-1.1),
        "float32-dense": answered("float32-dense", texts, "TRITON_ATTN"),
    }
    return parity_rows("llama", runs | {one.ended.name: one for one in changed.values()})


def test_parity_needs_no_more_than_what_was_reached() -> None:
    tokens, logprobs = parity_of()
    assert (tokens.result, logprobs.result) == (MEASURED, PASSED)
    cut = answered("float32-dense", [[1, 2, 3]], "TRITON_ATTN", NOT_RUN)
    assert [row.result for row in parity_of(cut=cut)] == [NOT_RUN, MEASURED]
    broken = answered("bfloat16-ours", [], "MAGICPIG", FAILED)
    assert [row.result for row in parity_of(broken=broken)] == [FAILED]


def test_parity_of_an_engine_without_magicpig_fails() -> None:
    dense = answered("bfloat16-ours", [[1, 2, 3], [4, 5, 6]], "FLASH_ATTN", best=-1.1)
    row = parity_of(dense=dense)[0]
    assert (row.result, row.figure) == (FAILED, "every layer runs FLASH_ATTN")


def test_errors_end_where_texts_part() -> None:
    exact = answer([1, 2, 3, 4])
    ours = answer([1, 2, 3, 4], best=-1.25)
    assert log_prob_errors([ours], [exact]) == [0.25] * 4
    # The token that is no longer said is still among the likeliest of that step, as the second.
    parted = Answer([1, 9, 3, 4], [{1: -1.0}, {9: -0.5, 2: -1.5}, {3: -9.0}, {4: -9.0}])
    assert log_prob_errors([parted], [exact]) == [0.0, 0.5]


@pytest.mark.parametrize(("error", "result"), [(0.19, PASSED), (0.21, FAILED)])
def test_bfloat16_may_err_twice_as_much_as_the_dense_backend(error: float, result: str) -> None:
    exact, dense = answer([1, 2], best=-1.0), answer([1, 2], best=-1.1)
    row = bfloat16_row("llama", "FLASH_ATTN", [answer([1, 2], best=-1 - error)], [dense], [exact])
    assert row.result == result
    assert row.bar == "<= 0.2000, twice FLASH_ATTN's largest"


def test_bfloat16_without_anything_to_compare_is_no_success() -> None:
    exact = answer([1, 2])
    foreign = Answer([7, 8], [{7: -1.0}, {8: -1.0}])
    assert bfloat16_row("llama", "FLASH_ATTN", [foreign], [foreign], [exact]).result == FAILED
    assert bfloat16_row("llama", "FLASH_ATTN", [exact], [exact], [exact]).result == FAILED


def test_engines_side_by_side_take_a_stated_share_of_everything(tmp_path: Path) -> None:
    """By default each would ask for most of the GPU, and pin most of the free RAM."""
    tasks = parity_tasks(context(tmp_path, GPU))
    assert list(tasks) == ["bfloat16-ours", "bfloat16-dense", "float32-dense"]
    for name in tasks:
        job = read_job(tmp_path / f"{name}.json")
        assert job.arguments["kv_cache_memory_bytes"] == GPU.parity.kv_cache_bytes
        assert job.arguments["gpu_memory_utilization"] * len(tasks) < 0.7
        if name.endswith("-ours"):
            assert job.backend == "magicpig"
            assert job.options["K"] == 0
            assert job.options["dense_layers"] == [0]
            assert job.options["host_kv_cache_gib"] <= 2
            parse_options({"magicpig": job.options})
        else:
            assert job.options is None
            assert job.backend == (None if "float32" in name else "FLASH_ATTN")
        assert tasks[name].child.environment["TRITON_F32_DEFAULT"] == "ieee"


# ------------------------------------------------------------------------------------------- recall


def recalled(words: int, sampled: int | None = None) -> dict[str, Any]:
    """10 questions of 5 words; 100,000 rows in the middle."""
    each = [5] * (words // 5) + [words % 5] * bool(words % 5)
    stats = [{"middle_rows": 7, "sampled_rows": 3}]
    if sampled is not None:
        stats.append({"middle_rows": 100_007, "sampled_rows": 3 + sampled})
    each += [0] * (10 - len(each))
    return {
        "length": 16384,
        "words_right": each,
        "words_each": 5,
        "before": stats[0],
        "after": stats[-1],
    }


@pytest.mark.parametrize(
    ("ours", "dense", "sampled", "result"),
    [
        (50, 50, 2000, PASSED),
        (49, 50, 2000, PASSED),
        (48, 50, 2000, FAILED),  # less than 98 % of what dense attention knows
        (47, 47, 2000, FAILED),  # the model itself does not know
        (50, 50, 0, FAILED),  # nothing was sampled
        (50, 50, 5001, FAILED),  # nearly everything was
    ],
)
def test_recall_needs_right_words_from_few_rows(
    ours: int, dense: int, sampled: int, result: str
) -> None:
    row = recall_row(recalled(ours, sampled), recalled(dense), "FLASH_ATTN", 0.05)
    assert row.result == result
    assert f"({ours} of 50 words)" in row.figure
    assert f"{sampled / 1000:.2f} %" in row.figure
