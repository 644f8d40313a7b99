"""A step whose metadata is on a device: what Python knows, what goes to pinned memory, the spans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from test_step import metadata

from vllm_magicpig.device_buffers import StepBuffers
from vllm_magicpig.device_step import DeviceStep, make_device_step


def step_of(
    query_lens: list[int], seq_lens: list[int], prefilling: list[bool], **changes: Any
) -> DeviceStep:
    device = FakeDevice()
    made = metadata(query_lens, seq_lens, prefilling, **changes)
    made.seq_lens_cpu_upper_bound = made.seq_lens
    made.query_start_loc = made.query_start_loc_cpu
    buffers = StepBuffers(device, max_reqs=8, max_blocks=4, max_tokens=64)
    step = make_device_step(made, device, buffers)
    device.synchronize()
    return step


def test_the_devices_metadata_arrives_in_pinned_memory() -> None:
    step = step_of([1, 5, 1], [8, 5, 9], [False, True, False])
    assert step.buffers.seq_lens[:3].tolist() == [8, 5, 9]
    assert step.buffers.slots[:7].tolist() == list(range(7))
    assert step.buffers.block_tables[:3].tolist() == torch.arange(12).view(3, 4).tolist()


@pytest.mark.parametrize("width", [1, 3, 5, 9])
def test_vllms_block_tables_may_be_narrower_or_wider_than_ours(width: int) -> None:
    """The width of its runner, ours is 4. A wider one holds no block past max_model_len."""
    tables = torch.arange(1, 3 * width + 1, dtype=torch.int32).view(3, width)
    tables[:, 4:] = 0
    step = step_of([1, 1, 1], [8, 7, 9], [False] * 3, block_table_tensor=tables)
    common = min(width, 4)
    assert step.buffers.block_tables[:3, :common].tolist() == tables[:, :common].tolist()
    assert not step.buffers.block_tables[:3, common:].any()


def test_adjacent_chunks_are_one_span_and_a_decode_between_them_parts_it() -> None:
    step = step_of([3, 4, 1, 5], [3, 10, 7, 5], [True, True, False, True])
    assert [span.tokens for span in step.spans] == [slice(0, 7), slice(8, 13)]
    assert [span.queries.lens for span in step.spans] == [(3, 4), (5,)]
    assert [span.queries.starts.tolist() for span in step.spans] == [[0, 3, 7], [0, 5]]
    assert [chunk.context_len for chunk in step.chunks] == [0, 6, 0]


@pytest.mark.parametrize(
    ("prefilling", "index"),
    [
        ([False, False, False], slice(0, 3)),
        ([True, False, False], slice(1, 3)),
        ([True, True, True], slice(0, 0)),
    ],
)
def test_decode_tokens_in_a_row_are_a_slice(prefilling: list[bool], index: slice) -> None:
    assert step_of([1, 1, 1], [4, 5, 6], prefilling).decode_index == index


def test_decode_tokens_apart_are_an_index_on_the_device() -> None:
    index = step_of([1, 2, 1], [4, 5, 6], [False, True, False]).decode_index
    assert isinstance(index, torch.Tensor)
    assert index.tolist() == [0, 3]


def test_padded_requests_are_neither() -> None:
    step = step_of([1, 0, 0], [4, 0, 0], [False, False, False])
    assert step.num_decodes == 1
    assert step.spans == ()
