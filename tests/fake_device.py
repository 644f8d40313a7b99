"""The device path without a device: streams are CPU threads, kernels their references.

Everything between vLLM's tensors and the native callbacks is the code that serves on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from fake_driver import FakeDriver

from vllm_magicpig import _C
from vllm_magicpig.device import Kernels
from vllm_magicpig.triton_kernels import host_pages, merge, simhash


class FakeDevice:
    """A Device (vllm_magicpig/device.py) on the CPU; `refuse_pinning_after` regions fail."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.driver = FakeDriver()
        self.callbacks = _C.HostCallbacks(self.driver.launch_host_func)
        self.kernels: Kernels = SimpleNamespace(
            pack_directions=simhash.pack_directions,
            simhash=simhash.simhash_reference,
            store_pages=host_pages.store_pages_reference,
            gather_pages=host_pages.gather_pages_reference,
            merge_into=merge.merge_into_reference,
        )
        self.registered: list[torch.Tensor] = []
        self.refuse_pinning_after: int | None = None
        self._current = self.driver.new_stream()

    def new_stream(self) -> int:
        return self.driver.new_stream()

    def current_stream(self) -> int:
        return self._current

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def handle(self) -> int:
        return self._current

    def wait_for(self, stream: int) -> None:
        self.driver.wait(self._current, self.driver.record(stream))

    def launch(self, work: Callable[..., None], *args: Any) -> None:
        inference = torch.is_inference_mode_enabled()  # a mode of the calling thread

        def closure() -> None:
            with torch.inference_mode(inference):
                work(*args)

        self.driver.enqueue(self._current, closure)

    def settle(self) -> None:
        """vLLM's own operations run on the calling thread and are in no stream here."""
        self.synchronize()

    def synchronize(self) -> None:
        self.driver.synchronize()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def register(self, memory: torch.Tensor) -> None:
        if self.refuse_pinning_after is not None and (
            len(self.registered) >= self.refuse_pinning_after
        ):
            raise RuntimeError("cudaHostRegister answers cudaError.memoryAllocation")
        self.registered.append(memory)

    def unregister(self, memory: torch.Tensor) -> None:
        self.registered = [other for other in self.registered if other is not memory]
