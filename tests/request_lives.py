"""Allocation as an engine with prefix caching does it: random lives of requests over one layer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from native_helpers import Layer, Rule, assert_same_sample, expected_sample, pool

from vllm_magicpig import _C

NUM_BLOCKS, BLOCK, SEGMENT = 14, 32, 64
NUM_TABLES, NUM_CODES = 6, 3
HEADS, GROUP = 2, 2


@dataclass(eq=False)
class Request:
    blocks: list[int]
    codes: torch.Tensor  # [HEADS, n, L], what the request logically holds


class Engine:
    """Allocation as an engine with prefix caching does it; every live request is checked."""

    def __init__(self, seed: int, levels: Sequence[int] = (SEGMENT,)) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = Layer(NUM_BLOCKS, HEADS, NUM_TABLES, 2, block_size=BLOCK, levels=levels)
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
            block = self.choose(free)
            self.users[block] = 1
            self.content[block] = None
            request.blocks.append(block)
        if codes.shape[1] == 0:
            return
        self.write(request, codes)
        request.codes = torch.cat([request.codes, codes], dim=1)
        for i in range(request.codes.shape[1] // BLOCK):
            self.content[request.blocks[i]] = request.codes[:, i * BLOCK : (i + 1) * BLOCK]

    def choose(self, free: list[int]) -> int:
        return self.random.choice(free)

    def write(self, request: Request, codes: torch.Tensor) -> None:
        """Behind what the request holds."""
        start = request.codes.shape[1]
        rows = torch.zeros(HEADS, codes.shape[1], 16)
        self.layer.store_rows(request.blocks, start, rows, rows)
        self.layer.store_codes(request.blocks, start, codes)

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
            self.seal([r for r in self.running if self.random.random() < 0.7])
        elif action == "clear" and self.random.random() < 0.2:
            self.layer.index.clear()

    def seal(self, requests: list[Request]) -> None:
        index, built = self.layer.index, self.layer.index.segments_built
        assert index.seal(*self.batch(requests), pool()) == index.segments_built - built

    def check(self) -> None:
        self.check_memory()
        self.check_sample()

    def check_memory(self) -> None:
        """Segments of one level only."""
        index = self.layer.index
        per_head = NUM_TABLES * (SEGMENT + 4 + 2) * 2
        sources = SEGMENT // BLOCK * 16
        assert index.num_segments == index.segments_built - index.segments_dropped
        assert index.num_bytes == index.num_segments * (HEADS * per_head + sources)

    def check_sample(self) -> None:
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
