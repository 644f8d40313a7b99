"""The worker of a device whose sampled layers keep their pages in the pinned host pool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_magicpig import _C, capacity
from vllm_magicpig.backend import with_options
from vllm_magicpig.device import Device
from vllm_magicpig.device_backend import DevicePageBackend
from vllm_magicpig.device_buffers import DeviceBuffers, LayerShape
from vllm_magicpig.device_layer import DeviceLayer
from vllm_magicpig.host_pool import HostPool, free_ram_bytes
from vllm_magicpig.huge_pages import renew_on_huge_pages
from vllm_magicpig.worker import MagicPigWorker

logger = init_logger("vllm.magicpig.worker")

SPIN_US = 500
"""How long the kernel's threads wait for the next layer's decode before they sleep: between two lie the
device's projections and MLP, 100 us for an 8B model, and its copies. The threads of a server without
requests sleep."""


class DevicePagesWorker(MagicPigWorker):
    """Mixed into a worker class of vLLM; the subclass says which device it is."""

    get_kv_cache_spec: Callable[[], dict[str, Any]]
    _device: Device | None = None
    _host_pool: HostPool | None = None

    def _make_device(self) -> Device:
        raise NotImplementedError

    # --------------------------------------------------------------------------------- capacity

    def determine_available_memory(self) -> int:
        """Device bytes for vLLM's cache, limited so that the blocks also fit the host budget."""
        # Before vLLM measures what is left, so that it counts the device's share of the buffers.
        self._device = self._make_device()
        self._buffers = self._make_buffers(self._device)
        device_bytes: int = super().determine_available_memory()  # type: ignore[misc]
        specs = self.get_kv_cache_spec()
        planned = self._plan(device_bytes, specs)
        block_size = self._block_size
        max_model_len = self.vllm_config.model_config.max_model_len
        if (
            self.vllm_config.model_config.original_max_model_len != -1
        ):  # else vLLM fits it to the cache
            capacity.check_one_request(planned, block_size=block_size, max_model_len=max_model_len)
        logger.info(
            "%s",
            capacity.report(
                planned,
                block_size=block_size,
                max_model_len=max_model_len,
                dense_block_bytes=sum(_dense_page_bytes(spec) for spec in specs.values()),
                dense_backend=self._dense_backend_name(),
            ),
        )
        return min(device_bytes, planned.num_blocks * planned.device_block_bytes)

    def _plan(self, device_bytes: int, specs: dict[str, Any]) -> capacity.Capacity:
        options = self._options
        shapes = [self._shape(impl) for _, impl in self._sampled_layers()]
        free, ranks = free_ram_bytes(), self._local_ranks
        if options.host_kv_cache_gib is None:
            host_bytes = capacity.default_host_bytes(free, ranks)
            logger.info("%s", capacity.default_host_report(free, ranks))
        else:
            host_bytes = int(options.host_kv_cache_gib * capacity.GIB)
            if options.check_host_memory:
                capacity.check_host_bytes(host_bytes, free, ranks)
        return capacity.plan_blocks(
            host_bytes,
            device_bytes,
            sum(
                capacity.host_block_bytes(
                    1,
                    shape.num_kv_heads,
                    shape.head_size,
                    shape.dtype.itemsize,
                    options.num_tables,
                    self._block_size,
                )
                for shape in shapes
            ),
            sum(
                capacity.index_bytes_per_block(
                    1,
                    shape.num_kv_heads,
                    options.K,
                    options.num_tables,
                    self._block_size,
                )
                for shape in shapes
            ),
            sum(spec.page_size_bytes for spec in specs.values()),
            index_spare_bytes=sum(
                capacity.index_spare_bytes(
                    1,
                    shape.num_kv_heads,
                    options.K,
                    options.num_tables,
                    self._block_size,
                    self.vllm_config.model_config.max_model_len,
                )
                for shape in shapes
            ),
            signature_block_bytes=sum(
                capacity.signature_block_bytes(
                    1,
                    shape.num_kv_heads,
                    shape.head_size,
                    options.signature_bits,
                    self._block_size,
                )
                for shape in shapes
            ),
        )

    # ------------------------------------------------------------------------------------ layers

    def _make_pool(self) -> _C.ThreadPool:
        return _C.ThreadPool(self._kernel_cpus(), SPIN_US)

    def _sampled_backend(self) -> type[Any]:
        return with_options(DevicePageBackend, self._options)

    def _make_buffers(self, device: Device) -> DeviceBuffers:
        scheduler = self.vllm_config.scheduler_config
        return DeviceBuffers(
            device,
            self._options,
            {self._shape(impl) for _, impl in self._sampled_layers()},
            max_reqs=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
        )

    def _bind_layers(self, kv_cache_config: Any) -> None:
        assert self._device is not None, "vLLM sizes its cache before it allocates it"
        layers = [(impl, self._shape(impl)) for _, impl in self._sampled_layers()]
        num_blocks, block_size = kv_cache_config.num_blocks, self._block_size
        max_model_len = self.vllm_config.model_config.max_model_len
        self._buffers.make_step_buffers(-(-max_model_len // block_size))
        options, cpus = self._options, self._kernel_cpus()
        sizes = [
            num_blocks * shape.num_kv_heads * block_size * _token_bytes(shape, options.num_tables)
            for _, shape in layers
        ]
        self._host_pool = HostPool(
            self._device, sizes, cpus, _log_progress("pinning the host KV pool")
        )
        logger.info(
            "magicpig: host KV pool of %.1f GiB, %.1f GiB of it on huge pages",
            sum(sizes) / capacity.GIB,
            self._host_pool.huge_page_bytes() / capacity.GIB,
        )
        for number, (impl, shape) in enumerate(layers):
            elements = _token_bytes(shape, options.num_tables) // shape.dtype.itemsize
            region = self._host_pool.layer(number).view(shape.dtype)
            sampled = DeviceLayer(
                options,
                impl.layer_index,
                shape,
                impl.scale,
                impl.first_kv_head,
                region.view(num_blocks, shape.num_kv_heads, block_size, elements),
                impl.center,
                self._device,
                self._buffers,
                self._isa,
                self._pool,
                self._builder,
                self._max_index_bytes(shape.num_kv_heads, num_blocks),
            )
            impl.bind(sampled)
            if sampled.signatures is not None:
                memory = sampled.signatures.memory
                renew_on_huge_pages(memory.data_ptr(), memory.nbytes, cpus)

    def _shape(self, impl: Any) -> LayerShape:
        dtype = impl.kv_cache_dtype
        return LayerShape(
            impl.num_heads,
            impl.num_kv_heads,
            impl.head_size,
            self.vllm_config.model_config.dtype if dtype == "auto" else getattr(torch, dtype),
        )

    def compile_or_warm_up_model(self) -> Any:
        warmed = {self._shape(impl): impl.sampled for _, impl in self._sampled_layers()}
        for layer in warmed.values():
            assert isinstance(layer, DeviceLayer)
            layer.warm_up()
        return super().compile_or_warm_up_model()

    def _forget_warm_up(self) -> None:
        assert self._device is not None
        self._device.synchronize()
        self._raise_error()
        super()._forget_warm_up()

    # ------------------------------------------------------------------------------------- steps

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._checked(super().execute_model(scheduler_output))

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._checked(super().sample_tokens(grammar_output))  # type: ignore[misc]

    def _checked(self, output: Any) -> Any:
        """A step's output, or the error that one of its host callbacks ran into."""
        if isinstance(output, AsyncModelRunnerOutput):
            return _CheckedOutput(output, self._raise_error)
        if output is not None:  # vLLM has waited for the device
            self._raise_error()
        return output

    def _raise_error(self) -> None:
        if self._device is not None:
            self._device.callbacks.raise_error()
        if self._builder is not None:
            self._builder.raise_error()

    def shutdown(self) -> None:
        """Nothing may run on the pool when it is unpinned. Every part is shut down, also after one has
        failed, such as a device that cannot be waited for any more; the error is raised then."""
        with ExitStack() as in_turn:  # what is added last comes first
            in_turn.callback(super().shutdown)
            in_turn.callback(self._close_pool)
            if self._builder is not None:
                in_turn.callback(self._builder.close)
            if self._device is not None:
                in_turn.callback(self._device.synchronize)

    def _close_pool(self) -> None:
        for _, impl in self._sampled_layers():
            impl.sampled = None
        if self._host_pool is not None:
            self._host_pool.close()
            self._host_pool = None

    # ------------------------------------------------------------------------------------ config

    @property
    def _block_size(self) -> int:
        size: int = self.vllm_config.cache_config.block_size
        return size

    @property
    def _local_ranks(self) -> int:
        """Workers of this engine on this machine, who share its RAM and cores."""
        parallel = self.vllm_config.parallel_config
        ranks: int = parallel.local_world_size * parallel.data_parallel_size_local
        return max(1, ranks)

    def _dense_backend_name(self) -> str:
        names = {
            layer.attn_backend.get_name()
            for layer in self._attention_layers()
            if not issubclass(layer.attn_backend, DevicePageBackend)
        }
        return " and ".join(sorted(names)) or "dense attention"


class _CheckedOutput(AsyncModelRunnerOutput):
    """A step's output whose errors surface where vLLM waits for it."""

    def __init__(self, output: AsyncModelRunnerOutput, check: Callable[[], None]) -> None:
        self._output, self._check = output, check

    def get_output(self) -> ModelRunnerOutput:
        result = self._output.get_output()
        self._check()
        return result

    def get_kv_connector_output(self) -> Any:
        """What vLLM 0.33 asks for after an error; KV connectors are refused at start-up."""
        return self._output.get_kv_connector_output()


def _token_bytes(shape: LayerShape, num_tables: int) -> int:
    return capacity.content_bytes(shape.head_size, shape.dtype.itemsize, num_tables)


def _dense_page_bytes(spec: Any) -> int:
    """Of one block, if the layer were dense."""
    return capacity.dense_block_bytes(
        1, spec.num_kv_heads, spec.head_size, spec.dtype.itemsize, spec.block_size
    )


def _log_progress(what: str) -> Callable[[int, int], None]:
    """Logs about every tenth of a pool that takes long enough to wonder."""
    logged = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal logged
        if total >= 8 * capacity.GIB and (done - logged >= total / 10 or done == total):
            logged = done
            logger.info(
                "magicpig: %s, %.1f of %.1f GiB", what, done / capacity.GIB, total / capacity.GIB
            )

    return on_progress
