"""Random lives of requests: the sample is always that of the codes each request holds."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import Layer, Rule, assert_same_sample, expected_sample, pool

from vllm_magicpig import _C

NUM_BLOCKS, BLOCK, SEGMENT = 14, 32, 64
NUM_TABLES, NUM_CODES = 6, 3
HEADS, GROUP = 2, 2


@dataclass
class Request:
    blocks: list[int]
    codes: torch.Tensor  # [HEADS, n, L], what the request logically holds


class Engine:
    """Allocation as an engine with prefix caching does it; every live request is checked."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = Layer(
            NUM_BLOCKS, HEADS, NUM_TABLES, 2, block_size=BLOCK, segment_tokens=SEGMENT
        )
        self.users = [0] * NUM_BLOCKS
        self.content: list[torch.Tensor | None] = [None] * NUM_BLOCKS  # of full blocks
        self.running: list[Request] = []
        self.preempted: list[Request] = []

    def codes(self, num_tokens: int) -> torch.Tensor:
        shape = (HEADS, num_tokens, NUM_TABLES)
        return torch.randint(0, NUM_CODES, shape, generator=self.generator, dtype=torch.int32)

    def append(self, request: Request, codes: torch.Tensor) -> None:
        """As far as blocks last. The last block freed is the first to be used again."""
        start = request.codes.shape[1]
        while len(request.blocks) * BLOCK < start + codes.shape[1]:
            free = [b for b in range(NUM_BLOCKS) if self.users[b] == 0]
            if not free:
                codes = codes[:, : len(request.blocks) * BLOCK - start]
                break
            block = self.random.choice(free)
            self.users[block] = 1
            self.content[block] = None
            request.blocks.append(block)
        if codes.shape[1] == 0:
            return
        rows = torch.zeros(HEADS, codes.shape[1], 16)
        self.layer.store_rows(request.blocks, start, rows, rows)
        self.layer.store_codes(request.blocks, start, codes)
        request.codes = torch.cat([request.codes, codes], dim=1)
        for i in range(request.codes.shape[1] // BLOCK):
            self.content[request.blocks[i]] = request.codes[:, i * BLOCK : (i + 1) * BLOCK]

    def start(self, codes: torch.Tensor, candidates: list[int]) -> None:
        """Takes the leading full blocks that still hold these codes, and writes the rest."""
        request = Request([], codes[:, :0])
        for i, block in enumerate(candidates[: codes.shape[1] // BLOCK]):
            piece = codes[:, i * BLOCK : (i + 1) * BLOCK]
            content = self.content[block]
            if content is None or not torch.equal(content, piece):
                break
            self.users[block] += 1
            request.blocks.append(block)
        request.codes = codes[:, : len(request.blocks) * BLOCK]
        self.append(request, codes[:, len(request.blocks) * BLOCK :])
        self.running.append(request)

    def release(self, request: Request) -> None:
        self.running.remove(request)
        for block in request.blocks:
            self.users[block] -= 1

    def batch(self, requests: list[Request]) -> tuple[np.ndarray, np.ndarray]:
        tables = np.full((len(requests), NUM_BLOCKS), -7, np.int32)
        for row, request in enumerate(requests):
            tables[row, : len(request.blocks)] = request.blocks
        return tables, np.array([r.codes.shape[1] for r in requests], np.int32)

    def step(self, action: str) -> None:
        index = self.layer.index
        one = self.random.choice(self.running) if self.running else None
        if action == "new":
            self.start(self.codes(self.random.randrange(1, 200)), [])
        elif action == "share" and one:
            shared = one.codes[:, : self.random.randrange(one.codes.shape[1] + 1)]
            suffix = self.codes(self.random.randrange(1, 100))
            self.start(torch.cat([shared, suffix], dim=1), one.blocks)
        elif action == "append" and one:
            self.append(one, self.codes(self.random.randrange(1, 80)))
        elif action == "free" and one:
            self.release(one)
        elif action == "preempt" and one:
            self.release(one)
            self.preempted.append(one)
        elif action == "resume" and self.preempted:
            old = self.preempted.pop(self.random.randrange(len(self.preempted)))
            self.start(old.codes, old.blocks)
        elif action == "seal":
            some = [r for r in self.running if self.random.random() < 0.7]
            built = index.segments_built
            assert index.seal(*self.batch(some), pool()) == index.segments_built - built
        elif action == "clear" and self.random.random() < 0.2:
            index.clear()
            assert index.num_bytes == 0

    def check(self) -> None:
        index = self.layer.index
        per_head = NUM_TABLES * (SEGMENT + 4 + 2) * 2
        sources = SEGMENT // BLOCK * 16
        assert index.num_segments == index.segments_built - index.segments_dropped
        assert index.num_bytes == index.num_segments * (HEADS * per_head + sources)
        if not self.running:
            return
        shape = (len(self.running), HEADS * GROUP, NUM_TABLES)
        query_codes = torch.randint(
            0, NUM_CODES, shape, generator=self.generator, dtype=torch.int32
        )
        rule = Rule(self.random.choice([1, 2, 3]), self.random.choice([0, 4]), 16)
        isa = self.random.choice([_C.Isa.portable, _C.resolve_isa("auto")])
        found = self.layer.sample(query_codes, *self.batch(self.running), rule, isa)
        for row, request in enumerate(self.running):
            expected = expected_sample(query_codes[row], request.codes, rule)
            assert_same_sample(found[row], expected)


ACTIONS = st.sampled_from(
    ["new", "share", "append", "append", "free", "preempt", "resume", "seal", "seal", "clear"]
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**20), actions=st.lists(ACTIONS, min_size=5, max_size=40))
def test_the_sample_follows_the_codes_of_each_request(seed: int, actions: list[str]) -> None:
    engine = Engine(seed)
    for action in actions:
        engine.step(action)
        engine.check()
    engine.layer.index.clear()
    assert engine.layer.index.num_bytes == 0
    assert engine.layer.index.num_segments == 0


def test_a_reused_block_never_matches_an_old_segment() -> None:
    layer = Layer(2)
    codes = torch.zeros(1, 64, 8, dtype=torch.int32)
    rows = torch.zeros(1, 64, 16)
    tables, lens = np.array([[0, 1]], np.int32), np.array([64], np.int32)
    layer.store_rows([0, 1], 0, rows, rows)
    layer.store_codes([0, 1], 0, codes)
    assert layer.index.seal(tables, lens, pool()) == 1
    query_codes = torch.zeros(1, 1, 8, dtype=torch.int32)
    isa, rule = _C.resolve_isa("auto"), Rule(2, 0, 0)
    assert layer.sample(query_codes, tables, lens, rule, isa)[0][0].size == 64

    # The first block alone gets a new owner; the segment is found by the last one.
    layer.store_rows([0], 0, rows[:, :32], rows[:, :32])
    layer.store_codes([0], 0, codes[:, :32] + 1)
    assert layer.index.count_sealed(tables[0], 64) == 0
    assert layer.index.num_segments == 1, "stale segments are freed by the next seal"
    assert layer.sample(query_codes, tables, lens, rule, isa)[0][0].tolist() == [*range(32, 64)]
    assert layer.index.seal(tables, np.array([63], np.int32), pool()) == 0
    assert (layer.index.num_segments, layer.index.num_bytes) == (0, 0)
    assert layer.index.seal(tables, lens, pool()) == 1
    assert layer.sample(query_codes, tables, lens, rule, isa)[0][0].tolist() == [*range(32, 64)]
    # Blocks in another order are another stretch.
    assert layer.index.count_sealed(np.array([1, 0], np.int32), 64) == 0
