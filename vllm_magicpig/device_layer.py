"""A sampled layer whose tensors are on a device and whose pages are in the pinned host pool.

Decode: hash -> send -> (store, look up, attend) -> back, the middle part as a host callback in stream
order. Prefill: rows and codes go to the pages on a side stream while the chunk attends itself; earlier
pages come back on that stream, piece by piece, while the piece before them is attended. Signatures are
the host's own: no codes are sent, and what a chunk has completed is encoded on a third stream, which
only the next layer's chunks wait for. Python only launches and never waits.
"""

from __future__ import annotations

import torch

from vllm_magicpig import _C
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.device import Device
from vllm_magicpig.device_buffers import DeviceBuffers, LayerShape
from vllm_magicpig.device_step import DeviceStep, Span
from vllm_magicpig.flash import Ragged, flash_for
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.layer_signatures import LayerSignatures
from vllm_magicpig.lsh_index import make_index
from vllm_magicpig.stats import LayerStats
from vllm_magicpig.step import Chunk


class DeviceLayer:
    def __init__(
        self,
        options: MagicPigOptions,
        layer_index: int,
        shape: LayerShape,
        scale: float,
        first_kv_head: int,
        memory: torch.Tensor,
        center: KeyCenter | None,
        device: Device,
        buffers: DeviceBuffers,
        isa: _C.Isa,
        pool: _C.ThreadPool,
        builder: _C.SegmentBuilder | None,
        max_index_bytes: int,
    ) -> None:
        """first_kv_head: of this rank; memory: this layer's part of the host pool, as for HostPages;
        center, builder: None where no buckets are used."""
        self.pages = HostPages(memory, shape.head_size, options.num_tables)
        self.index = make_index(
            options, self.pages, layer_index, center, isa, pool, builder, max_index_bytes
        )
        self.signatures = (
            LayerSignatures(options, self.pages, layer_index, first_kv_head, isa, pool)
            if options.has_signatures
            else None
        )
        self.device, self.buffers = device, buffers
        self._decode, self._prefill = buffers.decode[shape], buffers.prefill[shape]
        self._scale, self._num_tables = scale, options.num_tables
        self._flash = flash_for(device.torch_device, shape.dtype, shape.head_size)
        self._native = self._make_native(options, isa, pool, builder)
        # The hyperplanes and the centre as the device's kernels take them.
        self._planes: torch.Tensor | None = None
        self._center: torch.Tensor | None = None
        if self.index is not None:
            planes = device.kernels.pack_directions(self.index.projection.directions, options.K)
            self._planes = planes.to(device.torch_device)
            if self.index.center.value is not None:
                self.take_center()

    def _make_native(
        self,
        options: MagicPigOptions,
        isa: _C.Isa,
        pool: _C.ThreadPool,
        builder: _C.SegmentBuilder | None,
    ) -> _C.StreamLayer:
        exchange, callbacks = self._decode.native, self.device.callbacks
        if self.signatures is not None:
            return _C.StreamLayer.of_signatures(
                self.signatures.native,
                self.signatures.rule,
                exchange,
                callbacks,
                scale=self._scale,
                exact_below=options.exact_below,
                isa=isa,
                pool=pool,
            )
        return _C.StreamLayer(
            self.pages.native,
            None if self.index is None else self.index.rule,
            None if self.index is None else self.index.native,
            exchange,
            callbacks,
            builder,
            scale=self._scale,
            exact_below=options.exact_below,
            isa=isa,
            pool=pool,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        step: DeviceStep,
    ) -> None:
        """Shapes as for the impl; what is launched here is ordered before what the caller launches
        next on its stream."""
        device = self.device
        main = device.current_stream()
        if step.spans:
            with device.on(self.buffers.store_stream):
                device.wait_for(main)
                # Blocks may have changed their owner: none is written while it is being encoded.
                device.wait_for(self.buffers.encode_stream)
                for span in step.spans:
                    device.launch(self._store, key, value, step, span)
                self._native.launch_stored(device.handle(), step.native)
            if self.signatures is not None:
                with device.on(self.buffers.encode_stream):
                    device.wait_for(self.buffers.store_stream)
                    self._native.launch_encode(device.handle(), step.native)
        if step.num_decodes:
            # Beside chunks the host attends while the device does, else in the caller's stream.
            stream = self.buffers.decode_stream if step.spans else main
            with device.on(stream):
                if step.spans:
                    device.wait_for(main)
                device.launch(self._send, query, key, value, step)
                self._native.launch_decode(device.handle(), step.native)
                device.launch(self._receive, output, step)
        for span in step.spans:
            self._attend_span(query, key, value, output, step, span)
        if step.spans:
            device.wait_for(self.buffers.store_stream)
            if step.num_decodes:
                device.wait_for(self.buffers.decode_stream)
        device.settle()

    def warm_up(self) -> None:
        """Runs every variant of the Triton kernels once, so that none is compiled while serving: no
        step of vLLM's own warm-up goes everywhere, and with enforce_eager there is hardly any."""
        self.device.launch(self._warm_up)

    def _warm_up(self) -> None:
        kernels, held, decode = self.device.kernels, self._prefill, self._decode
        chunks, block_size = self.pages.chunks, self.pages.block_size
        zeros = held.part.zero_()
        key, on_device = zeros[:, : self.pages.num_kv_heads], zeros.device
        nowhere = torch.full((1,), -1, dtype=torch.int64, device=on_device)
        kernels.store_pages(key[:1], key[:1], None, nowhere, chunks, block_size)
        table = torch.zeros(1, dtype=torch.int32, device=on_device)
        rows = held.keys[0][:1], held.values[0][:1]
        kernels.gather_pages(chunks, table, 0, 1, *rows, block_size)
        lse = held.lse.zero_()[:, :1]
        kernels.merge_into(held.out.zero_()[:1], lse, zeros[:1], lse.clone())
        if self._planes is None:
            return
        assert held.key_codes is not None
        assert decode.query_codes is not None
        assert decode.key_codes is not None
        kernels.store_pages(key[:1], key[:1], held.key_codes[:1], nowhere, chunks, block_size)
        center = torch.zeros(key.shape[1:], device=on_device)
        for vectors, mean, codes in (
            (zeros, None, decode.query_codes),
            (key, center, decode.key_codes),
            (key, center, held.key_codes),
        ):
            for n in (1, min(len(codes), len(zeros))):  # tiles are smaller for few rows
                kernels.simhash(vectors[:n], self._planes, self._num_tables, mean, codes[:n])

    # ------------------------------------------------------------------------------------ decode

    def _send(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: DeviceStep
    ) -> None:
        index, n, to = step.decode_index, step.num_decodes, self._decode
        q, k, v = query[index], key[index], value[index]
        if self._center is not None:
            assert self._planes is not None
            assert to.query_codes is not None
            assert to.key_codes is not None
            simhash = self.device.kernels.simhash
            simhash(q, self._planes, self._num_tables, None, to.query_codes[:n])
            simhash(k, self._planes, self._num_tables, self._center, to.key_codes[:n])
        to.query[:n].copy_(q.float(), non_blocking=True)
        to.key[:n].copy_(k.contiguous(), non_blocking=True)
        to.value[:n].copy_(v.contiguous(), non_blocking=True)

    def _receive(self, output: torch.Tensor, step: DeviceStep) -> None:
        n = step.num_decodes
        out = self._decode.out_device[:n]
        out.copy_(self._decode.out[:n], non_blocking=True)
        output[step.decode_index] = out.to(output.dtype)

    # ----------------------------------------------------------------------------------- prefill

    def _store(self, key: torch.Tensor, value: torch.Tensor, step: DeviceStep, span: Span) -> None:
        tokens = span.tokens
        codes = None
        if self._center is not None:
            assert self._planes is not None
            assert self._prefill.key_codes is not None
            # From the start, where it is aligned: what lay there is stored already.
            codes = self._prefill.key_codes[: tokens.stop - tokens.start]
            self.device.kernels.simhash(
                key[tokens], self._planes, self._num_tables, self._center, codes
            )
        self.device.kernels.store_pages(
            key[tokens],
            value[tokens],
            codes,
            step.slots[tokens],
            self.pages.chunks,
            self.pages.block_size,
        )

    def _attend_span(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        step: DeviceStep,
        span: Span,
    ) -> None:
        device, tokens = self.device, span.tokens
        with_context = [chunk for chunk in span.chunks if chunk.context_len > 0]
        if with_context:
            # The first piece travels while the span attends itself.
            self._launch_gather(with_context[0], 0, step)
        device.launch(
            self._attend_itself,
            query[tokens],
            key[tokens],
            value[tokens],
            output[tokens],
            span,
            bool(with_context),
        )
        for i, chunk in enumerate(with_context):
            following = with_context[i + 1] if i + 1 < len(with_context) else None
            self._attend_context(query, output, step, span, chunk, following)

    def _attend_itself(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        span: Span,
        with_context: bool,
    ) -> None:
        """All chunks of a span causally; where context follows, the result stays in float32."""
        n, held = query.shape[0], self._prefill
        lse = self._flash(
            query, key, value, span.queries, span.queries, output, self._scale, causal=True
        )
        if with_context:
            held.out[:n].copy_(output)
            held.lse[:, :n].copy_(lse)

    def _attend_context(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        step: DeviceStep,
        span: Span,
        chunk: Chunk,
        following: Chunk | None,
    ) -> None:
        """A chunk over its context, whose first piece is on its way; sends for the next one each time.

        A piece goes into the staging buffer that the piece before the last has left.
        """
        device = self.device
        num_pieces = -(-chunk.context_len // self._prefill.staging_tokens)
        for piece in range(num_pieces):
            device.wait_for(self.buffers.store_stream)
            if piece + 1 < num_pieces:
                self._launch_gather(chunk, piece + 1, step)
            device.launch(self._attend_piece, query, span, chunk, piece)
        if following is not None:
            self._launch_gather(following, 0, step)
        device.launch(self._round, output, span, chunk)

    def _launch_gather(self, chunk: Chunk, piece: int, step: DeviceStep) -> None:
        device = self.device
        main = device.current_stream()
        with device.on(self.buffers.store_stream):
            device.wait_for(main)
            device.launch(self._gather, chunk, piece, step)

    def _gather(self, chunk: Chunk, piece: int, step: DeviceStep) -> None:
        start, stop = self._piece_of(chunk, piece)
        self.device.kernels.gather_pages(
            self.pages.chunks,
            step.block_tables[chunk.request],
            start,
            stop,
            self._prefill.keys[piece % 2][: stop - start],
            self._prefill.values[piece % 2][: stop - start],
            self.pages.block_size,
        )

    def _attend_piece(self, query: torch.Tensor, span: Span, chunk: Chunk, piece: int) -> None:
        held = self._prefill
        start, stop = self._piece_of(chunk, piece)
        num_queries, num_keys = chunk.stop - chunk.start, stop - start
        part = held.part[:num_queries]
        lse = self._flash(
            query[chunk.start : chunk.stop],
            held.keys[piece % 2][:num_keys],
            held.values[piece % 2][:num_keys],
            Ragged.single(num_queries, query.device),
            Ragged.single(num_keys, query.device),
            part,
            self._scale,
            causal=False,
        )
        rows = _rows_of(chunk, span)
        self.device.kernels.merge_into(held.out[rows], held.lse[:, rows], part, lse)

    def _piece_of(self, chunk: Chunk, piece: int) -> tuple[int, int]:
        """Positions [start, stop) of a piece of the chunk's context."""
        start = piece * self._prefill.staging_tokens
        return start, min(start + self._prefill.staging_tokens, chunk.context_len)

    def _round(self, output: torch.Tensor, span: Span, chunk: Chunk) -> None:
        output[chunk.start : chunk.stop] = self._prefill.out[_rows_of(chunk, span)].to(output.dtype)

    # ------------------------------------------------------------------------------------ centre

    def take_center(self) -> None:
        """Samples from now on: the centre has just been fixed. Steps that are in flight do not."""
        assert self.index is not None
        center = self.index.center
        assert center.value is not None
        self._native.set_center(center.array)
        self._center = center.value.to(self.device.torch_device)

    def forget(self) -> None:
        self.pages.native.forget()
        if self.index is not None:
            self.index.forget()
        self._native.forget_steps()

    def stats(self) -> LayerStats:
        return LayerStats.from_counters(self._native.counters, self._native.recent_rows())


def _rows_of(chunk: Chunk, span: Span) -> slice:
    """Where a chunk is in the buffers of its span."""
    first = span.tokens.start
    return slice(chunk.start - first, chunk.stop - first)
