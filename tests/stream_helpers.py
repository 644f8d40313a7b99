"""An engine in miniature over the fake driver: steps are enqueued as the CUDA path enqueues them.

Nothing waits between steps: what a step's kernels and copies do are closures on the stream, and
every result is checked after the last one against what its request held when it was decoded.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from fake_driver import FakeDriver
from native_helpers import Layer, Rule, pool, row_bits

from vllm_magicpig import _C, reference

MAX_REQS, MAX_TOKENS, MAX_DECODES = 12, 2048, 8
CPUS = sorted(os.sched_getaffinity(0))
BOUND = 1e-5
"""As derived in test_native_decode.py, for the same values."""


@contextlib.contextmanager
def fake_driver() -> Iterator[FakeDriver]:
    """With one thread for torch: the reference's small products wait longer for more of them than
    they take, on a machine whose cores are busy with streams."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FakeDriver() as driver:
            yield driver
    finally:
        torch.set_num_threads(num_threads)


@dataclass
class Held:
    """What a request holds in one layer."""

    key: torch.Tensor  # [num_kv_heads, n, head_size]
    value: torch.Tensor
    codes: torch.Tensor  # [num_kv_heads, n, L]

    def __add__(self, other: Held) -> Held:
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        return Held(*(torch.cat(pair, dim=1) for pair in parts))


@dataclass
class Request:
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    held: list[Held] = field(default_factory=list)  # per layer


@dataclass
class Buffers:
    """The arrays of a DecodeExchange."""

    query: npt.NDArray
    key: npt.NDArray
    value: npt.NDArray
    query_codes: npt.NDArray
    key_codes: npt.NDArray
    out: npt.NDArray

    @staticmethod
    def like(layer: Layer, num_q_heads: int) -> Buffers:
        element = np.float32 if layer.dtype == torch.float32 else np.uint16
        kv = (MAX_DECODES, layer.num_kv_heads)
        query = (MAX_DECODES, num_q_heads)
        return Buffers(
            query=np.full((*query, layer.head_size), np.nan, np.float32),
            key=np.zeros((*kv, layer.head_size), element),
            value=np.zeros((*kv, layer.head_size), element),
            query_codes=np.full((*query, layer.num_tables), 0xFFFF, np.uint16),
            key_codes=np.full((*kv, layer.num_tables), 0xFFFF, np.uint16),
            out=np.full((*query, layer.head_size), np.nan, np.float32),
        )

    def native(self) -> _C.DecodeExchange:
        return _C.DecodeExchange(**vars(self))


@dataclass
class StreamedLayer:
    layer: Layer
    native: _C.StreamLayer
    center: torch.Tensor  # [num_kv_heads, head_size]
    directions: torch.Tensor
    sampled: bool = False

    def set_center(self) -> None:
        self.native.set_center(self.center.numpy())
        self.sampled = True

    def new_rows(self, num_tokens: int, generator: torch.Generator) -> Held:
        shape = (self.layer.num_kv_heads, num_tokens, self.layer.head_size)
        key = (torch.randn(shape, generator=generator) + self.center[:, None]).to(self.layer.dtype)
        value = torch.randn(shape, generator=generator).to(self.layer.dtype)
        centred = key.float() - self.center[:, None]
        codes = reference.hash_codes(centred, self.directions, self.layer.num_bits)
        return Held(key, value, codes)

    def write_as_the_device(self, slots: npt.NDArray[np.int64], rows: Held) -> None:
        """Rows and codes into the pages, of which these know nothing yet."""
        layer = self.layer
        both = torch.cat([rows.key, rows.value], dim=-1).contiguous()
        bytes_of_rows = both.view(torch.uint8).numpy()  # [num_kv_heads, n, row_bytes]
        size = bytes_of_rows.shape[-1]
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, layer.block_size)
            layer.memory[block, :, offset * size : (offset + 1) * size] = bytes_of_rows[:, token]
        codes = rows.codes.transpose(0, 1).contiguous().numpy().astype(np.uint16)
        layer.pages.store_codes(codes, slots, pool())


