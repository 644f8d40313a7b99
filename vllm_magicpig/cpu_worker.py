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

    def determine_available_memory(self) -> int:
        """What vLLM may take for pages: signatures lie beside them, within the same limit."""
        available: int = super().determine_available_memory()
        if not self._options.has_signatures:
            return available
        block_size = self.vllm_config.cache_config.block_size
        pages = sum(
            spec.page_size_bytes // spec.block_size * block_size
            for spec in self.model_runner.get_kv_cache_spec().values()
        )
        signatures = sum(
            capacity.signature_block_bytes(
                1, impl.num_kv_heads, impl.head_size, self._options.bits, block_size
            )
            for _, impl in self._sampled_layers()
        )
        share: int = available * pages // (pages + signatures)
        return share

    def _bind_layers(self, kv_cache_config: Any) -> None:
        memory: list[torch.Tensor] = []
        for layer, impl in self._sampled_layers():
            sampled = HostLayer(
                self._options,
                impl.layer_index,
                layer.kv_cache,
                impl.head_size,
                impl.scale,
                impl.first_kv_head,
                impl.center,
                self._isa,
                self._pool,
                self._builder,
                self._max_index_bytes(impl.num_kv_heads, kv_cache_config.num_blocks),
            )
            impl.bind(sampled)
            memory.append(layer.kv_cache)
            if sampled.signatures is not None:
                memory.append(sampled.signatures.memory)
        self._use_huge_pages(memory)

    def _use_huge_pages(self, memory: list[torch.Tensor]) -> None:
        """These tensors have just been zeroed, on small pages."""
        cpus = sorted(set(self._kernel_cpus()))
        spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in memory]
        for start, size in spans:
            renew_on_huge_pages(start, size, cpus)
        logger.info(
            "magicpig: %.2f GiB of pages, %.2f GiB of it on huge pages; kernel on CPUs %s",
            sum(size for _, size in spans) / capacity.GIB,
            huge_page_bytes(spans) / capacity.GIB,
            ",".join(map(str, cpus)),
        )
