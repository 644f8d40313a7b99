"""Random lives of requests while the builder works: the sample is always that of their codes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from builder_helpers import Busy
from fake_driver import FakeDriver
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import Rule, pool
from request_lives import NUM_BLOCKS, Engine, Request
from stream_helpers import CPUS, MAX_REQS, MAX_TOKENS, Buffers, fake_driver

from vllm_magicpig import _C


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with fake_driver() as driver:
        yield driver


class StreamEngine(Engine):
    """Writes as the device does, noted and indexed by callbacks, while the builder, which others
    keep busy, works on what earlier owners of the blocks asked for."""

    def __init__(self, seed: int, driver: FakeDriver) -> None:
        super().__init__(seed)
        self.driver, self.stream = driver, driver.new_stream()
        self.callbacks = _C.HostCallbacks(driver.launch_host_func)
        self.builder = _C.SegmentBuilder(CPUS)
        self.block_tables = np.zeros((MAX_REQS, NUM_BLOCKS), np.int32)
        self.seq_lens = np.zeros(MAX_REQS, np.int32)
        self.slots = np.zeros(MAX_TOKENS, np.int64)
        self.metadata = _C.StreamMetadata(self.block_tables, self.seq_lens, self.slots)
        rule = Rule()
        self.native = _C.StreamLayer(
            self.layer.pages,
            rule.native(2, 6),
            self.layer.index,
            Buffers.like(self.layer, 4).native(),
            self.callbacks,
            self.builder,
            scale=1.0,
            exact_below=0,
            isa=_C.resolve_isa("auto"),
            pool=pool(),
        )
        self.native.set_center(np.zeros((2, 16), np.float32))
        self.busy = Busy(driver, self.builder, num_bits=11)

    def choose(self, free: list[int]) -> int:
        return min(free)  # so that stretches come again, with other codes

    def step(self, action: str) -> None:
        if self.random.random() < 0.5:
            self.busy.reissue()
            self.busy.start()
        if action == "replace" and self.running:
            self.release(self.random.choice(self.running))
            self.start(self.codes(self.random.randrange(33, 97)), [])  # ends within a stretch
        else:
            super().step(action)

    def write(self, request: Request, codes: torch.Tensor) -> None:
        start, num_tokens = request.codes.shape[1], codes.shape[1]
        self.layer.store_codes(request.blocks, start, codes)
        self.block_tables[0, : len(request.blocks)] = request.blocks
        self.seq_lens[0] = start + num_tokens
        self.slots[:num_tokens] = self.layer.slots(request.blocks, start, start + num_tokens)
        step = _C.StreamStep(
            self.metadata,
            1,
            num_tokens,
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
            np.zeros(1, np.int32),
            np.zeros(1, np.int64),
            np.array([num_tokens]),
        )
        self.native.launch_stored(self.stream, step)
        self.driver.synchronize()
        self.callbacks.raise_error()

    def check(self) -> None:
        self.check_sample()
        if self.random.random() < 0.15:
            self.builder.drain()
            self.builder.raise_error()
            self.check_memory()


ACTIONS = st.sampled_from(
    ["new", "share", "append", "append", "free", "replace", "replace", "preempt", "resume", "clear"]
)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**20), actions=st.lists(ACTIONS, min_size=5, max_size=40))
def test_the_sample_follows_the_codes_while_the_builder_works(
    seed: int, actions: list[str]
) -> None:
    with fake_driver() as driver:
        engine = StreamEngine(seed, driver)
        for action in actions:
            engine.step(action)
            engine.check()
        engine.builder.drain()
        engine.builder.raise_error()
        engine.check_memory()
        engine.check_sample()


def test_a_stale_entry_never_serves_the_new_owner(driver: FakeDriver) -> None:
    """It runs while the new owner of both blocks has filled them in part."""
    engine = StreamEngine(1, driver)
    for num_tokens in (1, 31, 32, 33, 63):
        engine.busy.reissue()
        engine.busy.start()
        engine.start(engine.codes(64), [])
        (old,) = engine.running
        engine.release(old)
        engine.start(engine.codes(num_tokens), [])
        (new,) = engine.running
        assert new.blocks == old.blocks[: len(new.blocks)]
        assert engine.builder.pending == 2, "the old owner's entry waits behind the busy one"
        engine.builder.drain()
        engine.append(new, engine.codes(200 - num_tokens))
        engine.check_sample()
        engine.builder.drain()
        engine.check_sample()
        engine.release(new)
    engine.check_memory()


def test_synchronous_seals_beside_the_builder(driver: FakeDriver) -> None:
    """One build at a time; nothing is built twice, and the accounting adds up."""
    engine = StreamEngine(3, driver)
    choose = random.Random(0)
    for _ in range(300):
        engine.step(choose.choice(["new", "append", "append", "free", "clear"]))
        engine.layer.index.seal(*engine.batch(engine.running), pool())
        engine.check()
    engine.builder.drain()
    engine.check_memory()
