"""A builder that gives way to decode steps, and comes to an end all the same."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from native_helpers import Layer, Rule, decode_attention, native_codes

from vllm_magicpig import _C

NUM_TOKENS, NUM_TABLES, HEAD_SIZE = 4096, 16, 32


@pytest.mark.parametrize("halves", [False, True], ids=["missing", "merged"])
def test_steps_without_a_pause_do_not_stop_building(halves: bool) -> None:
    """Two threads decode, so that the pool is in use at every moment. A merge of halves waits longest;
    what nothing serves is built in small turns."""
    half = NUM_TOKENS // 2
    layer = Layer(2, 1, NUM_TABLES, 3, HEAD_SIZE, block_size=half, levels=[half, NUM_TOKENS])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 1, NUM_TOKENS, HEAD_SIZE, generator=generator)
    layer.store_rows([0, 1], 0, rows[0], rows[1])
    codes = torch.randint(0, 8, (1, NUM_TOKENS, NUM_TABLES), generator=generator)
    layer.store_codes([0, 1], 0, codes)
    batch = (np.array([[0, 1]], np.int32), np.array([NUM_TOKENS], np.int32))
    query = torch.randn(1, 2, HEAD_SIZE, generator=generator)
    query_codes = native_codes(codes[:, :2])
    steps = layer.pool(1)
    assert layer.index is not None
    if halves:
        each = (np.array([[0], [1]], np.int32), np.array([half, half], np.int32))
        assert layer.index.seal(*each, steps) == 2
    stop, outs = threading.Event(), []

    def decode() -> torch.Tensor:
        out = torch.empty(query.shape)
        decode_attention(
            layer.pages,
            layer.rule(Rule()),
            layer.index,
            query,
            query_codes,
            np.zeros((1, HEAD_SIZE), np.float32),
            *batch,
            out,
            None,
            scale=0.2,
            exact_below=0,
            isa=_C.resolve_isa("auto"),
            pool=steps,
        )
        return out

    def decode_on_and_on() -> None:
        while not stop.is_set():
            outs.append(decode())

    before = decode()
    threads = [threading.Thread(target=decode_on_and_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        builder = _C.SegmentBuilder([0], gives_way_to=steps)
        builder.ask(layer.index, *batch)
        builder.drain()
        builder.raise_error()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert layer.index.find(batch[0][0], NUM_TOKENS) == [(0, NUM_TOKENS)]
    assert all(torch.equal(out, before) for out in outs)
    assert torch.equal(decode(), before)
