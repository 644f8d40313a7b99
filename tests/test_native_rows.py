"""Queries and outputs of decode attention in any dtype, tensors or arrays, and hashed in the call."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from native_helpers import Layer, Rule, decode_attention, each_isa, pool, row_bits

from vllm_magicpig import _C, reference

NUM_TOKENS, NUM_KV_HEADS, NUM_Q_HEADS, HEAD_SIZE = 160, 2, 6, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Batch:
    """Two requests that share pages of one dtype; the hash is that of their keys."""

    def __init__(self, dtype: torch.dtype, num_bits: int = 3, num_tables: int = 16) -> None:
        self.dtype = dtype
        self.layer = Layer(5, NUM_KV_HEADS, num_tables, num_bits, HEAD_SIZE, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_KV_HEADS, NUM_TOKENS, HEAD_SIZE)
        key = torch.randn(shape, generator=generator).to(dtype)
        # Values from subnormal to beyond the largest half: what outputs are rounded from.
        size = 10.0 ** torch.empty(shape).uniform_(-9, 4, generator=generator)
        value = (torch.randn(shape, generator=generator) * size).to(dtype)
        self.query = torch.randn(2, NUM_Q_HEADS, HEAD_SIZE, generator=generator).to(dtype)
        self.layer.store_rows(range(5), 0, key, value)
        hyperplanes = (HEAD_SIZE, num_tables, num_bits, 7)
        signs = reference.hadamard_signs(*hyperplanes)
        self.hash = _C.SimHash(signs.numpy(), HEAD_SIZE, num_bits, num_tables)
        slots = self.layer.slots(range(5), 0, NUM_TOKENS)
        keys = key.transpose(0, 1).float().contiguous().numpy()
        codes = self.hash.hash(keys, None, _C.Isa.portable, pool())
        self.layer.pages.store_codes(codes, slots, pool())

    def decode(self, query: Any, out: Any, isa: _C.Isa, **changes: Any) -> np.ndarray:
        arguments: dict[str, Any] = {
            "pages": self.layer.pages,
            "rule": self.layer.rule(Rule()),
            "index": None,
            "query": query,
            "query_codes": self.hash,
            "center": np.zeros((NUM_KV_HEADS, HEAD_SIZE), np.float32),
            "block_tables": np.array([range(5), range(5)], np.int32),
            "seq_lens": np.array([NUM_TOKENS, 97], np.int32),
            "out": out,
            "lse": None,
            "scale": 0.3,
            "exact_below": 0,
            "isa": isa,
            "pool": pool(),
        }
        rows, _ = decode_attention(**{**arguments, **changes})
        return rows

    def expected(self, isa: _C.Isa) -> torch.Tensor:
        """Output in float32 of the queries in float32, as arrays, with codes given."""
        query = self.query.float()
        out = torch.empty(self.query.shape)
        codes = self.hash.hash(query.numpy(), None, _C.Isa.portable, pool())
        self.decode(query.numpy(), out.numpy(), isa, query_codes=codes)
        return out


@each_isa
@each_dtype
@pytest.mark.parametrize("setting", [(3, 16), (2, 32)], ids=str)
def test_any_dtype_as_tensor_or_bits_and_hashed_in_the_call(
    isa: _C.Isa, dtype: torch.dtype, setting: tuple[int, int]
) -> None:
    batch = Batch(dtype, *setting)
    expected = batch.expected(isa)
    assert expected.isfinite().all()
    out = torch.full_like(batch.query, 3)
    rows = batch.decode(batch.query, out, isa)
    assert (rows > 0).any()
    assert torch.equal(out, expected.to(dtype))
    bits = torch.full_like(batch.query, 3)
    batch.decode(row_bits(batch.query), row_bits(bits), isa)
    assert torch.equal(bits, out)
    mixed = torch.empty(batch.query.shape)
    batch.decode(batch.query, mixed, isa)
    assert torch.equal(mixed, expected)


@each_dtype
def test_queries_in_any_strides(dtype: torch.dtype) -> None:
    batch = Batch(dtype)
    isa = _C.resolve_isa("auto")
    # As vLLM has them: a part of the projection's output, [num_tokens, (q + k + v) sizes].
    width = (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE
    projected = torch.zeros(2, width, dtype=dtype)
    query = projected[:, : NUM_Q_HEADS * HEAD_SIZE].view(2, NUM_Q_HEADS, HEAD_SIZE)
    query.copy_(batch.query)
    out = torch.empty(query.shape, dtype=dtype)
    batch.decode(query, out, isa)
    assert torch.equal(out, batch.expected(isa).to(dtype))


@each_isa
def test_queries_and_outputs_are_rows_of_a_steps_tensors(isa: _C.Isa) -> None:
    """Tokens of other requests lie between, before and behind; outputs have gaps, too."""
    batch = Batch(torch.bfloat16)
    tokens = np.array([1, 4])
    query = torch.full((7, NUM_Q_HEADS, HEAD_SIZE), 9, dtype=torch.bfloat16)
    query[tokens] = batch.query
    wide = torch.full((7, (NUM_Q_HEADS + 1) * HEAD_SIZE), 3, dtype=torch.bfloat16)
    out = wide[:, : NUM_Q_HEADS * HEAD_SIZE].view(7, NUM_Q_HEADS, HEAD_SIZE)
    lse, expected_lse = np.zeros((2, 2, NUM_Q_HEADS), np.float32)
    rows = batch.decode(query, out, isa, tokens=tokens, lse=lse)
    expected = torch.empty_like(batch.query)
    np.testing.assert_array_equal(rows, batch.decode(batch.query, expected, isa, lse=expected_lse))
    np.testing.assert_array_equal(lse, expected_lse)
    assert torch.equal(out[tokens], expected)
    wide[tokens, : NUM_Q_HEADS * HEAD_SIZE] = 3
    assert (wide == 3).all()


def test_a_batch_is_a_copy_and_serves_many_calls() -> None:
    batch, isa = Batch(torch.float32), _C.resolve_isa("auto")
    tables = np.array([range(5), range(5)], np.int32)
    lens, tokens = np.array([NUM_TOKENS, 97], np.int32), np.arange(2)
    native = _C.DecodeBatch(batch.layer.pages, tables, lens, tokens)
    for array in (tables, lens, tokens):
        array[...] = 1 << 20
    layer = _C.DecodeLayer(
        batch.layer.pages,
        batch.layer.rule(Rule()),
        None,
        batch.hash,
        scale=0.3,
        exact_below=0,
        isa=isa,
        pool=pool(),
    )
    center = np.zeros((NUM_KV_HEADS, HEAD_SIZE), np.float32)
    layer.set_center(center)
    center[...] = np.nan
    for calls in range(1, 3):
        out = torch.empty_like(batch.query)
        layer.attend(batch.query, native, out)
        assert torch.equal(out, batch.expected(isa))
        assert layer.counters.decode_steps == calls
    layer.forget_steps()
    assert layer.counters.decode_steps == 0
    assert layer.recent_rows().size == 0


@pytest.mark.parametrize("num_threads", [2, 5])
def test_on_openmps_threads(num_threads: int) -> None:
    """Torch's, whether they are awake or not."""
    batch, isa = Batch(torch.float32), _C.resolve_isa("auto")
    threads = _C.ThreadPool.of_openmp(num_threads)
    expected = batch.expected(isa)
    for step in range(20):
        if step % 5 == 0:
            time.sleep(0.02)
        out = torch.empty_like(batch.query)
        batch.decode(batch.query, out, isa, pool=threads)
        assert torch.equal(out, expected)


