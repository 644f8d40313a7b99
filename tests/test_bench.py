"""The benchmarks' own instruments agree with the project, and their quick runs leave what they promise.

Nothing here looks at a speed.
"""

from __future__ import annotations

import os

import bench_build
import numpy as np
import pytest
import torch
from bench_geometries import exact_attention, generate, relative_error
from bench_layer import (
    MIN_MATCHES,
    SINK_TOKENS,
    WINDOW_TOKENS,
    Config,
    Decoder,
    Placement,
    ReferenceLayer,
    SampledLayer,
)
from native_helpers import pool

from vllm_magicpig import _C, reference

native = bench_build.load()
CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def layer() -> SampledLayer:
    requests = [generate("mixed", 3000, num_kv_heads=3, seed=s) for s in range(2)]
    return SampledLayer(
        Config(6, 40),
        requests,
        Placement.shuffled(2, 3000),
        native,
        _C.resolve_isa("auto"),
        pool(),
    )


def queries(layer: SampledLayer) -> torch.Tensor:
    return torch.cat([r.queries(1, seed=9) for r in layer.requests]).bfloat16()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_reference_layout_finds_the_sample(layer: SampledLayer, num_threads: int) -> None:
    codes = Decoder(layer, _C.resolve_isa("auto"), pool()).hash_queries(queries(layer))
    cpus = [CPUS[i % len(CPUS)] for i in range(num_threads)]
    found = ReferenceLayer(layer, native).lookup(codes, cpus, positions=True)
    entries = 0
    for request in range(2):
        slots = layer.placement.slots(request, 0, 3000)
        keys = torch.from_numpy(layer.pages.load_codes(slots).astype(np.int32)).transpose(0, 1)
        own = torch.from_numpy(codes[request].astype(np.int32))
        mask = reference.sample(own, keys, MIN_MATCHES, SINK_TOKENS, WINDOW_TOKENS)
        middle = keys[:, SINK_TOKENS : 3000 - WINDOW_TOKENS]
        entries += int(reference.count_matches(own, middle).sum())
        for ids, row in zip(found.ids[request], mask, strict=True):
            np.testing.assert_array_equal(ids, row.nonzero().flatten().numpy())
    assert found.entries == entries
    assert found.busy_s > 0


def test_exact_decode_is_attention_over_the_rows(layer: SampledLayer) -> None:
    """Within the rounding of the bfloat16 output, 2**-9 of each value."""
    q = queries(layer)
    out = Decoder(layer, _C.resolve_isa("auto"), pool()).decode(q, exact=True).out
    for request, rows in enumerate(layer.requests):
        exact = exact_attention(q[request].float(), rows.keys, rows.values)
        assert relative_error(out[request], exact).max() < 2**-8


def test_bandwidths_are_positive_and_rows_are_checked() -> None:
    buffer = np.ones(1 << 22, np.uint8)
    assert len(native.sequential_read(buffer, CPUS[:1], 3)) == 3
    rows = np.random.default_rng(0).integers(8000, size=(3, 400))
    rates = native.gather_rows(buffer, rows, 512, 8, CPUS[:1])
    assert len(rates) == 2
    assert min(rates) > 0
    with pytest.raises(ValueError, match="row 8192 is not in the buffer"):
        native.gather_rows(buffer, np.full((1, 4), 8192), 512, 8, CPUS[:1])
