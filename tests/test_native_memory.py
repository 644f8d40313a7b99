"""Memory that dropped segments leave for the next ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from native_helpers import Layer, Rule, assert_same_sample, expected_sample

from vllm_magicpig import _C

BLOCK, NUM_BLOCKS, NUM_TABLES, NUM_BITS = 1024, 8, 128, 9
NUM_TOKENS = NUM_BLOCKS * BLOCK
SOURCES = 16 * NUM_BLOCKS  # bytes of a segment that are not in its memory


def _layer(num_requests: int) -> Layer:
    """Of requests in one segment each, of some 9 MiB."""
    layer = Layer(
        num_requests * NUM_BLOCKS, 4, NUM_TABLES, NUM_BITS, block_size=BLOCK, levels=[NUM_TOKENS]
    )
    _write(layer, seed=0)
    return layer


def _write(layer: Layer, seed: int) -> torch.Tensor:
    """int64 [4, tokens, L], written to all blocks."""
    shape = (4, layer.num_blocks * BLOCK, NUM_TABLES)
    codes = torch.randint(0, 1 << NUM_BITS, shape, generator=torch.Generator().manual_seed(seed))
    layer.store_codes(np.arange(layer.num_blocks), 0, codes)
    return codes


def _seal(layer: Layer) -> int:
    """Bytes of the segments of all requests."""
    assert layer.index is not None
    tables = np.arange(layer.num_blocks, dtype=np.int32).reshape(-1, NUM_BLOCKS)
    lens = np.full(len(tables), NUM_TOKENS, np.int32)
    assert layer.index.seal(tables, lens, layer.pool()) == len(tables)
    return layer.index.num_bytes


def test_a_segment_takes_the_memory_of_a_dropped_one() -> None:
    layer = _layer(1)
    assert layer.index is not None
    size = _seal(layer) - SOURCES
    layer.index.clear()
    idle = _C.idle_segment_bytes()
    assert idle >= size
    codes = _write(layer, seed=1)  # the memory still holds the order of others
    _seal(layer)
    assert _C.idle_segment_bytes() == idle - size
    query_codes = codes[:, NUM_TOKENS // 2]
    isa = _C.resolve_isa("auto")
    found = layer.sample(query_codes[None], [np.arange(NUM_BLOCKS)], [NUM_TOKENS], Rule(), isa)
    assert_same_sample(found[0], expected_sample(query_codes, codes, Rule()))


def keep_as_much_as_there_may_be() -> None:
    """Six segments are dropped, the memory of four is kept."""
    layer = _layer(6)
    assert layer.index is not None
    size = _seal(layer) // 6 - SOURCES
    assert _C.idle_segment_bytes() == 0
    layer.index.clear()
    assert _C.idle_segment_bytes() == 4 * size
    _seal(layer)
    assert _C.idle_segment_bytes() == 0


def test_what_is_kept_is_bounded() -> None:
    """In a process that has had no larger segments."""
    call = f"import {Path(__file__).stem} as test; test.keep_as_much_as_there_may_be()"
    subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent, check=True)