@dataclass
class Decoded:
    """The decodes of one step and layer: what came back, and what they read."""

    layer: StreamedLayer
    sampled: bool
    query: torch.Tensor  # [num_decodes, num_q_heads, head_size]
    query_codes: torch.Tensor
    held: list[Held]
    out: npt.NDArray[np.float32]

    def rows(self, request: int, rule: Rule) -> torch.Tensor:
        """bool [num_q_heads, n]: the reference's sample."""
        codes = self.held[request].codes
        sink, window = rule.sink_tokens, rule.window_tokens
        return reference.sample(self.query_codes[request], codes, rule.min_matches, sink, window)

    def expected(self, request: int, rule: Rule, exact_below: int) -> torch.Tensor:
        held, query, native = self.held[request], self.query[request], self.layer.layer
        scale = native.head_size**-0.5
        middle = reference.middle(held.key.shape[1], rule.sink_tokens, rule.window_tokens)
        if not self.sampled or len(middle) < max(exact_below, 1):
            return reference.exact_attention(query, held.key, held.value, scale)[0]
        return reference.sampled_attention(
            query,
            held.key,
            held.value,
            scale,
            self.rows(request, rule),
            self.layer.center,
            native.num_bits,
            native.num_tables,
            [(rule.min_matches, 1.0)] * len(query),
            rule.sink_tokens,
            rule.window_tokens,
        )[0]


