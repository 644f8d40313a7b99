"""Segments of several sizes: which a request wants, which it finds, what replaces what, and how much
memory all of them take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import (
    Layer,
    Rule,
    assert_same_sample,
    best_cover,
    expected_sample,
    pool,
)
from request_lives import BLOCK, HEADS, NUM_TABLES, Engine, Request

from vllm_magicpig import _C, capacity

LEVELS = [(32,), (64,), (32, 64), (32, 64, 128), (64, 192), (32, 96, 192), (32, 256)]
Source = tuple[int, int]  # block, epoch


class SlowIndex:
    """What the index must hold, by plain comparison: no maps by first or last block."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.segments: list[tuple[Source, ...]] = []

    def sources(self, blocks: Sequence[int], begin: int, end: int) -> tuple[Source, ...]:
        size = self.layer.block_size
        some = [int(block) for block in blocks[begin // size : end // size]]
        return tuple((block, self.layer.pages.epoch(block)) for block in some)

    def shared(self, segment: tuple[Source, ...], blocks: Sequence[int], begin: int) -> int:
        """Tokens from `begin` on that it holds of these full blocks, in whole smallest segments."""
        own = self.sources(blocks, begin, begin + len(segment) * BLOCK)
        same = [one == other for one, other in zip(segment, own, strict=False)]
        return (
            [*same, False].index(False) * BLOCK // min(self.layer.levels) * min(self.layer.levels)
        )

    def find(self, blocks: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
        """At each place the segment that holds most of the request, and that mostly of it."""
        full = blocks[: num_tokens // BLOCK]
        found, begin = [], 0
        while begin < num_tokens:
            held = [
                self.shared(segment, full, begin)
                for segment in self.segments
                if begin % (len(segment) * BLOCK) == 0
                and 2 * self.shared(segment, full, begin) >= len(segment) * BLOCK
            ]
            if held and max(held) > 0:
                found.append((begin, begin + max(held)))
            begin += max(held, default=0) or min(self.layer.levels)
        return found

    def wanted(self, request: Request) -> list[tuple[int, int, bool]]:
        """(begin, end, whether there is one that stands for it) of the request's stretches."""
        num_tokens = request.codes.shape[1]
        ends = dict(self.find(request.blocks, num_tokens))
        wanted, begin = [], 0
        while num_tokens - begin >= min(self.layer.levels):
            tokens = max(
                size
                for size in self.layer.levels
                if size <= num_tokens - begin and begin % size == 0
            )
            held = ends.get(begin, begin) - begin
            sealed = held >= tokens - tokens // 8
            wanted.append((begin, begin + tokens, sealed))
            begin += held if sealed else tokens
        return wanted

    def missing(self, requests: list[Request]) -> list[list[int]]:
        wanted: dict[tuple[int, int], tuple[bool, list[int]]] = {}
        for request in requests:
            for begin, end, sealed in self.wanted(request):
                blocks = request.blocks[begin // BLOCK : end // BLOCK]
                # The first request of the batch has what ends in this block.
                wanted.setdefault((len(blocks), blocks[-1]), (sealed, blocks))
        return [blocks for sealed, blocks in wanted.values() if not sealed]

    def seal(self, requests: list[Request]) -> None:
        missing = self.missing(requests)
        self.segments = [
            segment for segment in self.segments
            if all(self.layer.pages.epoch(block) == epoch for block, epoch in segment)
        ]  # fmt: skip
        for blocks in missing:
            tokens = len(blocks) * BLOCK
            held = dict(self.find(blocks, tokens)).get(0, 0)
            if held >= tokens - tokens // 8:
                continue  # of one before it
            new = self.sources(blocks, 0, tokens)
            self.segments = [old for old in self.segments if not self.replaces(new, old)]
            self.segments.append(new)

    @staticmethod
    def replaces(new: tuple[Source, ...], old: tuple[Source, ...]) -> bool:
        same_place = len(old) == len(new) and old[-1][0] == new[-1][0]
        n = len(old)
        return same_place or any(new[i : i + n] == old for i in range(0, len(new), n))

    def num_bytes(self) -> int:
        return sum(
            capacity.segment_bytes(HEADS, 2, NUM_TABLES, BLOCK, len(segment) * BLOCK)
            for segment in self.segments
        )


class LevelEngine(Engine):
    def __init__(self, seed: int, levels: Sequence[int]) -> None:
        super().__init__(seed, levels)
        self.slow = SlowIndex(self.layer)

    def seal(self, requests: list[Request]) -> None:
        missing = self.layer.index.missing(*self.batch(requests))
        assert sorted(missing) == sorted(self.slow.missing(requests))
        before = self.layer.index.changes
        super().seal(requests)
        assert not missing or self.layer.index.changes > before
        self.slow.seal(requests)

    def step(self, action: str) -> None:
        super().step(action)
        if action == "clear" and self.layer.index.num_segments == 0:
            self.slow.segments.clear()

    def check_memory(self) -> None:
        index = self.layer.index
        assert index.num_segments == index.segments_built - index.segments_dropped
        assert index.num_segments == len(self.slow.segments)
        assert index.num_bytes == self.slow.num_bytes()
        for request in self.running:
            num_tokens = request.codes.shape[1]
            found = index.find(np.array(request.blocks, np.int32), num_tokens)
            assert found == self.slow.find(request.blocks, num_tokens)


ACTIONS = st.sampled_from(
    ["new", "share", "append", "append", "free", "preempt", "resume", "seal", "seal", "clear"]
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**20),
    levels=st.sampled_from(LEVELS),
    actions=st.lists(ACTIONS, min_size=5, max_size=40),
)
def test_the_index_holds_finds_and_lacks_what_the_slow_one_does(
    seed: int, levels: Sequence[int], actions: list[str]
) -> None:
    engine = LevelEngine(seed, levels)
    for action in actions:
        engine.step(action)
        engine.check()
    engine.seal(engine.running)
    engine.check()


def random_codes(num_tokens: int, num_tables: int = 8, num_codes: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (1, num_tokens, num_tables)
    return torch.randint(0, num_codes, shape, generator=generator, dtype=torch.int32)


def test_a_growing_request_has_the_sample_of_a_fresh_one() -> None:
    """Token by token through all levels; each is sorted once per level and no more."""
    levels, num_tokens = [32, 64, 256], 600
    codes = random_codes(num_tokens)
    query_codes = codes[:, 77].repeat(2, 1)
    isa = _C.resolve_isa("auto")
    grown = Layer(19, levels=levels)
    blocks = np.arange(19, dtype=np.int32)
    for length in range(1, num_tokens + 1):
        grown.store_codes(blocks, length - 1, codes[:, length - 1 : length])
        grown.index.seal(blocks[None], np.array([length], np.int32), pool())
        assert grown.index.find(blocks, length) == best_cover(length, levels)
        fresh = Layer(19, levels=levels)
        fresh.store_codes(blocks, 0, codes[:, :length])
        expected = expected_sample(query_codes, codes[:, :length], Rule())
        for layer in (grown, fresh):
            (found,) = layer.sample(query_codes[None], blocks[None], [length], Rule(), isa)
            assert_same_sample(found, expected)
        fresh.index.seal(blocks[None], np.array([length], np.int32), pool())
        assert fresh.index.find(blocks, length) == best_cover(length, levels)
        assert fresh.index.num_bytes == grown.index.num_bytes
    # Of 18 full 32s, every other completes a 64; of 9 of those, two complete a 256.
    assert grown.index.segments_built == 9 + 7 + 2


def test_requests_of_different_lengths_share_a_prefix() -> None:
    """The short one has the long one's large segment, which reaches beyond it."""
    layer = Layer(40, levels=[32, 64, 256])
    codes = random_codes(40 * 32)
    layer.store_codes(np.arange(40), 0, codes)
    long, short = (
        np.arange(10, dtype=np.int32),
        np.array([0, 1, 2, 3, 4, 20, 21, 22, 23, 24], np.int32),
    )

    def seal(*requests: tuple[np.ndarray, int]) -> int:
        tables, lens = zip(*requests, strict=True)
        return layer.index.seal(np.stack(tables), np.array(lens, np.int32), pool())

    assert seal((short, 170)) == 3  # 0 to 63, 64 to 127, 128 to 159
    assert layer.index.find(long, 320) == [(0, 64), (64, 128), (128, 160)]
    assert seal((long, 320)) == 2  # 0 to 255 and 256 to 319
    assert layer.index.find(long, 320) == [(0, 256), (256, 320)]
    assert layer.index.find(short, 170) == [(0, 160)], "as far as the long one's agrees"
    assert layer.index.find(short, 159) == [(0, 128)], "in whole small segments"
    assert layer.index.find(short, 127) == [], "less than half of it would be read in vain"
    assert seal((short, 170), (long, 320)) == 0, "both have what they want"
    query_codes = codes[None, :, 40].repeat(1, 2, 1)
    isa = _C.resolve_isa("auto")
    for table, length in ((long, 320), (short, 170)):
        (found,) = layer.sample(query_codes, table[None], [length], Rule(), isa)
        held = codes.unflatten(1, (40, 32))[:, table].flatten(1, 2)[:, :length]
        assert_same_sample(found, expected_sample(query_codes[0], held, Rule()))


def test_a_stale_block_takes_the_large_segment_and_what_lies_behind_it() -> None:
    layer = Layer(8, levels=[32, 64, 256])
    blocks = np.arange(8, dtype=np.int32)
    layer.store_codes(blocks, 0, random_codes(256))
    lens = np.array([256], np.int32)
    index = layer.index
    for length in (64, 255):
        index.seal(blocks[None], np.array([length], np.int32), pool())
    assert index.find(blocks, 255) == [(0, 64), (64, 128), (128, 192), (192, 224)]
    layer.pages.note_writes(np.array([3 * 32], np.int64))
    assert index.find(blocks, 255) == [(0, 64), (64, 96), (128, 192), (192, 224)]
    assert index.seal(blocks[None], lens, pool()) == 1
    assert index.find(blocks, 256) == [(0, 256)]
    assert (index.num_segments, index.segments_dropped) == (1, 4)
    layer.pages.note_writes(np.array([5 * 32], np.int64))
    assert index.find(blocks, 256) == [(0, 160)], "what lies before it"
    assert index.seal(blocks[None], np.array([31], np.int32), pool()) == 0
    assert (index.num_segments, index.num_bytes) == (0, 0)


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_memory_is_bounded_and_what_has_no_room_is_counted(room: int) -> None:
    """Room for so many segments of 64 tokens, of the four that are wanted."""
    size = capacity.segment_bytes(1, 3, 8, 32, 64)
    layer = Layer(10, levels=[64, 256], max_bytes=room * size or 1)
    blocks = np.arange(10, dtype=np.int32)
    codes = random_codes(320)
    layer.store_codes(blocks, 0, codes)
    index, lens = layer.index, np.array([255], np.int32)
    assert len(index.missing(blocks[None], lens)) == 3
    assert index.seal(blocks[None], lens, pool()) == min(room, 3)
    assert index.num_bytes == min(room, 3) * size <= index.max_bytes
    refused = 3 - min(room, 3)
    assert index.builds_refused == refused
    # Nothing was freed: to ask again would be in vain, and counts nothing.
    assert index.missing(blocks[None], lens) == [] or refused == 0
    assert index.seal(blocks[None], lens, pool()) == 0
    assert index.builds_refused == refused
    query_codes = codes[None, :, 77].repeat(1, 2, 1)
    (found,) = layer.sample(query_codes, blocks[None], [255], Rule(), _C.resolve_isa("auto"))
    assert_same_sample(found, expected_sample(query_codes[0], codes[:, :255], Rule()))
    # The large one would need room beside the small ones that serve meanwhile.
    assert index.seal(blocks[None], np.array([256], np.int32), pool()) == 0
    assert index.builds_refused == refused + 1
    assert index.num_segments == min(room, 3)
    # Blocks with a new owner give their room back.
    layer.pages.note_writes(blocks[:2].astype(np.int64) * 32)
    assert index.seal(blocks[None], np.array([64], np.int32), pool()) == (room > 0)


def test_room_for_a_merge_is_room_beside_what_it_replaces() -> None:
    small, large = (capacity.segment_bytes(1, 3, 8, 32, tokens) for tokens in (64, 256))
    blocks = np.arange(8, dtype=np.int32)
    for missing_bytes in (0, 1):
        layer = Layer(8, levels=[64, 256], max_bytes=3 * small + large - missing_bytes)
        layer.store_codes(blocks, 0, random_codes(256))
        layer.index.seal(blocks[None], np.array([255], np.int32), pool())
        assert layer.index.num_bytes == 3 * small
        assert (
            layer.index.seal(blocks[None], np.array([256], np.int32), pool()) == 1 - missing_bytes
        )
        assert layer.index.builds_refused == missing_bytes
        assert len(layer.index.find(blocks, 256)) == (3 if missing_bytes else 1)


def test_around_the_largest_level_of_the_plugin() -> None:
    levels = capacity.segment_levels(128)
    layer = Layer(514, num_tables=2, block_size=128, levels=levels)
    blocks = np.arange(514, dtype=np.int32)
    layer.store_codes(blocks, 0, random_codes(65_537, num_tables=2))
    built = []
    for length in (65_535, 65_536, 65_537):
        built.append(layer.index.seal(blocks[None], np.array([length], np.int32), pool()))
        assert layer.index.find(blocks, length) == best_cover(length, levels)
    assert built == [6, 1, 0]  # one of each smaller level, then all in one
    assert layer.index.num_segments == 1
