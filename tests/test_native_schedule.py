"""Random lives of requests: the sample is always that of the codes each request holds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import Layer, Rule, pool
from request_lives import Engine

from vllm_magicpig import _C

ACTIONS = st.sampled_from(
    ["new", "share", "append", "append", "free", "preempt", "resume", "seal", "seal", "clear"]
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**20), actions=st.lists(ACTIONS, min_size=5, max_size=40))
def test_the_sample_follows_the_codes_of_each_request(seed: int, actions: list[str]) -> None:
    engine = Engine(seed)
    for action in actions:
        engine.step(action)
        engine.check()
    engine.layer.index.clear()
    assert engine.layer.index.num_bytes == 0
    assert engine.layer.index.num_segments == 0


def test_a_reused_block_never_matches_an_old_segment() -> None:
    layer = Layer(2)
    codes = torch.zeros(1, 64, 8, dtype=torch.int32)
    rows = torch.zeros(1, 64, 16)
    tables, lens = np.array([[0, 1]], np.int32), np.array([64], np.int32)
    layer.store_rows([0, 1], 0, rows, rows)
    layer.store_codes([0, 1], 0, codes)
    assert layer.index.seal(tables, lens, pool()) == 1
    query_codes = torch.zeros(1, 1, 8, dtype=torch.int32)
    isa, rule = _C.resolve_isa("auto"), Rule(2, 0, 0)
    assert layer.sample(query_codes, tables, lens, rule, isa)[0][0].size == 64

    # The first block alone gets a new owner; the segment is found by the last one.
    layer.store_rows([0], 0, rows[:, :32], rows[:, :32])
    layer.store_codes([0], 0, codes[:, :32] + 1)
    assert len(layer.index.find(tables[0], 64)) == 0
    assert layer.index.num_segments == 1, "stale segments are freed by the next seal"
    assert layer.sample(query_codes, tables, lens, rule, isa)[0][0].tolist() == [*range(32, 64)]
    assert layer.index.seal(tables, np.array([63], np.int32), pool()) == 0
    assert (layer.index.num_segments, layer.index.num_bytes) == (0, 0)
    assert layer.index.seal(tables, lens, pool()) == 1
    assert layer.sample(query_codes, tables, lens, rule, isa)[0][0].tolist() == [*range(32, 64)]
    # Blocks in another order are another stretch.
    assert len(layer.index.find(np.array([1, 0], np.int32), 64)) == 0
