"""A CUDA driver made of CPU threads: streams, events and cuLaunchHostFunc, for tests without a GPU.

A stream is a thread that runs what was enqueued, in order; streams run beside the caller and each
other, so that only events order them. Device work is a Python closure. Host callbacks come through
the address that the extension takes for cuLaunchHostFunc, and run without the GIL.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from types import TracebackType

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# CUresult cuLaunchHostFunc(CUstream, CUhostFn, void *)
_LaunchHostFunc = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

SUCCESS = 0
INVALID_HANDLE = 400  # CUDA_ERROR_INVALID_HANDLE
TIMEOUT_S = 60.0
"""Longer than any test's work: a stream that is not done by then never will be."""


class _Stream:
    def __init__(self, handle: int) -> None:
        self.work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, name=f"stream {handle:#x}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (closure := self.work.get()) is not None:
            try:
                closure()
            except BaseException as error:
                self.errors.append(error)


class FakeDriver:
    """Use as a context manager, or `close` it; launches must come before that."""

    def __init__(self) -> None:
        self._streams: dict[int, _Stream] = {}
        self._refusals: list[int] = []
        self._function = _LaunchHostFunc(self._launch)  # its machine code lives as long as this
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        self.launch_host_func: int = address

    def __enter__(self) -> FakeDriver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def new_stream(self) -> int:
        handle = 0x1000 * (len(self._streams) + 1)
        self._streams[handle] = _Stream(handle)
        return handle

    def enqueue(self, stream: int, closure: Callable[[], object]) -> None:
        """Device work, in stream order."""
        self._streams[stream].work.put(closure)

    def record(self, stream: int) -> threading.Event:
        """An event that everything enqueued so far precedes."""
        event = threading.Event()
        self.enqueue(stream, event.set)
        return event

    def wait(self, stream: int, event: threading.Event) -> None:
        """What is enqueued from here on runs after the event; the caller does not wait."""

        def wait() -> None:
            if not event.wait(TIMEOUT_S):
                raise TimeoutError(f"an event that stream {stream:#x} waits for never came")

        self.enqueue(stream, wait)

    def synchronize(self, stream: int | None = None) -> None:
        """Waits for a stream, or for all; raises the first exception of its closures, once."""
        streams = [stream] if stream is not None else list(self._streams)
        for event in [self.record(each) for each in streams]:
            if not event.wait(TIMEOUT_S):
                raise TimeoutError("a stream's work never ended")
        for each in streams:
            errors = self._streams[each].errors
            if errors:
                first = errors[0]
                errors.clear()
                raise first

    def refuse_next(self, code: int) -> None:
        """The next launch of host work fails with this CUresult."""
        self._refusals.append(code)

    def close(self) -> None:
        """Ends the streams once their work is done."""
        for stream in self._streams.values():
            stream.work.put(None)
        for stream in self._streams.values():
            stream.thread.join(TIMEOUT_S)
            assert not stream.thread.is_alive(), f"{stream.thread.name} hangs"
        self._streams.clear()

    def _launch(self, stream: int | None, function: int, data: int | None) -> int:
        if self._refusals:
            return self._refusals.pop(0)
        if stream not in self._streams:
            return INVALID_HANDLE
        self.enqueue(stream, lambda: _HostFunction(function)(data))
        return SUCCESS
