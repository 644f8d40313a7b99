"""vLLM's metadata as host arrays: which requests decode, which are prefill, what is padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_magicpig.step import Chunk, make_step


def metadata(
    query_lens: list[int], seq_lens: list[int], prefilling: list[bool] | None, **changes: Any
) -> Any:
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    num_tokens = int(starts[-1])
    made = {
        "query_start_loc_cpu": starts,
        "causal": True,
        "num_reqs": len(query_lens),
        "num_actual_tokens": num_tokens,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "is_prefilling": None if prefilling is None else torch.tensor(prefilling),
        "slot_mapping": torch.arange(num_tokens),
        "block_table_tensor": torch.arange(4 * len(query_lens)).view(-1, 4).to(torch.int32),
    }
    return SimpleNamespace(**made | changes)


def test_one_token_of_a_prompt_is_prefill_and_one_token_after_it_is_decode() -> None:
    step = make_step(metadata([1, 1, 5], [8, 9, 5], [True, False, True]))
    assert step.chunks == (Chunk(0, 0, 1, 7), Chunk(2, 2, 7, 0))
    assert step.decode_rows.tolist() == [1]
    assert step.decode_tokens.tolist() == [1]


def test_several_tokens_after_a_preemption_are_attended_densely() -> None:
    """A resumed request recomputes its output in chunks although it is past its prompt."""
    step = make_step(metadata([6], [20], [False]))
    assert step.chunks == (Chunk(0, 0, 6, 14),)
    assert step.decode_rows.size == 0


def test_padding_is_cut_off() -> None:
    padded = metadata(
        [2, 1],
        [2, 4],
        [True, False],
        num_actual_tokens=8,
        slot_mapping=torch.tensor([5, 6, 7, -1, -1, -1, -1, -1]),
    )
    step = make_step(padded)
    assert step.num_tokens == 3
    assert step.slots.tolist() == [5, 6, 7]


def test_requests_without_tokens_ask_for_nothing() -> None:
    step = make_step(metadata([0, 3], [9, 3], None))
    assert step.chunks == (Chunk(1, 0, 3, 0),)
    assert step.decode_rows.size == 0


def test_dummy_runs_store_nothing() -> None:
    step = make_step(metadata([3], [3], [False], slot_mapping=torch.full((3,), -1)))
    assert step.is_dummy


def test_the_runners_buffers_are_copied() -> None:
    source = metadata([1], [4], [False])
    step = make_step(source)
    source.seq_lens[0] = 99
    source.block_table_tensor[:] = 0
    assert step.seq_lens.tolist() == [4]
    assert step.block_tables.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("causal", [False, torch.tensor([True, False])])
def test_attention_in_both_directions_is_refused(causal: Any) -> None:
    """Whatever vLLM put before the backend or learnt since: never a wrong answer."""
    with pytest.raises(NotImplementedError, match="in both directions, it supports causal"):
        make_step(metadata([2, 1], [2, 9], [True, False], causal=causal))
