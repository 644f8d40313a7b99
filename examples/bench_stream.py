"""A request of a SampledLayer that grows token by token, by the calls that the device path makes: rows,
codes and metadata into buffers, then one host callback that stores, asks the builder and attends. Here
the callbacks run at once, in the caller's thread: there is no device."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from bench_layer import Decoder, SampledLayer, options_of

from vllm_magicpig import _C
from vllm_magicpig.host_pages import row_bits
from vllm_magicpig.lsh_index import sample_rule

STREAM = 0  # means nothing to callbacks that run at once


class GrowingRequest:
    """The first request of a layer's placement; what it holds is as long as `num_tokens` says."""

    def __init__(
        self,
        layer: SampledLayer,
        native: ModuleType,
        isa: _C.Isa,
        pool: _C.ThreadPool,
        builder: _C.SegmentBuilder | None,
        num_q_heads: int,
    ) -> None:
        self._layer, self.num_tokens = layer, 0
        self._projection = Decoder(layer, isa, pool).projection
        block_tables = layer.placement.block_tables[:1].copy()
        capacity = int(layer.placement.seq_lens[0])
        self._slots = layer.placement.slots(0, 0, capacity)
        self._seq_lens = np.zeros(1, np.int32)
        self._step_slots = np.full(capacity, -1, np.int64)
        self._metadata = _C.StreamMetadata(block_tables, self._seq_lens, self._step_slots)
        shape = (1, layer.num_kv_heads, layer.head_size)
        tables = layer.config.L
        self._query = np.zeros((1, num_q_heads, layer.head_size), np.float32)
        self._key, self._value = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
        self._query_codes = np.zeros((1, num_q_heads, tables), np.uint16)
        self._key_codes = np.zeros((1, layer.num_kv_heads, tables), np.uint16)
        self.out = np.zeros_like(self._query)
        self._exchange = _C.DecodeExchange(
            self._query, self._key, self._value, self._query_codes, self._key_codes, self.out
        )
        self._callbacks = _C.HostCallbacks(native.launch_inline)
        self._native = _C.StreamLayer(
            layer.pages,
            sample_rule(options_of(layer.config)),
            layer.index,
            self._exchange,
            self._callbacks,
            builder,
            scale=layer.scale,
            exact_below=1,
            isa=isa,
            pool=pool,
        )
        self._native.set_center(layer.center.numpy())

    def note_stored(self, num_tokens: int) -> None:
        """Its next tokens are in the pages, rows and codes: a chunk of a prefill. Segments that they
        complete are asked for; what was there at the same place before is not trusted any more."""
        start, self.num_tokens = self.num_tokens, self.num_tokens + num_tokens
        self._step_slots[:num_tokens] = self._slots[start : self.num_tokens]
        self._launch(num_tokens, decode=False)

    def restart(self) -> None:
        """As if nothing had been stored."""
        self.num_tokens = 0

    def decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Appends one token and attends; the result is in `out`.

        query: bfloat16 [num_q_heads, head_size]; key, value: bfloat16 [num_kv_heads, head_size].
        """
        q = query.float()[None]
        self._query[:] = q.numpy()
        self._key[:], self._value[:] = row_bits(key), row_bits(value)
        self._query_codes[:] = self._projection.hash_queries(q)
        self._key_codes[:] = self._projection.hash_keys(key[None], self._layer.center)
        self._step_slots[0] = self._slots[self.num_tokens]
        self.num_tokens += 1
        self._launch(1, decode=True)
        self._callbacks.raise_error()

    def _launch(self, num_tokens: int, decode: bool) -> None:
        self._seq_lens[0] = self.num_tokens
        no_rows, no_tokens = np.zeros(0, np.int32), np.zeros(0, np.int64)
        first, zero = np.zeros(1, np.int32), np.zeros(1, np.int64)
        stop = np.array([num_tokens], np.int64)
        if decode:
            step = self._step(num_tokens, first, zero, no_rows, no_tokens, no_tokens)
            self._native.launch_decode(STREAM, step)
        else:
            step = self._step(num_tokens, no_rows, no_tokens, first, zero, stop)
            self._native.launch_stored(STREAM, step)

    def _step(self, num_tokens: int, *parts: npt.NDArray[np.integer]) -> _C.StreamStep:
        return _C.StreamStep(self._metadata, 1, num_tokens, *parts)

    @property
    def sampled_rows(self) -> int:
        """Of all query heads and steps so far."""
        return self._native.counters.sampled_rows