class World:
    """num_layers layers over one block table, one exchange and one stream; prefill is noted on a
    side stream."""

    def __init__(
        self,
        driver: FakeDriver,
        num_layers: int = 1,
        *,
        builder: _C.SegmentBuilder | None = None,
        num_blocks: int = 40,
        group: int = 2,
        rule: Rule | None = None,
        exact_below: int = 0,
        seed: int = 0,
        isa: _C.Isa | None = None,
        **layout: object,
    ) -> None:
        self.driver, self.random = driver, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.main, self.side = driver.new_stream(), driver.new_stream()
        self.rule, self.exact_below = rule or Rule(), exact_below
        self.isa = isa or _C.resolve_isa("auto")
        self.callbacks = _C.HostCallbacks(driver.launch_host_func)
        self.free = list(range(num_blocks))
        self.random.shuffle(self.free)
        self.block_tables = np.zeros((MAX_REQS, num_blocks), np.int32)
        self.seq_lens = np.zeros(MAX_REQS, np.int32)
        self.slots = np.zeros(MAX_TOKENS, np.int64)
        self.metadata = _C.StreamMetadata(self.block_tables, self.seq_lens, self.slots)
        pages = [Layer(num_blocks, **{"num_kv_heads": 2, **layout}) for _ in range(num_layers)]
        self.num_q_heads = pages[0].num_kv_heads * group
        self.buffers = Buffers.like(pages[0], self.num_q_heads)
        self.exchange = self.buffers.native()
        self.layers = [self._streamed(layer, builder, i) for i, layer in enumerate(pages)]
        self.decoded: list[Decoded] = []

    def settings(self) -> dict[str, object]:
        size = self.buffers.query.shape[-1]
        settings = {"scale": size**-0.5, "exact_below": self.exact_below, "isa": self.isa}
        return {**settings, "pool": pool()}

    def _streamed(
        self, layer: Layer, builder: _C.SegmentBuilder | None, seed: int
    ) -> StreamedLayer:
        bits, tables = layer.num_bits, layer.num_tables
        native = _C.StreamLayer(
            layer.pages,
            self.rule.native(bits, tables),
            layer.index,
            self.exchange,
            self.callbacks,
            builder,
            **self.settings(),
        )
        shape = (layer.num_kv_heads, layer.head_size)
        center = 3 * torch.randn(shape, generator=self.generator)
        directions = reference.hyperplanes(layer.head_size, tables, bits, seed)
        return StreamedLayer(layer, native, center, directions)

    def set_centers(self) -> None:
        for layer in self.layers:
            layer.set_center()

    def request(self) -> Request:
        empty = [layer.new_rows(0, self.generator) for layer in self.layers]
        return Request(held=empty)

    def prefilled(self, *lengths: int) -> list[Request]:
        """Requests of these lengths, by a step of their own."""
        requests = [self.request() for _ in lengths]
        self.step([], list(zip(requests, lengths, strict=True)))
        return requests

    def finish(self, request: Request) -> None:
        """Its blocks are the next to be used again."""
        self.free += request.blocks
        request.blocks = []

    def grow(self, request: Request, num_tokens: int) -> npt.NDArray[np.int64]:
        """Slots of the request's next tokens."""
        start, request.length = request.length, request.length + num_tokens
        block_size = self.layers[0].layer.block_size
        while len(request.blocks) * block_size < request.length:
            request.blocks.append(self.free.pop())
        return self.layers[0].layer.slots(request.blocks, start, request.length)

    def step(
        self,
        decodes: list[Request],
        chunks: list[tuple[Request, int]] | None = None,
        padded: int = 0,
    ) -> _C.StreamStep:
        """Enqueues a whole step: `chunks` prefill that many tokens each; `padded` decode rows more
        are dummies."""
        chunks = chunks or []
        rows = self.random.sample(range(MAX_REQS), len(decodes) + padded + len(chunks))
        slots = [self.grow(request, 1) for request in decodes]
        slots += [np.array([-1])] * padded
        slots += [self.grow(request, n) for request, n in chunks]
        starts = np.cumsum([0, *map(len, slots)])
        num_decodes = len(decodes) + padded
        step = _C.StreamStep(
            self.metadata,
            MAX_REQS,
            int(starts[-1]),
            np.array(rows[:num_decodes], np.int32),
            starts[:num_decodes].astype(np.int64),
            np.array(rows[num_decodes:], np.int32),
            starts[num_decodes:-1].astype(np.int64),
            starts[num_decodes + 1 :].astype(np.int64),
        )
        requests = [*decodes, *[None] * padded, *(request for request, _ in chunks)]
        self._send_metadata(rows, requests, np.concatenate(slots))
        noted = []
        for i, layer in enumerate(self.layers):
            for (request, n), slot in zip(chunks, slots[num_decodes:], strict=True):
                new = layer.new_rows(n, self.generator)
                request.held[i] = request.held[i] + new
                self.driver.enqueue(
                    self.main,
                    lambda layer=layer, slot=slot, new=new: layer.write_as_the_device(slot, new),
                )
            self.driver.wait(self.side, self.driver.record(self.main))
            layer.native.launch_stored(self.side, step)
            noted.append(self.driver.record(self.side))
            if num_decodes:
                self._decode(i, decodes, padded, step)
        for event in noted:
            self.driver.wait(self.main, event)
        return step

    def _send_metadata(
        self, rows: list[int], requests: list[Request | None], slots: npt.NDArray[np.int64]
    ) -> None:
        tables = np.full_like(self.block_tables, -7)  # what no request of the step has is garbage
        lens = np.full_like(self.seq_lens, -7)
        for row, request in zip(rows, requests, strict=True):
            if request is not None:
                tables[row, : len(request.blocks)] = request.blocks
                lens[row] = request.length
        flat = np.full_like(self.slots, 1 << 40)
        flat[: len(slots)] = slots

        def copy() -> None:
            self.block_tables[:], self.seq_lens[:], self.slots[:] = tables, lens, flat

        self.driver.enqueue(self.main, copy)

    def _decode(self, i: int, decodes: list[Request], padded: int, step: _C.StreamStep) -> None:
        layer, buffers = self.layers[i], self.buffers
        new = [layer.new_rows(1, self.generator) for _ in decodes]
        for request, token in zip(decodes, new, strict=True):
            request.held[i] = request.held[i] + token
        n = len(decodes)
        shape = (n, self.num_q_heads, layer.layer.head_size)
        query = torch.randn(shape, generator=self.generator)
        codes = reference.hash_codes(query, layer.directions, layer.layer.num_bits)
        out = np.full((n + padded, *shape[1:]), -1.0, np.float32)

        def send() -> None:
            buffers.out[:] = np.nan
            buffers.query[:n] = query.numpy()
            if n:
                rows = [Held(*(part[:, 0] for part in vars(token).values())) for token in new]
                buffers.key[:n] = row_bits(torch.stack([row.key for row in rows]))
                buffers.value[:n] = row_bits(torch.stack([row.value for row in rows]))
                buffers.key_codes[:n] = torch.stack([row.codes for row in rows]).numpy()
                buffers.query_codes[:n] = codes.numpy()
            for dummy in (buffers.query, buffers.key, buffers.value):
                dummy[n:] = 1000
            buffers.query_codes[n:] = 0xFFFF

        def receive() -> None:
            out[:] = buffers.out[: n + padded]

        self.driver.enqueue(self.main, send)
        layer.native.launch_decode(self.main, step)
        self.driver.enqueue(self.main, receive)
        held = [request.held[i] for request in decodes]
        self.decoded.append(Decoded(layer, layer.sampled, query, codes, held, out))

    def synchronize(self) -> None:
        self.driver.synchronize()
        assert self.callbacks.pending == 0

    def check(self) -> None:
        """Every decode since the last check, after all of them."""
        self.synchronize()
        self.callbacks.raise_error()
        assert self.decoded
        for decoded in self.decoded:
            for request in range(len(decoded.held)):
                expected = decoded.expected(request, self.rule, self.exact_below)
                np.testing.assert_allclose(decoded.out[request], expected, rtol=0, atol=BOUND)
            assert not decoded.out[len(decoded.held) :].any(), "dummies get zeros"
        self.decoded.clear()

    def batch(self, requests: list[Request]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Block tables and lengths as the direct calls take them."""
        tables = np.full((len(requests), self.block_tables.shape[1]), -7, np.int32)
        for row, request in enumerate(requests):
            tables[row, : len(request.blocks)] = request.blocks
        return tables, np.array([request.length for request in requests], np.int32)
