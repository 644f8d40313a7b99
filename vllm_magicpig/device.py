"""Streams, host callbacks and pinned memory: all that the device path asks of CUDA.

Device work goes through `launch`, so that tests can run the very same code over a fake device whose
streams are CPU threads (tests/fake_device.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from vllm_magicpig import _C


class Kernels(Protocol):
    """The launchers of triton_kernels, or their references; shapes are documented there."""

    def pack_directions(self, directions: torch.Tensor, num_bits: int) -> torch.Tensor: ...

    def simhash(
        self,
        vectors: torch.Tensor,
        planes: torch.Tensor,
        num_tables: int,
        center: torch.Tensor | None,
        codes: torch.Tensor,
    ) -> None: ...

    def store_pages(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        codes: torch.Tensor | None,
        slots: torch.Tensor,
        pages: torch.Tensor,
        block_size: int,
    ) -> None: ...

    def gather_pages(
        self,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        start: int,
        stop: int,
        keys_out: torch.Tensor,
        values_out: torch.Tensor,
        block_size: int,
    ) -> None: ...

    def merge_into(
        self, out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
    ) -> None: ...


class Device(Protocol):
    """A device with streams. Work is launched on the calling thread's current stream."""

    torch_device: torch.device
    callbacks: _C.HostCallbacks
    kernels: Kernels

    def new_stream(self) -> Any: ...
    def current_stream(self) -> Any: ...
    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Makes `stream` the current one inside the `with`."""

    def handle(self) -> int:
        """The current stream as the driver knows it, for a host callback."""

    def wait_for(self, stream: Any) -> None:
        """Orders the current stream after all that `stream` was given so far."""

    def launch(self, work: Callable[..., None], *args: Any) -> None:
        """Runs work(*args), which only launches kernels and copies, on the current stream."""

    def settle(self) -> None:
        """Before a result is handed to vLLM, whose next operation is ordered after it by CUDA."""

    def synchronize(self) -> None:
        """Waits for everything; raises what failed on the device."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory that the device copies from and to without a detour."""

    def register(self, memory: torch.Tensor) -> None:
        """Pins host memory and maps it for the device's kernels; raises RuntimeError."""

    def unregister(self, memory: torch.Tensor) -> None: ...


class CudaDevice:
    """An NVIDIA GPU through torch and, for host callbacks, libcuda."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self.callbacks = _C.HostCallbacks(_C.find_launch_host_func())
        self.kernels: Kernels = TritonKernels()

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def handle(self) -> int:
        handle: int = self.current_stream().cuda_stream
        return handle

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        self.current_stream().wait_stream(stream)

    def launch(self, work: Callable[..., None], *args: Any) -> None:
        work(*args)

    def settle(self) -> None:
        pass

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def register(self, memory: torch.Tensor) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        flags = _HOST_REGISTER_PORTABLE | _HOST_REGISTER_MAPPED
        status = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)
        if int(status) != 0:
            raise RuntimeError(f"cudaHostRegister answers {status}")

    def unregister(self, memory: torch.Tensor) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostUnregister(memory.data_ptr())


class TritonKernels:
    """Imported on first use: a machine without a GPU needs none of it."""

    def __init__(self) -> None:
        from vllm_magicpig.triton_kernels import host_pages, merge, simhash

        self.pack_directions = simhash.pack_directions
        self.simhash = simhash.simhash
        self.store_pages = host_pages.store_pages
        self.gather_pages = host_pages.gather_pages
        self.merge_into = merge.merge_into


# cudaHostRegisterPortable and cudaHostRegisterMapped, driver_types.h.
_HOST_REGISTER_PORTABLE, _HOST_REGISTER_MAPPED = 1, 2
