"""The background builder: what it builds, when it must not, and that nothing depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from builder_helpers import Busy, sealed
from fake_driver import FakeDriver
from native_helpers import Layer, pool
from stream_helpers import CPUS, World, fake_driver

from vllm_magicpig import _C


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with fake_driver() as driver:
        yield driver


def test_the_sample_does_not_depend_on_the_builder(driver: FakeDriver) -> None:
    """The same life with and without, and the same bits out."""
    results = []
    for builder in (None, _C.SegmentBuilder(CPUS), None):
        world = World(driver, 2, builder=builder, seed=7)
        world.set_centers()
        requests = world.prefilled(300, 64)
        for i in range(20):
            world.step(requests, [(world.request(), 30)] if i % 6 == 0 else [])
            if builder is not None and i == 10:
                world.synchronize()
                builder.drain()
        world.synchronize()
        results.append([decoded.out for decoded in world.decoded])
        if builder is not None:
            builder.drain()
            builder.raise_error()
            assert sealed(world, requests[0]) == [5, 5]
            assert sealed(world, requests[1]) == [1, 1]
        else:
            assert sealed(world, requests[0]) == [0, 0]
        world.check()
    for one, other in zip(results[0], results[1], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(results[0], results[2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_prefill_and_decode_both_ask(driver: FakeDriver) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    world = World(driver, builder=builder, exact_below=100)
    world.set_centers()
    long, short, growing = world.prefilled(200, 119, 190)
    world.synchronize()
    builder.drain()
    # A middle of 99 tokens is attended exactly, and not worth an index.
    assert [sealed(world, r) for r in (long, short, growing)] == [[3], [0], [2]]
    world.step([growing, short])
    world.synchronize()
    builder.drain()
    assert [sealed(world, r) for r in (short, growing)] == [[1], [2]]
    world.step([growing])
    world.synchronize()
    builder.drain()
    assert sealed(world, growing) == [3]
    assert world.layers[0].layer.index.segments_built == 7
    world.check()


def test_without_a_center_nothing_is_built(driver: FakeDriver) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    world = World(driver, builder=builder)
    (request,) = world.prefilled(200)
    world.step([request])
    world.synchronize()
    assert builder.pending == 0
    assert world.layers[0].layer.index.segments_built == 0


def test_blocks_reissued_while_queued_are_not_registered(driver: FakeDriver) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    busy, world = Busy(driver, builder), World(driver, builder=builder)
    world.set_centers()
    layer = world.layers[0]
    busy.start()
    (old,) = world.prefilled(140)
    world.synchronize()
    tables, _ = world.batch([old])
    # The last block of the second stretch has a new owner, which has written one token.
    slot = layer.layer.slots(old.blocks, 96, 97)
    layer.write_as_the_device(slot, layer.new_rows(1, world.generator))
    layer.layer.pages.note_writes(slot)
    assert builder.pending == 2, "the entry still waits behind the busy one"
    assert layer.layer.index.segments_built == 0
    builder.drain()
    assert layer.layer.index.segments_built == 1
    assert len(layer.layer.index.find(tables[0], 140)) == 1
    assert len(layer.layer.index.find(tables[0, :2], 64)) == 1, "the first stretch is as it was"
    assert layer.layer.index.segments_dropped == 0
    builder.raise_error()


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.03])
def test_blocks_reissued_while_being_built_are_not_registered(
    driver: FakeDriver, after_s: float
) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    busy = Busy(driver, builder)
    busy.start()
    time.sleep(after_s)
    busy.reissue()
    built = busy.index.segments_built
    assert builder.pending == 1
    assert built < busy.num_segments
    builder.drain()
    # One that was just being registered may have counted; the others were not built at all.
    assert busy.index.segments_built <= built + 1
    blocks = np.arange(busy.num_segments, dtype=np.int32)
    assert len(busy.index.find(blocks, len(blocks) * 32)) == 0
    busy.start()
    builder.drain()
    assert busy.index.num_segments == len(blocks)
    assert busy.index.segments_dropped == busy.index.segments_built - len(blocks)


def test_what_is_asked_for_adds_up(driver: FakeDriver) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    busy, world = Busy(driver, builder), World(driver, builder=builder)
    world.set_centers()
    busy.start()
    (first,) = world.prefilled(140)
    (second,) = world.prefilled(70)
    world.synchronize()
    assert builder.pending == 2, "one entry for the layer, behind the busy one"
    builder.drain()
    assert [sealed(world, first), sealed(world, second)] == [[2], [1]]
    assert world.layers[0].layer.index.segments_built == 3


def _has(found: list[tuple[int, int]], size: int) -> bool:
    return any(end - begin == size for begin, end in found)


def test_small_segments_first_then_layer_by_layer(driver: FakeDriver) -> None:
    """One by one, behind others: the tails of both layers, then the large segments of both."""
    builder = _C.SegmentBuilder(CPUS[:1])
    busy = Busy(driver, builder, num_bits=12)
    # Many buckets: a segment takes the builder milliseconds, a look microseconds.
    layers = [Layer(24, num_tables=255, num_bits=15, levels=[64, 256]) for _ in range(2)]
    tables, lens = np.arange(24, dtype=np.int32)[None], np.array([700], np.int32)
    busy.start()
    for layer in layers:
        builder.ask(layer.index, tables, lens)
    orders = set()
    while builder.pending:
        # What is looked at later may be further, so the second is looked at before and after.
        earlier, first, later = (layers[i].index.find(tables[0], 700) for i in (1, 0, 1))
        orders.add((len(first), len(later)))
        assert not _has(first, 256) or _has(later, 64)
        assert not _has(earlier, 64) or len(first) > 0
    for layer in layers:
        assert layer.index.find(tables[0], 700) == [(0, 256), (256, 512), (512, 576), (576, 640)]
    assert len(orders) > 2, "they were not looked at while the builder worked"


def test_a_wish_for_a_large_segment_withdraws_those_that_it_covers(driver: FakeDriver) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    busy = Busy(driver, builder)
    layer = Layer(24, levels=[64, 256])
    tables = np.arange(24, dtype=np.int32)[None]
    busy.start()
    for length in (192, 256, 400):
        builder.ask(layer.index, tables, np.array([length], np.int32))
    assert layer.index.segments_built == 0, "they still wait behind the busy one"
    builder.drain()
    assert layer.index.find(tables[0], 400) == [(0, 256), (256, 320), (320, 384)]
    assert (layer.index.segments_built, layer.index.segments_dropped) == (3, 0)


def test_asking_for_nothing_replaces_nothing(driver: FakeDriver) -> None:
    """A decode that lacks no segment has only stale ones to be freed."""
    builder = _C.SegmentBuilder(CPUS[:1])
    busy, world = Busy(driver, builder), World(driver, builder=builder)
    world.set_centers()
    (short,) = world.prefilled(70)
    world.synchronize()
    builder.drain()
    busy.start()
    (long,) = world.prefilled(140)
    world.step([short])
    world.synchronize()
    assert builder.pending == 2
    builder.drain()
    assert [sealed(world, short), sealed(world, long)] == [[1], [2]]


def test_what_exists_by_then_is_not_built_again(driver: FakeDriver) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    busy, world = Busy(driver, builder), World(driver, builder=builder)
    world.set_centers()
    busy.start()
    (request,) = world.prefilled(140)
    world.synchronize()
    assert builder.pending == 2
    index = world.layers[0].layer.index
    assert index.seal(*world.batch([request]), pool()) == 2
    builder.drain()
    assert (index.segments_built, index.segments_dropped) == (2, 0)


def test_stale_memory_is_given_back(driver: FakeDriver) -> None:
    """Also when nothing needs a segment any more: a decode step or a chunk is enough."""
    builder = _C.SegmentBuilder(CPUS[:1])
    world = World(driver, builder=builder)
    world.set_centers()
    index = world.layers[0].layer.index
    (other,) = world.prefilled(70)
    world.synchronize()
    builder.drain()
    for use in ("decode", "chunk"):
        (request,) = world.prefilled(260)
        world.synchronize()
        builder.drain()
        assert index.num_segments == 5
        world.finish(request)
        reissued = np.array([block * 32 for block in request.blocks or world.free[-9:]], np.int64)
        world.layers[0].layer.pages.note_writes(reissued)
        assert index.num_segments == 5
        if use == "decode":
            world.step([other])
        else:
            world.step([], [(world.request(), 5)])
        world.synchronize()
        builder.drain()
        assert index.num_segments == 1
        assert index.num_segments == index.segments_built - index.segments_dropped
    world.check()


def test_threads_run_where_and_as_they_should() -> None:
    before = set(os.listdir("/proc/self/task"))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    builder = _C.SegmentBuilder([CPUS[-1], CPUS[0], CPUS[-1]])
    started = [int(tid) for tid in set(os.listdir("/proc/self/task")) - before]
    masks = sorted(tuple(os.sched_getaffinity(tid)) for tid in started)
    assert masks == sorted([(CPUS[-1],), (CPUS[0],), (CPUS[-1],)])
    nice = [os.getpriority(os.PRIO_PROCESS, tid) for tid in started]
    assert nice == [min(own + 10, 19)] * 3
    assert [os.sched_getscheduler(tid) for tid in started] == [os.SCHED_BATCH] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
    del builder
    deadline = time.monotonic() + 30  # the kernel forgets a joined thread a moment later
    while set(map(str, started)) & set(os.listdir("/proc/self/task")):
        assert time.monotonic() < deadline, "the threads end with the builder"
        time.sleep(0.01)


def test_bad_cpus_are_named() -> None:
    for cpus in ([4095], [CPUS[0], -1]):
        with pytest.raises(ValueError, match=rf"CPU {cpus[-1]} "):
            _C.SegmentBuilder(cpus)
    with pytest.raises(ValueError, match="empty"):
        _C.SegmentBuilder([])


def test_layers_and_builder_may_go_while_it_works(driver: FakeDriver) -> None:
    """Each waits for the one segment that is being built, not for the rest."""
    for layer_first in (True, False):
        builder = _C.SegmentBuilder(CPUS[:1])
        busy, world = Busy(driver, builder), World(driver, builder=builder)
        world.set_centers()
        busy.start()
        world.prefilled(300)
        world.synchronize()
        assert builder.pending == 2
        index = busy.index
        if layer_first:
            del busy, world
            assert builder.pending == 0
            builder.drain()
        else:
            del builder, busy, world
        assert index.segments_built < Busy.num_segments
        assert index.num_segments == index.segments_built


def test_a_builder_that_runs_out_of_memory_says_so_and_goes_on() -> None:
    """255 tables of 32,768 buckets for 64 heads: a segment of a GiB, beyond the limit set below."""
    resource = pytest.importorskip("resource")
    builder = _C.SegmentBuilder(CPUS[:1])
    layer = Layer(4, num_kv_heads=64, num_tables=255, num_bits=15, levels=[32])
    tables, lens = np.arange(4, dtype=np.int32)[None], np.array([32], np.int32)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        builder.ask(layer.index, tables, lens)
        builder.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    with pytest.raises(RuntimeError, match="bad_alloc"):
        builder.raise_error()
    builder.raise_error()
    assert layer.index.num_bytes == 0
    small = Layer(4)
    builder.ask(small.index, tables, np.array([128], np.int32))
    builder.drain()
    assert small.index.find(tables[0], 128) == [(0, 64), (64, 128)]
    assert small.index.seal(tables, np.array([128], np.int32), pool()) == 0


def test_an_index_has_one_builder() -> None:
    layer = Layer(4)
    first, second = _C.SegmentBuilder(CPUS[:1]), _C.SegmentBuilder(CPUS[:1])
    tables, lens = np.arange(4, dtype=np.int32)[None], np.array([128], np.int32)
    first.ask(layer.index, tables, lens)
    with pytest.raises(ValueError, match="another builder"):
        second.ask(layer.index, tables, lens)
    with pytest.raises(ValueError, match="seq_lens"):
        first.ask(layer.index, tables, np.array([129], np.int32))
    first.drain()
    del first
    second.ask(layer.index, tables, lens)  # the one before has gone


def test_drain_releases_the_gil(driver: FakeDriver) -> None:
    builder = _C.SegmentBuilder(CPUS[:1])
    busy = Busy(driver, builder)
    busy.start()
    drainer = threading.Thread(target=builder.drain)
    drainer.start()
    assert drainer.is_alive()
    assert builder.pending == 1
    drainer.join()
    assert builder.pending == 0


def test_a_forked_child_is_told_and_does_not_hang() -> None:
    script = f"""
        import os
        from vllm_magicpig import _C

        builder = _C.SegmentBuilder([{CPUS[0]}, {CPUS[-1]}])
        child = os.fork()
        if child == 0:
            try:
                builder.drain()
            except RuntimeError as error:
                assert "fork" in str(error)
                del builder, error
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        builder.drain()
        print(os.waitstatus_to_exitcode(status))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.split() == ["7"], result.stderr
