"""The worker of an NVIDIA GPU."""

from __future__ import annotations

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_magicpig.cpus import rank_cpus
from vllm_magicpig.device import CudaDevice, Device
from vllm_magicpig.device_worker import DevicePagesWorker


class MagicPigCudaWorker(DevicePagesWorker, Worker):
    def _make_device(self) -> Device:
        return CudaDevice(self.device)

    def _kernel_cpus(self) -> list[int]:
        return rank_cpus(
            self._options.threads,
            self.local_rank,
            self._local_ranks,
            current_platform.get_all_device_numa_nodes(),
        )
