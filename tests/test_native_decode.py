"""Decode attention against the fp64 reference on the same sample.

Rows are compared as stored: bfloat16 and float16 values are exact numbers, only the arithmetic is
fp32. The bound of 1e-5 is for values and logits of size 1 to 10: fp32 sums of at most 256 products
round by a few 1e-7 of their size, and log u by 1e-6 at these cosines (cpu_kernels/inclusion_table.cpp).
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
import torch
from native_helpers import Layer, Rule, decode_attention, each_isa, native_codes

from vllm_magicpig import _C, reference

BOUND = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Batch:
    """Requests over a layer: keys around a centre that is large against their spread."""

    def __init__(self, layer: Layer, group: int, lengths: list[int], seed: int = 0) -> None:
        self.layer, self.lengths = layer, lengths
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        heads, size, bits = layer.num_kv_heads, layer.head_size, layer.num_bits
        self.center = 3 * randn(heads, size)
        self.query = randn(len(lengths), heads * group, size)
        self.directions = reference.hyperplanes(size, layer.num_tables, bits, seed)
        self.query_codes = reference.hash_codes(self.query, self.directions, bits)
        order = torch.randperm(layer.num_blocks, generator=generator).tolist()
        width = max(-(-n // layer.block_size) for n in lengths)
        self.tables = np.full((len(lengths), max(width, 1)), -1, np.int32)
        # hash_codes cannot tell the shape of no vectors.
        self.no_codes = torch.zeros(heads, 0, layer.num_tables, dtype=torch.int32)
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.codes: list[torch.Tensor] = []
        for row, n in enumerate(lengths):
            used = [order.pop() for _ in range(-(-n // layer.block_size))]
            self.tables[row, : len(used)] = used
            key = (randn(heads, n, size) + self.center[:, None]).to(layer.dtype)
            value = randn(heads, n, size).to(layer.dtype)
            centred = key.float() - self.center[:, None]
            codes = reference.hash_codes(centred, self.directions, bits) if n else self.no_codes
            layer.store_rows(used, 0, key, value)
            layer.store_codes(used, 0, codes)
            self.rows.append((key, value))
            self.codes.append(codes)

    @property
    def scale(self) -> float:
        return self.layer.head_size**-0.5

    def seal(self) -> None:
        self.layer.index.seal(self.tables, np.array(self.lengths, np.int32), self.layer.pool())

    def decode(
        self,
        isa: _C.Isa,
        rule: Rule | None,
        exact_below: int = 0,
        num_threads: int = 2,
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """(out, lse, rows); rule None is the exact mode."""
        layer = self.layer
        out = np.full(self.query.shape, np.nan, np.float32)
        lse = np.full(self.query.shape[:2], np.nan, np.float32)
        sampled = rule is not None
        rows, counters = decode_attention(
            layer.pages,
            layer.rule(rule) if rule else None,
            layer.index if sampled else None,
            self.query.numpy(),
            native_codes(self.query_codes) if sampled else None,
            self.center.numpy() if sampled else None,
            self.tables,
            np.array(self.lengths, np.int32),
            out,
            lse,
            scale=self.scale,
            exact_below=exact_below,
            isa=isa,
            pool=layer.pool(num_threads),
            native=layer.native,
        )
        assert counters.hash_ns == 0  # codes are given
        assert counters.attend_ns > 0 or sum(self.lengths) == 0
        assert counters.step_ns > max(counters.lookup_ns, counters.attend_ns) / num_threads
        return torch.from_numpy(out), torch.from_numpy(lse), rows

    @functools.cache  # noqa: B019 - a batch lives as long as its test
    def expected(
        self, row: int, rule: Rule | None
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        key, value = self.rows[row]
        if rule is None:
            out, lse = reference.exact_attention(self.query[row], key, value, self.scale)
            return out, lse, np.full(len(lse), -1)
        layer = self.layer
        sampled = reference.sample(
            self.query_codes[row],
            self.codes[row],
            rule.min_matches,
            rule.sink_tokens,
            rule.window_tokens,
        )
        out, lse = reference.sampled_attention(
            self.query[row],
            key,
            value,
            self.scale,
            sampled,
            self.center,
            layer.num_bits,
            layer.num_tables,
            [(rule.min_matches, 1.0)] * len(sampled),
            rule.sink_tokens,
            rule.window_tokens,
        )
        return out, lse, sampled.sum(-1).numpy()

    def check(self, isa: _C.Isa, rule: Rule | None, exact_below: int = 0) -> None:
        out, lse, rows = self.decode(isa, rule, exact_below)
        for row, n in enumerate(self.lengths):
            own_rule = rule
            if rule is not None and exact_below > len(
                reference.middle(n, rule.sink_tokens, rule.window_tokens)
            ):
                own_rule = None
            expected_out, expected_lse, expected_rows = self.expected(row, own_rule)
            np.testing.assert_array_equal(rows[row], expected_rows)
            np.testing.assert_allclose(lse[row], expected_lse, rtol=0, atol=BOUND)
            np.testing.assert_allclose(out[row], expected_out, rtol=0, atol=BOUND)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 24, 64, 80, 96, 128, 256])
def test_head_sizes_and_dtypes(isa: _C.Isa, dtype: torch.dtype, head_size: int) -> None:
    layer = Layer(60, 2, num_tables=20, num_bits=4, head_size=head_size, dtype=dtype)
    batch = Batch(layer, group=3, lengths=[1, 223, 1000], seed=head_size)
    batch.check(isa, None)
    batch.check(isa, Rule())
    batch.seal()
    batch.check(isa, Rule())


@each_isa
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 13, 64])
def test_groups(isa: _C.Isa, group: int) -> None:
    layer = Layer(24, 2, num_tables=9, num_bits=3)
    batch = Batch(layer, group, lengths=[300, 129], seed=group)
    batch.seal()
    batch.check(isa, None)
    batch.check(isa, Rule())


@each_isa
def test_a_batch_of_mixed_lengths(isa: _C.Isa) -> None:
    """Long enough for several parts, of sampled rows as well as of exact ones."""
    lengths = [6000, 1, 0, 15, 2047, 17, 2048, 127, 2049, 128, 4500, 129, 223, 31]
    layer = Layer(800, 2, num_tables=30, num_bits=5, levels=[256])
    batch = Batch(layer, group=2, lengths=lengths)
    for rule in (Rule(), Rule(1, 0, 0), Rule(3, 1100, 1200), Rule(2, 10_000, 0)):
        batch.check(isa, rule)
    batch.check(isa, Rule(), exact_below=2028)
    batch.check(isa, None)
    batch.seal()
    batch.check(isa, Rule())


@each_isa
def test_segments_and_threads_leave_every_bit(isa: _C.Isa) -> None:
    layer = Layer(500, 2, num_tables=30, num_bits=5, levels=[96])
    batch = Batch(layer, group=4, lengths=[9000, 4097, 60])
    first = batch.decode(isa, Rule(), num_threads=1)
    exact = batch.decode(isa, None, num_threads=1)
    for num_threads in (1, 2, 3, 2, 3):
        for one, again in zip(first, batch.decode(isa, Rule(), 0, num_threads), strict=True):
            np.testing.assert_array_equal(one, again)
        for one, again in zip(exact, batch.decode(isa, None, 0, num_threads), strict=True):
            np.testing.assert_array_equal(one, again)
        batch.seal()


def test_two_python_threads_take_turns() -> None:
    isa = _C.resolve_isa("auto")
    batch = Batch(Layer(200, 2, num_tables=30, num_bits=5), group=4, lengths=[6000])
    first = batch.decode(isa, Rule())
    differing = []

    def decode_again() -> None:
        for _ in range(20):
            if not all(map(np.array_equal, first, batch.decode(isa, Rule()))):
                differing.append(threading.get_ident())

    threads = [threading.Thread(target=decode_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    batch.seal()
    for thread in threads:
        thread.join()
    assert not differing


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree(isa: _C.Isa, dtype: torch.dtype) -> None:
    layer = Layer(200, 2, num_tables=30, num_bits=5, head_size=80, dtype=dtype)
    batch = Batch(layer, group=4, lengths=[6000])
    for rule in (None, Rule()):
        out, lse, rows = batch.decode(_C.Isa.portable, rule)
        other_out, other_lse, other_rows = batch.decode(isa, rule)
        np.testing.assert_array_equal(rows, other_rows)
        np.testing.assert_allclose(out, other_out, rtol=0, atol=2e-5)
        np.testing.assert_allclose(lse, other_lse, rtol=0, atol=2e-5)


@each_isa
def test_nothing_sampled_and_nothing_static_is_empty(isa: _C.Isa) -> None:
    batch = Batch(Layer(4), group=2, lengths=[100, 0])
    batch.query_codes = 7 - batch.codes[0][0, 0].expand(2, 2, 8)
    batch.layer.store_codes(batch.tables[0, :4], 0, batch.codes[0][:, :1].expand(1, 100, 8))
    out, lse, rows = batch.decode(isa, Rule(1, 0, 0))
    assert rows.tolist() == [[0, 0], [0, 0]]
    assert out.abs().max() == 0
    assert torch.isneginf(lse).all()


@each_isa
def test_zero_vectors_have_cosine_zero(isa: _C.Isa) -> None:
    batch = Batch(Layer(4), group=2, lengths=[100])
    key, value = batch.rows[0]
    key[:, ::2] = batch.center[:, None]
    batch.query[:, 1] = 0
    batch.layer.store_rows(batch.tables[0], 0, key, value)
    batch.codes[0] = torch.zeros_like(batch.codes[0])
    batch.query_codes = torch.zeros_like(batch.query_codes)
    batch.layer.store_codes(batch.tables[0], 0, batch.codes[0])
    batch.check(isa, Rule())


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_neither_crashes_nor_hides(
    isa: _C.Isa, dtype: torch.dtype, bad: float
) -> None:
    batch = Batch(Layer(8, dtype=dtype), group=2, lengths=[100, 100])
    key, value = batch.rows[0]
    key[:, 40:60] = bad
    value[:, 40:60] = bad
    batch.layer.store_rows(batch.tables[0], 0, key, value)
    for rule in (Rule(), None):
        out, lse, _ = batch.decode(isa, rule)
        if rule is None:
            assert not out[0].isfinite().all()
        expected = batch.expected(1, rule)
        np.testing.assert_allclose(out[1], expected[0], rtol=0, atol=BOUND)
        np.testing.assert_allclose(lse[1], expected[1], rtol=0, atol=BOUND)
