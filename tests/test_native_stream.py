"""Decode in stream order: results, order and counters, through the fake driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fake_driver import FakeDriver
from native_helpers import Rule, decode_attention, each_isa, pool
from stream_helpers import Request, World, fake_driver

from vllm_magicpig import _C


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with fake_driver() as driver:
        yield driver


def decode_directly(world: World, index: int, requests: list[Request]) -> tuple[np.ndarray, ...]:
    """(out, rows) of the last step's decodes of a layer, by a DecodeLayer."""
    decoded = world.decoded[index]
    native, layer = decoded.layer.layer, decoded.layer
    out = np.full(decoded.query.shape, np.nan, np.float32)
    lse = np.zeros(decoded.query.shape[:2], np.float32)
    codes = decoded.query_codes.numpy().astype(np.uint16)
    rule = world.rule.native(native.num_bits, native.num_tables)
    sampled = (rule, native.index, decoded.query.numpy(), codes, layer.center.numpy())
    exact = (None, None, decoded.query.numpy(), None, None)
    arguments = sampled if decoded.sampled else exact
    settings = {**world.settings(), "exact_below": max(world.exact_below, 1)}
    rows, _ = decode_attention(
        native.pages, *arguments, *world.batch(requests), out, lse, **settings
    )
    return out, rows


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampled", [True, False])
def test_results_are_those_of_a_decode_layer(
    driver: FakeDriver, isa: _C.Isa, dtype: torch.dtype, sampled: bool
) -> None:
    world = World(driver, 2, group=3, exact_below=30, isa=isa, dtype=dtype, head_size=24)
    if sampled:
        world.set_centers()
    requests = world.prefilled(223, 1, 128, 40)
    world.step(requests, padded=2)
    world.synchronize()
    for i in range(2):
        out, rows = decode_directly(world, i, requests)
        np.testing.assert_array_equal(world.decoded[i].out[:4], out)
        native = world.decoded[i].layer.native
        np.testing.assert_array_equal(native.recent_rows(), rows[rows >= 0])
        assert bool((rows >= 0).any()) == sampled
    world.check()


def test_steps_and_layers_back_to_back(driver: FakeDriver) -> None:
    """One set of buffers, never waited for: requests come, decode and go while the first kernel of
    all still runs."""
    world = World(driver, 3)
    world.set_centers()
    started = threading.Event()
    driver.enqueue(world.main, started.wait)
    running = world.prefilled(100, 33)
    for i in range(24):
        arriving = world.request()
        world.step(running, [(arriving, 20 + i)], padded=i % 2)
        running.append(arriving)
        if len(running) > 5:
            world.finish(running.pop(i % 5))
    assert world.callbacks.pending >= 3 * 24
    assert not any((decoded.out != -1).any() for decoded in world.decoded)
    started.set()
    world.check()


def test_kernels_come_before_and_after_the_callback(driver: FakeDriver) -> None:
    """A slow kernel in front of each, and one right behind that overwrites what it read."""
    world = World(driver)
    world.set_centers()
    (request,) = world.prefilled(150)
    for _ in range(4):
        driver.enqueue(world.main, lambda: time.sleep(0.02))
        world.step([request])
        for array in (world.buffers.query, world.buffers.out, world.seq_lens, world.slots):
            driver.enqueue(world.main, lambda array=array: array.fill(99))
    world.check()


def test_a_prompt_in_chunks(driver: FakeDriver) -> None:
    """Also chunks of one token, and a request that decodes in the step after its last chunk."""
    world = World(driver, 2)
    world.set_centers()
    long, short = world.request(), world.request()
    for size in (32, 1, 31, 64, 70):
        world.step([short] if short.length else [], [(long, size)])
        if not short.length:
            world.step([], [(short, 3)])
    world.step([long, short])
    world.check()
    tables, lens = world.batch([long, short])
    for layer in world.layers:
        assert layer.layer.pages.num_tokens == long.length + short.length
        assert layer.layer.pages.num_used_blocks == len(long.blocks) + len(short.blocks)
        blocks = sorted(long.blocks + short.blocks)
        assert layer.layer.pages.written_blocks().tolist() == blocks
        assert layer.layer.index.seal(tables, lens, pool()) == 3


def test_two_callbacks_of_a_layer_at_once(driver: FakeDriver) -> None:
    """Prefill is noted beside the decode of the same step; events order them only across steps."""
    world = World(driver, num_blocks=300)
    world.set_centers()
    requests = world.prefilled(80, 500)
    for _ in range(40):
        arriving = world.request()
        world.step(requests, [(arriving, 60)])
        world.finish(arriving)
    world.check()
    # Each lies in as many blocks as it needs, and the freed ones still hold what they held.
    assert world.layers[0].layer.pages.num_tokens == 80 + 500 + 2 * 40 + 60


