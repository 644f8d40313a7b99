"""What goes wrong in a stream: errors of callbacks, refused launches, and what outlives what."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver
from native_helpers import pool
from stream_helpers import CPUS, World, fake_driver

from vllm_magicpig import _C


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with fake_driver() as driver:
        yield driver


@pytest.fixture
def world(driver: FakeDriver) -> World:
    world = World(driver, 2)
    world.set_centers()
    return world


def corrupt_the_next_copy(world: World, corrupt: Callable[[], None]) -> None:
    """Changes the metadata behind the next step's copy of it."""
    send = world._send_metadata

    def send_and_corrupt(*arguments: object) -> None:
        send(*arguments)  # type: ignore[arg-type]
        world.driver.enqueue(world.main, corrupt)
        world._send_metadata = send  # type: ignore[method-assign]

    world._send_metadata = send_and_corrupt  # type: ignore[method-assign]


def bad_block(world: World) -> None:
    world.block_tables[world.seq_lens > 0, 1] = 4000


def bad_length(world: World) -> None:
    world.seq_lens[:] = 10**6


def negative_length(world: World) -> None:
    world.seq_lens[:] = -1


def bad_slot(world: World) -> None:
    world.slots[:] = 40 * 32


def negative_slot(world: World) -> None:
    world.slots[:] = -2


BAD = [
    (bad_block, r"block_tables\[\d+, 1\] is 4000, .*0\.\.39"),
    (bad_length, r"seq_lens\[\d+\] is 1000000, "),
    (negative_length, r"seq_lens\[\d+\] is -1, "),
    (bad_slot, r"slots\[0\] is 1280, .*-1\.\.1279"),
    (negative_slot, r"slots\[0\] is -2, "),
]


@pytest.mark.parametrize(("corrupt", "text"), BAD, ids=[corrupt.__name__ for corrupt, _ in BAD])
def test_bad_metadata_is_the_error_of_its_step(
    world: World, corrupt: Callable[[World], None], text: str
) -> None:
    requests = world.prefilled(100, 50)
    world.step(requests)
    world.check()
    corrupt_the_next_copy(world, lambda: corrupt(world))
    world.step(requests)
    world.synchronize()
    assert all(np.isnan(decoded.out).all() for decoded in world.decoded)
    with pytest.raises(RuntimeError, match=text) as error:
        world.callbacks.raise_error()
    assert str(error.value).endswith(".")
    world.callbacks.raise_error()  # once
    world.decoded.clear()

    # Other requests are served as before.
    others = world.prefilled(90)
    world.step(others)
    world.check()


def test_bad_prefill_metadata(world: World) -> None:
    corrupt_the_next_copy(world, lambda: bad_slot(world))
    world.prefilled(100)
    world.synchronize()
    with pytest.raises(RuntimeError, match=r"slots\[0\] is 1280"):
        world.callbacks.raise_error()
    assert world.layers[0].layer.pages.num_tokens == 0


def test_query_codes_without_a_bucket(world: World) -> None:
    """They would index the buckets out of bounds."""
    requests = world.prefilled(100, 50)
    gate = threading.Event()
    world.driver.enqueue(world.main, gate.wait)
    step = world.step(requests)
    world.driver.enqueue(world.main, lambda: world.buffers.query_codes.fill(8))
    world.layers[0].native.launch_decode(world.main, step)
    gate.set()
    world.synchronize()
    assert np.isnan(world.buffers.out[:2]).all()
    assert np.isfinite(world.decoded[0].out).all()
    with pytest.raises(RuntimeError, match=r"query_codes holds 8, .*0\.\.7"):
        world.callbacks.raise_error()
    world.check()


def test_all_work_is_void_until_the_error_is_raised(world: World) -> None:
    requests = world.prefilled(100, 50)
    corrupt_the_next_copy(world, lambda: bad_slot(world))
    world.step(requests)
    for _ in range(3):
        world.step(requests)
    corrupt_the_next_copy(world, lambda: bad_block(world))
    world.step(requests)
    world.synchronize()
    assert all(np.isnan(decoded.out).all() for decoded in world.decoded)
    assert world.layers[0].native.counters.decode_steps == 0
    with pytest.raises(RuntimeError, match="slots"):
        world.callbacks.raise_error()
    world.callbacks.raise_error()


def test_a_step_has_one_error(world: World) -> None:
    """Its later layers give NaN, also when the first one's error was raised before they run."""
    requests = world.prefilled(100)
    world.synchronize()
    corrupt_the_next_copy(world, lambda: bad_slot(world))
    step = world.step(requests)
    world.synchronize()
    with pytest.raises(RuntimeError, match="slots"):
        world.callbacks.raise_error()
    world.driver.enqueue(world.main, lambda: world.buffers.out.fill(0))
    world.layers[1].native.launch_decode(world.main, step)
    world.synchronize()
    assert np.isnan(world.buffers.out[:1]).all()
    assert not world.buffers.out[1:].any()
    world.callbacks.raise_error()


