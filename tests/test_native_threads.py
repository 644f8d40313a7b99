"""The thread pool: where its threads run, and what fork leaves of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from native_helpers import Layer

from vllm_magicpig import _C

CPUS = sorted(os.sched_getaffinity(0))


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        # What vLLM preloads into the processes of a test before this one: an OpenMP runtime among it.
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def masks_of_new_threads(cpus: list[int]) -> list[set[int]]:
    """Affinity of each thread that a pool of these CPUs starts."""
    before = set(os.listdir("/proc/self/task"))
    pool = _C.ThreadPool(cpus)
    assert pool.num_threads == len(cpus)
    started = set(os.listdir("/proc/self/task")) - before
    return [set(os.sched_getaffinity(int(tid))) for tid in started]


def test_threads_are_pinned_and_the_caller_is_not() -> None:
    own = os.sched_getaffinity(0)
    masks = masks_of_new_threads([CPUS[0], CPUS[-1], CPUS[0]])
    assert sorted(map(min, masks)) == sorted([CPUS[-1], CPUS[0]])
    assert all(len(mask) == 1 for mask in masks)
    assert os.sched_getaffinity(0) == own


@pytest.mark.skipif(len(CPUS) < 2, reason="this process may use one CPU only")
def test_a_bound_creator_does_not_bind_the_threads() -> None:
    masks: list[set[int]] = []

    def create() -> None:
        os.sched_setaffinity(0, {CPUS[0]})  # of this thread
        masks.extend(masks_of_new_threads([CPUS[0], CPUS[1]]))

    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
    assert masks == [{CPUS[1]}]


def test_a_forked_child_is_told_and_neither_hangs_nor_crashes() -> None:
    script = f"""
        import os, time
        import numpy as np
        from vllm_magicpig import _C

        pool = _C.ThreadPool([{CPUS[0]}, {CPUS[-1]}])
        x = np.ones((1000, 8), np.float32)
        isa = _C.resolve_isa("auto")
        _C.pack_codes(x, 4, isa, pool)
        time.sleep(0.1)  # the worker sleeps now
        child = os.fork()
        if child == 0:
            try:
                _C.pack_codes(x, 4, isa, pool)
            except RuntimeError as error:
                assert "fork" in str(error)
                del pool, error
                _C.pack_codes(x, 4, isa, _C.ThreadPool([{CPUS[0]}, {CPUS[-1]}]))
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), int(_C.pack_codes(x, 4, isa, pool).sum()))
    """
    assert run(script).split() == ["7", "30000"]


LONGEST_SPIN_US = 10_000_000


def run_job(pool: _C.ThreadPool) -> None:
    _C.pack_codes(np.ones((5000, 8), np.float32), 4, _C.resolve_isa("auto"), pool)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_job_within_the_spin_wakes_nobody() -> None:
    pool = _C.ThreadPool([CPUS[0], CPUS[-1]], spin_us=LONGEST_SPIN_US)
    for _ in range(5):
        time.sleep(0.02)
        run_job(pool)
    assert (pool.num_sleeping, pool.num_wakes) == (0, 0)


@pytest.mark.parametrize("spin_us", [0, 500])
def test_threads_that_nobody_calls_sleep_and_a_job_wakes_them(spin_us: int) -> None:
    pool = _C.ThreadPool([CPUS[0], CPUS[-1], CPUS[0]], spin_us)
    assert pool.spin_us == spin_us
    wait_for(lambda: pool.num_sleeping == 2)
    for wakes in range(1, 4):
        run_job(pool)
        assert pool.num_wakes == wakes
        wait_for(lambda: pool.num_sleeping == 2)


def test_threads_leave_their_cpus_to_a_builder() -> None:
    """However long they may spin."""
    steps = _C.ThreadPool([CPUS[0], CPUS[-1]], LONGEST_SPIN_US)
    layer = Layer(64, num_tables=255, num_bits=12, levels=[32])
    layer.store_codes(np.arange(64), 0, torch.zeros(1, 2048, 255, dtype=torch.int32))
    tables, lens = np.arange(64, dtype=np.int32)[None], np.array([2048], np.int32)
    alone = _C.SegmentBuilder([CPUS[0]])
    alone.ask(layer.index, tables, lens)
    alone.drain()
    assert layer.index.num_segments == 64
    assert steps.num_sleeping == 0

    beside = _C.SegmentBuilder([CPUS[0]], gives_way_to=steps)

    def asleep_after_another_build() -> bool:
        layer.index.clear()
        beside.ask(layer.index, tables, lens)
        beside.drain()
        return steps.num_sleeping == 1

    del alone  # an index has one builder
    wait_for(asleep_after_another_build)


@pytest.mark.parametrize("spin_us", [-1, LONGEST_SPIN_US + 1])
def test_a_spin_out_of_range_is_named(spin_us: int) -> None:
    with pytest.raises(ValueError, match=f"spin_us is {spin_us}, but must .*10000000"):
        _C.ThreadPool(CPUS[:1], spin_us)


def test_a_missing_cpu_is_named() -> None:
    for cpus in ([4095], [CPUS[0], 4095], [-1], [100_000]):
        with pytest.raises(ValueError, match=rf"CPU {cpus[-1]} "):
            _C.ThreadPool(cpus)
    with pytest.raises(ValueError, match="empty"):
        _C.ThreadPool([])


def test_openmps_threads_take_the_tasks_too() -> None:
    """In a process of its own: the runtime's threads are counted."""
    script = """
        import os
        import numpy as np
        import torch
        from vllm_magicpig import _C

        torch.set_num_threads(2)
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        threads = len(os.listdir("/proc/self/task"))
        pool = _C.ThreadPool.of_openmp(2)
        assert pool.num_threads == 2
        x = np.random.default_rng(0).standard_normal((5000, 64)).astype(np.float32)
        isa = _C.resolve_isa("auto")
        codes = _C.pack_codes(x, 4, isa, pool)
        own = _C.ThreadPool([min(os.sched_getaffinity(0))])
        assert np.array_equal(codes, _C.pack_codes(x, 4, isa, own))
        print(len(os.listdir("/proc/self/task")) - threads)
    """
    assert run(script).split() == ["0"], "no thread but torch's own"


def test_without_openmp_a_pool_of_it_is_refused() -> None:
    script = """
        import sys
        from vllm_magicpig import _C

        assert "torch" not in sys.modules
        try:
            _C.ThreadPool.of_openmp(2)
        except RuntimeError as error:
            print(error)
    """
    assert "no OpenMP runtime; import torch" in run(script)
