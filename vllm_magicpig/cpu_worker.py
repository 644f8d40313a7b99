"""The worker of vLLM's CPU platform: the pages of a sampled layer are its KV tensor."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_magicpig import _C, capacity
from vllm_magicpig.backend import MagicPigBackend, with_options
from vllm_magicpig.cpus import builder_cpus, kernel_cpus
from vllm_magicpig.host_layer import HostLayer
from vllm_magicpig.huge_pages import huge_page_bytes, renew_on_huge_pages
from vllm_magicpig.worker import MagicPigWorker, logger


class MagicPigCPUWorker(MagicPigWorker, CPUWorker):
    def _sampled_backend(self) -> type[Any]:
        return with_options(MagicPigBackend, self._options)

    def _kernel_cpus(self) -> list[int]:
        return kernel_cpus(self._options.threads)

    def _make_pool(self) -> _C.ThreadPool:
        """The threads of torch's operations, where the kernel has as many: between two of those they
        spin on their cores, and others would wait behind them."""
        cpus = self._kernel_cpus()
        if 1 < len(cpus) == torch.get_num_threads():
            return _C.ThreadPool.of_openmp(len(cpus))
        return super()._make_pool()

    def _builder_cpus(self) -> list[int]:
        return builder_cpus(self._kernel_cpus())

    def _bind_layers(self, kv_cache_config: Any) -> None:
        self._use_huge_pages([layer.kv_cache for layer, _ in self._sampled_layers()])
        for layer, impl in self._sampled_layers():
            impl.bind(
                HostLayer(
                    self._options,
                    impl.layer_index,
                    layer.kv_cache,
                    impl.head_size,
                    impl.scale,
                    impl.center,
                    self._isa,
                    self._pool,
                    self._builder,
                    self._max_index_bytes(impl.num_kv_heads, kv_cache_config.num_blocks),
                )
            )

    def _use_huge_pages(self, kv_caches: list[torch.Tensor]) -> None:
        """vLLM has just zeroed these tensors, on small pages."""
        cpus = sorted(set(self._kernel_cpus()))
        spans = [(kv_cache.data_ptr(), kv_cache.nbytes) for kv_cache in kv_caches]
        for start, size in spans:
            renew_on_huge_pages(start, size, cpus)
        logger.info(
            "magicpig: %.2f GiB of pages, %.2f GiB of it on huge pages; kernel on CPUs %s",
            sum(size for _, size in spans) / capacity.GIB,
            huge_page_bytes(spans) / capacity.GIB,
            ",".join(map(str, cpus)),
        )
