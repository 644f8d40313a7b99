"""A worker that runs the device path on vLLM's CPU platform (tests/fake_device.py)."""

from __future__ import annotations

from fake_device import FakeDevice
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_magicpig.cpus import kernel_cpus
from vllm_magicpig.device import Device
from vllm_magicpig.device_worker import DevicePagesWorker

ON_FAKE_DEVICE = {"worker_cls": "fake_device_worker.FakeDeviceWorker"}
"""Engine arguments."""


class FakeDeviceWorker(DevicePagesWorker, CPUWorker):
    def _make_device(self) -> Device:
        return FakeDevice()

    def _kernel_cpus(self) -> list[int]:
        return kernel_cpus(self._options.threads)