def test_void_work_leaves_no_trusted_segment(world: World) -> None:
    """The device wrote new rows and codes into blocks of an old segment, and nobody noted it."""
    (old,) = world.prefilled(70)
    world.synchronize()
    layer = world.layers[0].layer
    tables, lens = world.batch([old])
    assert layer.index.seal(tables, lens, pool()) == 1
    world.finish(old)
    corrupt_the_next_copy(world, lambda: world.seq_lens.fill(10**6))
    world.prefilled(70)
    world.synchronize()
    with pytest.raises(RuntimeError, match="seq_lens"):
        world.callbacks.raise_error()
    assert len(layer.index.find(tables[0], 70)) == 0
    assert layer.index.seal(np.zeros((0, 1), np.int32), np.zeros(0, np.int32), pool()) == 0
    assert layer.index.num_bytes == 0


def test_a_refused_launch(world: World) -> None:
    requests = world.prefilled(100)
    world.driver.refuse_next(719)
    with pytest.raises(RuntimeError, match=r"CUresult 719, "):
        world.step(requests)
    world.synchronize()
    assert world.callbacks.pending == 0
    world.callbacks.raise_error()
    with pytest.raises(RuntimeError, match="CUresult 400"):
        world.layers[0].native.launch_decode(0xDEAD, world.step([], padded=1))
    world.decoded.clear()
    others = world.prefilled(90)
    world.step(others)
    world.check()


def test_too_many_decodes_for_the_exchange(world: World) -> None:
    step = world.step([], [(world.request(), 1)])
    many = _C.StreamStep(
        world.metadata,
        9,
        9,
        np.arange(9, dtype=np.int32),
        np.arange(9),
        np.zeros(0, np.int32),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
    )
    with pytest.raises(ValueError, match="9 decodes, but the exchange holds 8"):
        world.layers[0].native.launch_decode(world.main, many)
    world.layers[0].native.launch_decode(world.main, step)  # none of its requests decodes


def test_a_step_belongs_to_one_block_table(world: World) -> None:
    other = World(world.driver, num_blocks=41)
    step = world.step([], padded=1)
    with pytest.raises(ValueError, match=r"41 blocks of 32, .* 40 of 32"):
        other.layers[0].native.launch_decode(world.main, step)


def test_without_the_driver_there_is_one_sentence() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(RuntimeError, match=r"^libcuda\.so\.1 .*NVIDIA's driver; .*\.$"):
            _C.find_launch_host_func()
    else:
        assert _C.find_launch_host_func() != 0


# ------------------------------------------------------------------------------- what outlives what


def test_pending_work_outlives_what_python_drops(driver: FakeDriver) -> None:
    """Everything but the driver goes while callbacks wait; then they run on memory left behind."""
    builder = _C.SegmentBuilder(CPUS[:1])
    world = World(driver, 2, builder=builder)
    world.set_centers()
    gate = threading.Event()
    driver.enqueue(world.main, gate.wait)
    requests = world.prefilled(200, 50)
    world.step(requests, [(world.request(), 70)])
    callbacks = world.callbacks
    assert callbacks.pending >= 4
    memory = weakref.ref(world.layers[0].layer.memory)
    tables = weakref.ref(world.block_tables)
    layers = [layer.native for layer in world.layers]
    world.layers.clear()
    world.decoded.clear()
    del builder, requests, layers
    # The closures of the stream still hold the arrays; what Python dropped are the native objects.
    del world
    gc.collect()
    gate.set()
    driver.synchronize()
    gc.collect()
    assert callbacks.pending == 0
    callbacks.raise_error()
    assert memory() is not None, "left behind on purpose"
    assert tables() is not None


def test_memory_is_freed_when_nothing_is_pending(driver: FakeDriver) -> None:
    world = World(driver, 2, builder=_C.SegmentBuilder(CPUS[:1]))
    world.set_centers()
    requests = world.prefilled(200, 50)
    world.step(requests)
    world.check()
    driver.refuse_next(719)
    with pytest.raises(RuntimeError, match="719"):  # what was refused is not pending, either
        world.step(requests)
    driver.synchronize()
    world.decoded.clear()
    arrays = [world.layers[0].layer.memory, world.block_tables, world.buffers.out]
    references = [weakref.ref(array) for array in arrays]
    del world, requests, arrays
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def run(script: str) -> None:
    tests = Path(__file__).parent
    prelude = f"import sys; sys.path.insert(0, {str(tests)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout


def test_a_process_ends_while_work_is_pending() -> None:
    run(
        """
        import threading
        from fake_driver import FakeDriver
        from stream_helpers import CPUS, World
        from vllm_magicpig import _C

        driver = FakeDriver()
        world = World(driver, 2, builder=_C.SegmentBuilder(CPUS))
        world.set_centers()
        request = world.request()
        world.step([], [(request, 900)])
        reached = driver.record(world.main)
        driver.enqueue(world.main, threading.Event().wait)
        world.step([request])
        # A thread that the end of Python meets inside torch would end the process by std::terminate.
        assert reached.wait(60)
        assert world.callbacks.pending >= 2
        print("done", flush=True)
        """
    )
