"""The worker of vLLM's CPU platform: the pages of a sampled layer are its KV tensor."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_magicpig.backend import backend_with_codes
from vllm_magicpig.cpus import builder_cpus, kernel_cpus
from vllm_magicpig.host_layer import HostLayer
from vllm_magicpig.worker import MagicPigWorker


class MagicPigCPUWorker(MagicPigWorker, CPUWorker):
    def _sampled_backend(self) -> type[Any]:
        return backend_with_codes(self._options.code_words)

    def _kernel_cpus(self) -> list[int]:
        return kernel_cpus(self._options.threads)

    def _builder_cpus(self) -> list[int]:
        return builder_cpus(self._kernel_cpus())

    def _bind_layers(self, kv_cache_config: Any) -> None:
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
