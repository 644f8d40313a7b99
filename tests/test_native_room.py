"""Index memory that does not do: what is dropped for what, and what stands for large segments."""

from __future__ import annotations

import numpy as np
import torch
from native_helpers import Layer, Rule, assert_same_sample, expected_sample, pool

from vllm_magicpig import _C, capacity

LEVELS = (32, 64, 128, 256)
SIZES = {tokens: capacity.segment_bytes(1, 3, 8, 32, tokens) for tokens in LEVELS}
ISA = _C.resolve_isa("auto")
IDLE_LOOKUPS = 16  # LshIndex::kIdleLookups


class Room:
    """16 blocks of 32 tokens, room for segments of these sizes."""

    def __init__(self, *tokens: int) -> None:
        self.layer = Layer(16, levels=LEVELS, max_bytes=sum(SIZES[size] for size in tokens))
        generator = torch.Generator().manual_seed(3)
        self.codes = torch.randint(0, 8, (1, 512, 8), generator=generator)
        self.layer.store_codes(np.arange(16), 0, self.codes)
        assert self.layer.index is not None
        self.index = self.layer.index

    def seal(self, *tables: list[int]) -> None:
        """Until nothing more is wanted, as steps do."""
        blocks = np.array(tables, np.int32)
        lens = np.full(len(tables), 32 * blocks.shape[1], np.int32)
        for _ in range(8):
            self.index.seal(blocks, lens, pool())
        assert self.index.missing(blocks, lens) == []
        assert self.index.num_bytes <= self.index.max_bytes

    def find(self, table: list[int]) -> list[tuple[int, int]]:
        return self.index.find(np.array(table, np.int32), 32 * len(table))

    def look_up(self, table: list[int], times: int = 1) -> None:
        held = self.codes.unflatten(1, (16, 32))[:, table].flatten(1, 2)
        query = self.codes[:, 40].repeat(2, 1)
        for _ in range(times):
            (found,) = self.layer.sample(query[None], [table], [32 * len(table)], Rule(), ISA)
            assert_same_sample(found, expected_sample(query, held, Rule()))


FIRST = [*range(8)]
SECOND, THIRD = [*range(7), 8], [*range(7), 9]  # part from it in the last block


def test_requests_that_part_late_share_a_large_segment() -> None:
    """Three samples of one prompt, or three questions about one document."""
    room = Room(256, 32, 32)
    room.seal(FIRST, SECOND, THIRD)
    assert room.index.builds_refused == 0
    assert room.find(FIRST) == [(0, 256)]
    for table in (SECOND, THIRD):
        assert room.find(table) == [(0, 224), (224, 256)]
    for table in (FIRST, SECOND, THIRD):
        room.look_up(table)
    # Where the owner of the large one goes, the others want one of their own.
    room.layer.pages.note_writes(np.array([7 * 32], np.int64))
    room.seal(SECOND, THIRD)
    assert room.find(SECOND) == [(0, 256)]
    assert room.find(THIRD) == [(0, 224), (224, 256)]


def test_where_a_large_segment_has_no_room_smaller_ones_take_its_place() -> None:
    room = Room(256, 128, 64, 32)
    early = [*range(3), 10, 11, 12, 13, 14]  # parts from the first in its first half
    room.seal(FIRST, early)
    assert room.index.builds_refused > 0
    assert room.find(FIRST) == [(0, 256)]
    assert room.find(early) == [(0, 128), (128, 192), (192, 224)]
    for table in (FIRST, early):
        room.look_up(table)


def test_idle_segments_make_room_and_used_ones_do_not() -> None:
    room = Room(256, 32)
    other = [*range(8, 16)]
    room.seal(FIRST)
    room.look_up(FIRST)
    assert room.find(FIRST) == [(0, 256)]
    room.seal(other)
    assert room.find(FIRST) == [(0, 256)], "the last lookup used it"
    assert room.find(other) == [(0, 32)]
    assert room.index.builds_refused > 0
    # The first has ended, and time has passed since the refusal: who looks up does not find it.
    room.look_up([8, 9, 10, 11], 4 * IDLE_LOOKUPS)
    room.seal(other)
    assert room.find(other) == [(0, 256)]
    assert room.find(FIRST) == []
    room.look_up(FIRST)
    room.look_up(other)


def test_the_segment_that_was_idle_for_longest_goes_first() -> None:
    room = Room(128, 128, 64)
    old, young, new = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    room.seal(old, young)
    room.look_up(old)
    room.look_up(young)
    room.look_up([12, 13], IDLE_LOOKUPS)
    room.seal(new)
    assert room.find(old) == []
    assert room.find(young) == [(0, 128)]
    assert room.find(new) == [(0, 128)]