def test_the_record_counts_sampled_and_exact_heads_apart() -> None:
    batch = Batch(torch.float32)
    out = torch.empty_like(batch.query)
    rows, counters = decode_attention(
        batch.layer.pages,
        batch.layer.rule(Rule()),
        None,
        batch.query,
        batch.hash,
        np.zeros((NUM_KV_HEADS, HEAD_SIZE), np.float32),
        np.array([range(5), range(5)], np.int32),
        np.array([NUM_TOKENS, 97], np.int32),
        out,
        scale=0.3,
        exact_below=100,
        isa=_C.resolve_isa("auto"),
        pool=pool(),
    )
    assert (rows[1] == -1).all()
    assert counters.exact_heads == counters.sampled_heads == NUM_Q_HEADS
    assert counters.sampled_rows == rows[0].sum() > 0
    assert counters.middle_rows == NUM_Q_HEADS * (NUM_TOKENS - 4 - 16)
    assert counters.decode_steps == 1
    assert counters.hash_ns > 0


def test_the_last_heads_are_remembered() -> None:
    """16,384 of them; a request of other length shows which."""
    num_reqs, num_q_heads = 128, 64
    layer = Layer(2, 1, 16, 3, HEAD_SIZE)
    native = _C.DecodeLayer(
        *(layer.pages, layer.rule(Rule(1, 0, 0)), None, None),
        scale=0.3,
        exact_below=0,
        isa=_C.resolve_isa("auto"),
        pool=pool(),
    )
    native.set_center(np.zeros((1, HEAD_SIZE), np.float32))
    layer.memory[...] = 0
    query = np.zeros((num_reqs, num_q_heads, HEAD_SIZE), np.float32)
    codes = np.zeros((num_reqs, num_q_heads, 16), np.uint16)
    tables = np.zeros((num_reqs, 1), np.int32)
    for num_tokens in (5, 17, 17):
        lens = np.full(num_reqs, num_tokens, np.int32)
        batch = _C.DecodeBatch(layer.pages, tables, lens)
        native.attend(query, batch, np.empty_like(query), query_codes=codes)
    assert native.recent_rows().tolist() == [17] * 16384
    assert native.counters.sampled_rows == num_reqs * num_q_heads * 39


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Means of two neighbours, each of which is a tie, and of numbers far apart."""
    numbers = torch.arange(1 << 16).to(torch.uint16).view(dtype)  # every one that there is
    later = numbers.roll(-1)
    far = numbers[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]
    first, second = numbers.repeat(2), torch.cat([later, far])
    head_size, num_reqs = 256, first.numel() // 256
    layer = Layer(num_reqs, 1, 16, 3, head_size, block_size=32, dtype=dtype)
    value = torch.stack([first, second]).view(2, num_reqs, head_size)
    for token in range(2):
        slots = np.arange(num_reqs) * 32 + token
        rows = row_bits(value[token][:, None])
        layer.pages.store_rows(np.zeros_like(rows), rows, slots, pool())

    def decode(out: torch.Tensor) -> torch.Tensor:
        decode_attention(
            layer.pages,
            None,
            None,
            torch.zeros(out.shape, dtype=dtype),
            None,
            None,
            np.arange(num_reqs, dtype=np.int32)[:, None],
            np.full(num_reqs, 2, np.int32),
            out,
            None,
            scale=1.0,
            exact_below=0,
            isa=_C.resolve_isa("auto"),
            pool=pool(),
        )
        return out

    shape = (num_reqs, 1, head_size)
    exact, rounded = decode(torch.empty(shape)), decode(torch.empty(shape, dtype=dtype))
    total = value[0].float() + value[1].float()
    finite = total.isfinite()
    assert torch.equal(exact[:, 0][finite], total[finite] / 2)
    expected = exact.to(dtype)
    nan = expected.isnan()
    assert torch.equal(rounded.isnan(), nan)
    assert torch.equal(rounded[~nan].view(torch.int16), expected[~nan].view(torch.int16))
