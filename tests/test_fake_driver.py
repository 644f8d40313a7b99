"""The fake driver keeps a stream's order, and no other."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
from fake_driver import INVALID_HANDLE, SUCCESS, FakeDriver

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def test_a_stream_runs_in_order_and_beside_the_others() -> None:
    order: list[str] = []
    with FakeDriver() as driver:
        one, other = driver.new_stream(), driver.new_stream()
        launch = LAUNCH(driver.launch_host_func)
        function = HOST_FUNCTION(lambda data: order.append(f"callback {data}"))
        address = ctypes.cast(function, ctypes.c_void_p).value
        gate = threading.Event()
        driver.enqueue(one, gate.wait)
        driver.enqueue(one, lambda: order.append("kernel"))
        assert launch(one, address, 5) == SUCCESS
        driver.enqueue(one, lambda: order.append("copy"))
        assert launch(other, address, 6) == SUCCESS
        driver.synchronize(other)
        assert order == ["callback 6"]
        gate.set()
        driver.synchronize()
        assert order == ["callback 6", "kernel", "callback 5", "copy"]


def test_an_event_orders_two_streams() -> None:
    order: list[str] = []
    with FakeDriver() as driver:
        first, second = driver.new_stream(), driver.new_stream()
        driver.enqueue(first, lambda: time.sleep(0.02))
        driver.enqueue(first, lambda: order.append("first"))
        event = driver.record(first)
        assert not event.is_set()
        driver.wait(second, event)
        driver.enqueue(second, lambda: order.append("second"))
        driver.synchronize(second)
        assert order == ["first", "second"]


def test_an_error_of_a_kernel_is_raised_once() -> None:
    def fail() -> None:
        raise ArithmeticError("kernel")

    with FakeDriver() as driver:
        streams = [driver.new_stream() for _ in range(2)]
        done = threading.Event()
        driver.enqueue(streams[0], fail)
        driver.enqueue(streams[0], done.set)
        driver.synchronize(streams[1])
        with pytest.raises(ArithmeticError, match="kernel"):
            driver.synchronize()
        assert done.is_set()
        driver.synchronize()


def test_launches_are_refused() -> None:
    with FakeDriver() as driver:
        stream = driver.new_stream()
        launch = LAUNCH(driver.launch_host_func)
        ran = threading.Event()
        function = HOST_FUNCTION(lambda _: ran.set())
        address = ctypes.cast(function, ctypes.c_void_p).value
        driver.refuse_next(719)
        assert launch(stream, address, None) == 719
        assert launch(stream + 1, address, None) == INVALID_HANDLE
        driver.synchronize()
        assert not ran.is_set()
        assert launch(stream, address, None) == SUCCESS
    assert ran.is_set(), "closing ends what was enqueued"
    assert launch(stream, address, None) == INVALID_HANDLE
