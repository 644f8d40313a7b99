"""What magicpig's workers share on every platform: their layers, statistics and key centres."""

from __future__ import annotations

import time
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_magicpig import _C, capacity
from vllm_magicpig.backend import MagicPigImpl
from vllm_magicpig.center_measurement import measure_centers
from vllm_magicpig.config import MagicPigOptions, parse_options
from vllm_magicpig.key_center import save_centers
from vllm_magicpig.layer_selection import select_layers
from vllm_magicpig.published_stats import StatsFile
from vllm_magicpig.stats import HIGH_ERROR_BAR, MagicPigStats, summarise

# vLLM configures its own loggers only, by this prefix.
logger = init_logger("vllm.magicpig.worker")

LOG_INTERVAL_S = 10.0
PUBLISH_INTERVAL_S = 1.0


class MagicPigWorker:
    """Mixed into a worker class of vLLM, before it."""

    vllm_config: Any
    parallel_config: Any
    _kv_cache_config: Any = None
    _pool: _C.ThreadPool
    _builder: _C.SegmentBuilder | None = None
    _stats_file: StatsFile | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        # What this machine cannot do is said before the weights are read.
        _C.resolve_isa(self._options.isa)
        self._kernel_cpus()
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        # vLLM has asked no layer for its KV cache spec yet.
        with set_current_vllm_config(self.vllm_config):
            select_layers(self.vllm_config, self._options, self._sampled_backend())

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        self._kv_cache_config = kv_cache_config
        self._isa = _C.resolve_isa(self._options.isa)
        self._pool = self._make_pool()
        if self._options.has_buckets:
            self._builder = _C.SegmentBuilder(self._builder_cpus(), self._pool)
        self._bind_layers(kv_cache_config)
        self._logged_at, self._logged_steps = time.monotonic(), 0
        self._warned_layers: set[int] = set()
        self._stats_file = self._make_stats_file()
        self._publish()
        logger.info(
            "magicpig: %d layers %s, %d dense; kernels for %s on %d threads; %s",
            len(self._sampled_layers()),
            "exact (K = 0)" if self._options.is_exact else "sampled",
            self._num_dense_layers(),
            self._isa.name,
            self._pool.num_threads,
            self._options,
        )
        self._warn_of_lengths()

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        impls = [impl for _, impl in self._sampled_layers()]
        measure_centers(impls, self.vllm_config, self._kv_cache_config, self._run_step)
        self._forget_warm_up()
        return result

    def _forget_warm_up(self) -> None:
        """Made-up requests have written to blocks that no request holds: nothing may hash or count
        them. No step is in flight."""
        if self._builder is not None:
            self._builder.drain()
        for _, impl in self._sampled_layers():
            impl.forget()
        self._publish()

    def _run_step(self, step: Any) -> None:
        """As vLLM's engine core runs one, and waits for it."""
        worker: Any = self  # by the names that the engine core knows, which are vLLM's
        output = worker.execute_model(step)
        if output is None:
            output = worker.sample_tokens(None)
        if isinstance(output, AsyncModelRunnerOutput):
            output.get_output()

    def execute_model(self, scheduler_output: Any) -> Any:
        self._count_reuse(scheduler_output)
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        if self._builder is not None:
            self._builder.raise_error()
        now = time.monotonic()
        if now - self._published_at >= PUBLISH_INTERVAL_S or _goes_idle(scheduler_output):
            self._publish()
        if now - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = now
            stats = self._stats()
            if stats.decode_steps != self._logged_steps:
                self._logged_steps = stats.decode_steps
                logger.info("magicpig: %s", stats.line())
                self._warn_of_errors()
        return result

    def shutdown(self) -> None:
        """Nothing may build from pages that go away."""
        if self._builder is not None:
            self._builder.close()
        if self._stats_file is not None:
            self._stats_file.remove()
        super().shutdown()  # type: ignore[misc]

    def magicpig_stats(self) -> dict[str, Any]:
        """MagicPigStats of this rank as a dict, for collective_rpc and its HTTP route."""
        return self._stats().to_dict()

    def magicpig_save_centers(self, path: str) -> int:
        """Writes the key centres as a calibration file; returns the number of layers.

        Single-rank engines only. Raises ValueError in exact mode and with signatures, which have none.
        """
        if self.parallel_config.world_size > 1:
            raise ValueError(
                f"key centres are saved from one rank and this engine has "
                f"{self.parallel_config.world_size}; save them with --tensor-parallel-size 1."
            )
        centers = {
            impl.layer_index: impl.center.value
            for _, impl in self._sampled_layers()
            if impl.center is not None and impl.center.value is not None
        }
        if not centers:
            raise ValueError(
                "this engine has no key centres, which layers sampled by buckets have; set index to "
                '"buckets" and K above 0.'
            )
        save_centers(path, centers)
        return len(centers)

    def _warn_of_lengths(self) -> None:
        """No error: short requests are right, only no faster than with the platform's own backend."""
        max_model_len = self.vllm_config.model_config.max_model_len
        if not self._options.is_exact and not self._options.samples(max_model_len):
            logger.warning(
                "magicpig: no request can be long enough to be sampled: of at most max_model_len = %d "
                "tokens sink_tokens = %d, window_tokens = %d and a middle shorter than exact_below = "
                "%d are attended exactly; lower exact_below or window_tokens, or raise "
                "--max-model-len.",
                max_model_len,
                self._options.sink_tokens,
                self._options.window_tokens,
                self._options.exact_below,
            )

    def _warn_of_errors(self) -> None:
        """Of each layer once, after steps enough."""
        for _, impl in self._sampled_layers():
            stats = impl.stats()
            if stats.errs_much and impl.layer_index not in self._warned_layers:
                self._warned_layers.add(impl.layer_index)
                logger.warning(
                    "magicpig: the outputs of layer %d are expected to err by %.2f of their size on "
                    "average, which is above %.1f; raise row_budget or bits, or name the layer in "
                    "dense_layers.",
                    impl.layer_index,
                    stats.error_bar,
                    HIGH_ERROR_BAR,
                )

    def _sampled_backend(self) -> type[Any]:
        """The backend class that shapes the sampled layers' KV cache spec."""
        raise NotImplementedError

    def _kernel_cpus(self) -> list[int]:
        raise NotImplementedError

    def _make_pool(self) -> _C.ThreadPool:
        return _C.ThreadPool(self._kernel_cpus())

    def _builder_cpus(self) -> list[int]:
        """Of the threads that build segments; they are niced, and give way to the kernel's."""
        return self._kernel_cpus()

    def _bind_layers(self, kv_cache_config: Any) -> None:
        """Gives every sampled layer its pages."""
        raise NotImplementedError

    def _max_index_bytes(self, num_kv_heads: int, num_blocks: int) -> int:
        """What the index of one layer may take."""
        options = self._options
        return capacity.max_index_bytes(
            num_blocks,
            num_kv_heads,
            options.K,
            options.num_tables,
            self.vllm_config.cache_config.block_size,
            self.vllm_config.model_config.max_model_len,
        )

    @property
    def _options(self) -> MagicPigOptions:
        return parse_options(self.vllm_config.additional_config)

    def _attention_layers(self) -> list[Any]:
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer for layer in layers if hasattr(layer, "impl")]

    def _sampled_layers(self) -> list[tuple[Any, MagicPigImpl]]:
        return [
            (layer, layer.impl)
            for layer in self._attention_layers()
            if isinstance(layer.impl, MagicPigImpl)
        ]

    def _num_dense_layers(self) -> int:
        return len(self._attention_layers()) - len(self._sampled_layers())

    def _count_reuse(self, scheduler_output: Any) -> None:
        """New and resumed requests may start on cached blocks, whose segments then exist already."""
        starts = [
            (request.block_ids, request.num_computed_tokens)
            for request in scheduler_output.scheduled_new_reqs
        ]
        cached = scheduler_output.scheduled_cached_reqs
        starts += [
            (block_ids, num_computed)
            for req_id, block_ids, num_computed in zip(
                cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
            )
            if req_id in cached.resumed_req_ids
        ]
        for block_ids, num_computed in starts:
            if num_computed > 0 and block_ids is not None:
                for _, impl in self._sampled_layers():
                    impl.count_reuse(block_ids[0], num_computed)

    def _make_stats_file(self) -> StatsFile:
        return StatsFile(
            self.vllm_config.instance_id,
            self.parallel_config.data_parallel_index,
            self.parallel_config.rank,
        )

    def _publish(self) -> None:
        """Writes the figures that the API server shows at /metrics; serving goes on without them."""
        self._published_at = time.monotonic()
        if self._stats_file is None:
            return
        try:
            self._stats_file.write(self._stats().to_dict())
        except OSError as error:
            logger.warning("magicpig: its figures will not be at /metrics: %s", error)
            self._stats_file = None

    def _stats(self) -> MagicPigStats:
        impls = [impl for _, impl in self._sampled_layers()]
        return summarise(
            [impl.stats() for impl in impls],
            [impl.page_use() for impl in impls],
            dense_layers=self._num_dense_layers(),
            key_centers=sum(impl.is_centred for impl in impls),
            threads=self._pool.num_threads,
            isa=self._isa.name,
            index=self._options.index,
            idle_index_bytes=_C.idle_segment_bytes(),
        )


def _goes_idle(scheduler_output: Any) -> bool:
    """Whether this is the empty step that tells workers of the last finished requests."""
    return scheduler_output.total_num_scheduled_tokens == 0 and bool(
        scheduler_output.finished_req_ids
    )
