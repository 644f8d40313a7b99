"""Signatures in stream order: results are to the bit those of a DecodeLayer over the same rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_driver import FakeDriver
from native_helpers import each_isa, pool, row_bits
from signature_paging import Paged, aligned
from stream_helpers import fake_driver

from vllm_magicpig import _C
from vllm_magicpig.capacity import signature_block_bytes

GROUP, BUDGET, SCALE = 3, 0.05, 2.0**-4
MAX_REQS, MAX_TOKENS = 4, 4096


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with fake_driver() as driver:
        yield driver


class Streamed:
    """The requests of a Paged in pages of their own, which only a stream writes.

    The Paged itself is the synchronous twin: it holds all rows from the start.
    """

    def __init__(
        self, driver: FakeDriver, twin: Paged, isa: _C.Isa | None = None, exact_below: int = 1
    ) -> None:
        self.driver, self.twin = driver, twin
        self.main, self.side, self.encoding = (driver.new_stream() for _ in range(3))
        self.callbacks = _C.HostCallbacks(driver.launch_host_func)
        query = (MAX_REQS, twin.num_kv_heads * GROUP, twin.head_size)
        row = (MAX_REQS, twin.num_kv_heads, twin.head_size)
        element = np.float32 if twin.dtype == torch.float32 else np.uint16
        self.query, self.out = (np.full(query, np.nan, np.float32) for _ in range(2))
        self.key, self.value = np.zeros(row, element), np.zeros(row, element)
        exchange = _C.DecodeExchange(self.query, self.key, self.value, None, None, self.out)
        self.tables = np.zeros((MAX_REQS, twin.tables.shape[1]), np.int32)
        self.seq_lens = np.zeros(MAX_REQS, np.int32)
        self.slots = np.zeros(MAX_TOKENS, np.int64)
        self.metadata = _C.StreamMetadata(self.tables, self.seq_lens, self.slots)

        self.memory = np.full_like(twin.memory, 0xFF)  # no numbers: whoever reads early shows
        name = str(twin.dtype).removeprefix("torch.")
        self.pages = _C.Pages(self.memory, name, twin.block_size, twin.head_size, 0)
        blocks, heads = self.memory.shape[:2]
        of_block = signature_block_bytes(1, heads, twin.head_size, twin.bits, twin.block_size)
        self.signatures = _C.SignaturePool(
            self.pages, aligned(blocks * of_block), twin.signs.numpy(), twin.bits
        )
        settings = {
            "scale": SCALE,
            "exact_below": exact_below,
            "isa": isa or _C.resolve_isa("auto"),
            "pool": pool(),
        }
        rule = twin.rule(BUDGET)
        self.layer = _C.StreamLayer.of_signatures(
            self.signatures, rule, exchange, self.callbacks, **settings
        )
        self.direct = _C.DecodeLayer.of_signatures(twin.signatures, rule, **settings)
        self.generator = torch.Generator().manual_seed(8)
        self.decoded: list[tuple[npt.NDArray, npt.NDArray]] = []  # what came back, and the twin's

    def slots_of(self, row: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        size, positions = self.twin.block_size, np.arange(start, stop)
        return self.twin.tables[row, positions // size].astype(np.int64) * size + positions % size

    def step(
        self,
        decodes: dict[int, int],
        chunks: Sequence[tuple[int, int, int]] = (),
        encode: bool = True,
        bad: bool = False,
    ) -> None:
        """decodes: request to the position of its new token; chunks: (request, start, stop).

        bad: the block tables name a block that is not there.
        """
        lengths = [position + 1 for position in decodes.values()] + [stop for *_, stop in chunks]
        rows = [*decodes, *(row for row, *_ in chunks)]
        slots = [self.slots_of(row, at, at + 1) for row, at in decodes.items()]
        slots += [self.slots_of(*chunk) for chunk in chunks]
        starts = np.cumsum([0, *map(len, slots)])
        n = len(decodes)
        step = _C.StreamStep(
            self.metadata,
            len(rows),
            int(starts[-1]),
            np.arange(n, dtype=np.int32),
            starts[:n].astype(np.int64),
            np.arange(n, len(rows), dtype=np.int32),
            starts[n:-1].astype(np.int64),
            starts[n + 1 :].astype(np.int64),
        )
        tables, flat = self.twin.tables[rows].copy(), np.concatenate(slots)
        if bad:
            tables[:, 0] = 4000

        def send_metadata() -> None:
            self.tables[: len(rows)], self.seq_lens[: len(rows)] = tables, lengths
            self.slots[: len(flat)] = flat

        self.driver.enqueue(self.main, send_metadata)
        self._store(step, chunks, slots[n:], encode)
        if decodes:
            self._decode(step, decodes)
        self.driver.wait(self.main, self.driver.record(self.side))

    def _store(
        self,
        step: _C.StreamStep,
        chunks: Sequence[tuple[int, int, int]],
        slots: list[npt.NDArray[np.int64]],
        encode: bool,
    ) -> None:
        self.driver.wait(self.side, self.driver.record(self.main))
        self.driver.wait(self.side, self.driver.record(self.encoding))
        for (row, start, stop), slot in zip(chunks, slots, strict=True):
            key, value = (
                part[row][:, start:stop].clone() for part in (self.twin.keys, self.twin.values)
            )
            self.driver.enqueue(
                self.side, lambda slot=slot, key=key, value=value: self._write(slot, key, value)
            )
        self.layer.launch_stored(self.side, step)
        if encode:
            self.driver.wait(self.encoding, self.driver.record(self.side))
            self.layer.launch_encode(self.encoding, step)

    def _write(self, slots: npt.NDArray[np.int64], key: torch.Tensor, value: torch.Tensor) -> None:
        """As the device does: the pages know nothing of these rows yet."""
        both = torch.cat([key, value], dim=-1).contiguous().view(torch.uint8).numpy()
        size = both.shape[-1]
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, self.twin.block_size)
            self.memory[block, :, offset * size : (offset + 1) * size] = both[:, token]

    def _decode(self, step: _C.StreamStep, decodes: dict[int, int]) -> None:
        n, twin = len(decodes), self.twin
        query = 6 * torch.randn(
            n, twin.num_kv_heads * GROUP, twin.head_size, generator=self.generator
        )
        key, value = (
            row_bits(torch.stack([part[row][:, at] for row, at in decodes.items()]))
            for part in (twin.keys, twin.values)
        )
        wanted, found = torch.empty_like(query), np.full(query.shape, np.nan, np.float32)
        tables = np.ascontiguousarray(twin.tables[list(decodes)])
        lengths = np.array([at + 1 for at in decodes.values()], np.int32)
        self.direct.attend(query, _C.DecodeBatch(twin.pages, tables, lengths), wanted)

        def send() -> None:
            self.query[:n], self.key[:n], self.value[:n] = query.numpy(), key, value
            self.out[:] = np.nan

        def receive() -> None:
            found[:] = self.out[:n]

        self.driver.enqueue(self.main, send)
        self.layer.launch_decode(self.main, step)
        self.driver.enqueue(self.main, receive)
        self.decoded.append((found, wanted.numpy()))

    def check(self) -> None:
        self.driver.synchronize()
        self.callbacks.raise_error()
        assert self.decoded
        for found, wanted in self.decoded:
            np.testing.assert_array_equal(found, wanted)
        self.decoded.clear()


def paged(*lengths: int, dtype: torch.dtype = torch.bfloat16, block_size: int = 128) -> Paged:
    return Paged(dtype, 64, 2, 2, lengths, block_size)


@each_isa
@pytest.mark.parametrize(
    ("dtype", "block_size"), [(torch.float32, 128), (torch.bfloat16, 256), (torch.float16, 128)]
)
def test_results_are_those_of_a_decode_layer(
    driver: FakeDriver, isa: _C.Isa, dtype: torch.dtype, block_size: int
) -> None:
    """Of a prompt in chunks and a shorter one that comes while the first decodes."""
    streamed = Streamed(driver, paged(2400, 700, dtype=dtype, block_size=block_size), isa)
    streamed.step({}, [(0, 0, 1000)])
    streamed.step({}, [(0, 1000, 2170)])
    streamed.step({0: 2170}, [(1, 0, 640)])
    for i in range(1, 12):  # the first request completes its 17th block
        streamed.step({0: 2170 + i, 1: 639 + i})
    streamed.check()
    counters, direct = streamed.layer.counters, streamed.direct.counters
    assert counters.sampled_heads == direct.sampled_heads == 23 * 2 * GROUP
    assert counters.sampled_rows == direct.sampled_rows > 0
    np.testing.assert_array_equal(streamed.layer.recent_rows(), streamed.direct.recent_rows())


def test_chunks_are_encoded_before_anyone_decodes(driver: FakeDriver) -> None:
    streamed = Streamed(driver, paged(2000, 1500))
    streamed.step({}, [(0, 0, 900), (1, 0, 1290)])
    streamed.step({}, [(0, 900, 1300)])
    driver.synchronize()
    assert streamed.signatures.num_encoded == 10 + 10
    streamed.step({0: 1300, 1: 1290})
    streamed.check()
    assert streamed.signatures.num_encoded == 20


def test_a_decode_encodes_what_nobody_has(driver: FakeDriver) -> None:
    streamed = Streamed(driver, paged(2000))
    streamed.step({}, [(0, 0, 1300)], encode=False)
    driver.synchronize()
    assert streamed.signatures.num_encoded == 0
    for position in range(1300, 1300 + 128):
        streamed.step({0: position})
    streamed.check()
    assert streamed.signatures.num_encoded == 11, "ten of the chunk, one of decoded tokens"


def test_requests_that_are_attended_exactly_need_no_signatures(driver: FakeDriver) -> None:
    streamed = Streamed(driver, paged(2000, 700), exact_below=1000)
    streamed.step({}, [(0, 0, 1300), (1, 0, 600)])
    streamed.step({0: 1300, 1: 600})
    streamed.check()
    assert streamed.signatures.num_encoded == 10
    assert streamed.layer.counters.exact_heads == 2 * GROUP


def test_blocks_that_change_their_owner_are_encoded_anew(driver: FakeDriver) -> None:
    """While the first kernel still runs: the second request takes the blocks of the first, which is
    preempted and comes back in others."""
    twin = paged(1500, 1400, 1500)
    streamed = Streamed(driver, twin)
    gate = threading.Event()
    driver.enqueue(streamed.main, gate.wait)
    streamed.step({}, [(0, 0, 1350)])
    streamed.step({0: 1350})
    taken = twin.tables[0].copy()
    twin.tables[0] = twin.tables[2]
    twin.store(0, 0, 1500)
    twin.tables[1, : len(taken)] = taken
    twin.store(1, 0, 1400)
    streamed.step({}, [(1, 0, 1290)])
    streamed.step({1: 1290}, [(0, 0, 1351)])
    streamed.step({0: 1351, 1: 1291})
    assert not any(np.isfinite(found).any() for found, _ in streamed.decoded)
    gate.set()
    streamed.check()
    assert streamed.signatures.num_encoded == 3 * 10


def test_a_shared_prefix_is_encoded_once(driver: FakeDriver) -> None:
    twin = paged(1500, 1500)
    twin.tables[1, :8] = twin.tables[0, :8]
    for part in (twin.keys, twin.values):
        part[1][:, : 8 * 128] = part[0][:, : 8 * 128]
    twin.store(1, 0, 1500)
    streamed = Streamed(driver, twin)
    streamed.step({}, [(0, 0, 1300)])
    streamed.step({0: 1300}, [(1, 8 * 128, 1300)])
    streamed.step({0: 1301, 1: 1300})
    streamed.check()
    assert streamed.signatures.num_encoded == 10 + 2


def test_after_an_error_everything_is_encoded_anew(driver: FakeDriver) -> None:
    """Nobody knows what a failed step has written."""
    streamed = Streamed(driver, paged(1500, 1500))
    streamed.step({}, [(0, 0, 1300)])
    driver.synchronize()  # no layer waits for its encoding, which the error could overtake
    streamed.step({0: 1300}, [(1, 0, 500)], bad=True)
    driver.synchronize()
    assert np.isnan(streamed.decoded[0][0]).all()
    streamed.decoded.clear()
    with pytest.raises(RuntimeError, match=r"block_tables\[\d+, 0\] is 4000"):
        streamed.callbacks.raise_error()
    assert streamed.signatures.num_encoded == 10
    streamed.step({0: 1300}, [(1, 0, 1300)])
    streamed.step({0: 1301, 1: 1300})
    streamed.check()
    assert streamed.signatures.num_encoded == 10 + 20


def test_a_layer_without_signatures_has_nothing_to_encode(driver: FakeDriver) -> None:
    streamed = Streamed(driver, paged(300))
    rows = (streamed.query, streamed.key, streamed.value)
    exchange = _C.DecodeExchange(*rows, None, None, np.zeros_like(streamed.out))
    settings = {"scale": 1.0, "exact_below": 1, "isa": _C.Isa.portable, "pool": pool()}
    layer = _C.StreamLayer(
        streamed.pages, None, None, exchange, streamed.callbacks, None, **settings
    )
    empty = np.zeros(0, np.int64)
    none = empty.astype(np.int32)
    step = _C.StreamStep(streamed.metadata, 0, 0, none, empty, none, empty, empty)
    with pytest.raises(ValueError, match="no signatures to encode; make one with of_signatures"):
        layer.launch_encode(streamed.main, step)
    with pytest.raises(ValueError, match="no rule"):
        streamed.layer.set_center(np.zeros((2, 64), np.float32))


def test_bad_input_is_named(driver: FakeDriver) -> None:
    streamed = Streamed(driver, paged(300))
    signatures, rule = streamed.signatures, streamed.twin.rule(BUDGET)
    good = _C.DecodeExchange(
        streamed.query, streamed.key, streamed.value, None, None, np.zeros_like(streamed.out)
    )
    key, value = streamed.key[:, :1].copy(), streamed.value[:, :1].copy()
    one_head = _C.DecodeExchange(
        streamed.query, key, value, None, None, np.zeros_like(streamed.out)
    )
    settings = {"scale": 1.0, "exact_below": 1, "isa": _C.Isa.portable, "pool": pool()}
    for exchange, change, words in (
        (good, {"scale": float("nan")}, "scale is nan"),
        (good, {"exact_below": -1}, "exact_below is -1"),
        (one_head, {}, "exchange has 1 kv heads of size 64, but the pages have 2 of 64"),
    ):
        with pytest.raises(ValueError, match=words):
            _C.StreamLayer.of_signatures(
                signatures, rule, exchange, streamed.callbacks, **{**settings, **change}
            )