def test_whether_there_is_a_center_is_decided_at_the_launch(driver: FakeDriver) -> None:
    world = World(driver)
    layer = world.layers[0]
    (request,) = world.prefilled(100)
    gate = threading.Event()
    driver.enqueue(world.main, gate.wait)
    world.step([request])
    layer.set_center()
    gate.set()
    world.check()
    assert layer.native.counters.exact_heads == world.num_q_heads
    poison = np.uint16(0xA5A5)
    last = world.batch([request])[0][0, 3] * 32 + 100 % 32
    slot = np.array([last], np.int64)
    assert (layer.layer.pages.load_codes(slot) == poison).all(), "no codes without a centre"

    # What was stored before the centre gets its codes from whoever sets it.
    layer.layer.store_codes(request.blocks, 0, request.held[0].codes)
    world.step([request])
    world.check()
    assert layer.native.counters.sampled_heads == world.num_q_heads
    with pytest.raises(ValueError, match="has its center"):
        layer.set_center()


def test_exact_mode_needs_neither_codes_nor_index(driver: FakeDriver) -> None:
    world = World(driver)
    native = world.layers[0].layer
    buffers = {**vars(world.buffers), "query_codes": None, "key_codes": None}
    layer = _C.StreamLayer(
        native.pages,
        None,
        None,
        _C.DecodeExchange(**buffers),
        world.callbacks,
        None,
        **world.settings(),
    )
    world.layers[0].native = layer
    requests = world.prefilled(100, 20)
    world.step(requests)
    world.check()
    assert layer.counters.exact_heads == 2 * world.num_q_heads
    with pytest.raises(ValueError, match="no rule"):
        layer.set_center(np.zeros((2, 16), np.float32))


def test_dummy_steps_store_and_count_nothing(driver: FakeDriver) -> None:
    world = World(driver)
    world.set_centers()
    layer = world.layers[0]
    before = layer.layer.memory.copy()
    world.step([], padded=3)
    dummy_chunk = _C.StreamStep(
        world.metadata,
        4,
        5,
        np.zeros(0, np.int32),
        np.zeros(0, np.int64),
        np.array([2], np.int32),
        np.array([0]),
        np.array([5]),
    )
    driver.enqueue(world.main, lambda: world.slots.fill(-1))
    driver.enqueue(world.main, lambda: world.seq_lens.fill(10**6))
    layer.native.launch_stored(world.main, dummy_chunk)
    layer.native.launch_decode(world.main, dummy_chunk)  # it has none
    world.check()
    assert layer.native.counters.decode_steps == 0
    assert layer.native.counters.exact_heads == 0
    assert layer.layer.pages.num_tokens == 0
    assert layer.layer.pages.written_blocks().size == 0
    np.testing.assert_array_equal(layer.layer.memory, before)


def test_counters(driver: FakeDriver) -> None:
    world = World(driver, exact_below=50)
    world.set_centers()
    requests = world.prefilled(200, 30, 100)
    rows = []
    for _ in range(5):
        world.step(requests, padded=1)
        sampled = world.decoded[-1]
        rows += [sampled.rows(i, world.rule).sum(-1).tolist() for i in (0, 2)]
    world.check()
    counters = world.layers[0].native.counters
    heads = world.num_q_heads
    assert counters.decode_steps == 5
    assert (counters.sampled_heads, counters.exact_heads) == (5 * 2 * heads, 5 * heads)
    flat = [n for one in rows for n in one]
    assert counters.sampled_rows == sum(flat)
    assert world.layers[0].native.recent_rows().tolist() == flat
    assert counters.middle_rows == heads * sum(
        n - 20 for step in range(1, 6) for n in (200 + step, 100 + step)
    )
    assert counters.lookup_ns > 0
    assert counters.attend_ns > 0
    assert 0 < counters.store_ns < counters.step_ns

    world.layers[0].native.forget_steps()
    assert world.layers[0].native.recent_rows().size == 0
    world.step(requests)
    world.check()
    assert world.layers[0].native.counters.decode_steps == 1
    assert world.layers[0].native.recent_rows().size == 2 * heads


def test_the_last_16384_query_heads_are_remembered(driver: FakeDriver) -> None:
    world = World(driver, num_kv_heads=4, group=64, num_blocks=60, num_tables=2)
    world.set_centers()
    requests = world.prefilled(*[20] * 8)
    steps = 16384 // (8 * 256) + 3
    rows = []
    for _ in range(steps):
        world.step(requests)
        rows += [world.decoded[-1].rows(i, world.rule).sum(-1) for i in range(8)]
    world.synchronize()
    world.callbacks.raise_error()
    expected = torch.cat(rows)[-16384:].sort().values
    found = np.sort(world.layers[0].native.recent_rows())
    np.testing.assert_array_equal(found, expected)
    assert world.layers[0].native.counters.sampled_heads == steps * 8 * 256


def test_any_batch_of_lengths(driver: FakeDriver) -> None:
    """Block edges and part edges; more requests than threads."""
    world = World(driver, num_blocks=400, rule=Rule(1, 0, 0), levels=[256])
    world.set_centers()
    requests = world.prefilled(1, 31, 32, 33, 63, 1023, 64)
    requests += world.prefilled(2047)
    for _ in range(3):
        world.step(requests)
    world.check()
