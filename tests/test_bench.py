"""The benchmarks' own instruments agree with the project, and their quick runs leave what they promise.

Nothing here looks at a speed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_build
import bench_decode_attention
import bench_index
import numpy as np
import pytest
import torch
from bench_geometries import exact_attention, generate, relative_error
from bench_layer import (
    BUCKETS,
    MIN_MATCHES,
    SINK_TOKENS,
    WINDOW_TOKENS,
    Config,
    Decoder,
    DenseLayer,
    Placement,
    ReferenceLayer,
    SampledLayer,
)
from bench_report import Timing, interleave
from bench_stream import GrowingRequest
from native_helpers import pool

from vllm_magicpig import _C, reference

CPUS = sorted(os.sched_getaffinity(0))
needs_cpu_build = pytest.mark.skipif(
    torch.version.cuda is not None, reason="compares with CPU_ATTN, which needs vLLM's CPU build"
)


@pytest.fixture
def own_cpus() -> Iterator[None]:
    """The benchmarks move the process to the CPUs they time, and torch's threads with it."""
    allowed, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), allowed)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def native() -> ModuleType:
    """Compiled by the first test that needs it, never while tests are collected."""
    return bench_build.load()


@pytest.fixture(scope="module")
def layer(native: ModuleType) -> SampledLayer:
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
def test_the_reference_layout_finds_the_sample(
    layer: SampledLayer, native: ModuleType, num_threads: int
) -> None:
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
    out = Decoder(layer, _C.resolve_isa("auto"), pool()).decode(q, exact=True)
    for request, rows in enumerate(layer.requests):
        exact = exact_attention(q[request].float(), rows.keys, rows.values)
        assert relative_error(out[request], exact).max() < 2**-8


def test_bandwidths_are_positive_and_rows_are_checked(native: ModuleType) -> None:
    buffer = np.ones(1 << 22, np.uint8)
    assert len(native.sequential_read(buffer, CPUS[:1], 3)) == 3
    rows = np.random.default_rng(0).integers(8000, size=(3, 400))
    rates = native.gather_rows(buffer, rows, 512, 8, 2, CPUS[:1])
    assert len(rates) == 2
    assert min(rates) > 0
    with pytest.raises(ValueError, match="row 8192 is not in the buffer"):
        native.gather_rows(buffer, np.full((1, 4), 8192), 512, 8, 2, CPUS[:1])


def test_a_growing_request_decodes_as_a_stored_one(native: ModuleType) -> None:
    """Token by token through the stream's callbacks, as the layer that holds everything from the start:
    the same sample, whatever has been built by then."""
    isa = _C.resolve_isa("auto")
    rows = generate("mixed", 2200, num_kv_heads=2)
    config, placement = Config(6, 40), Placement.shuffled(1, 2200)
    whole = SampledLayer(config, [rows], placement, native, isa, pool())
    part = SampledLayer(config, [rows], placement, native, isa, pool(), num_stored=2190)
    builder = _C.SegmentBuilder(CPUS)
    growing = GrowingRequest(part, native, isa, pool(), builder, num_q_heads=8)
    growing.note_stored(2190)
    steps = rows.queries(10, seed=1).bfloat16()
    keys, values = (part.transpose(0, 1).bfloat16() for part in (rows.keys, rows.values))
    for number, query in enumerate(steps):
        growing.decode(query, keys[2190 + number], values[2190 + number])
    builder.drain()
    decoder = Decoder(whole, isa, pool())
    out = decoder.decode(steps[-1][None])
    counted = decoder.counted()
    assert counted is not None
    assert growing.num_tokens == 2200
    assert growing.sampled_rows >= counted.rows > 0
    # The output as float32 here, as bfloat16 there.
    assert relative_error(torch.from_numpy(growing.out), out).max() < 2**-8


def test_sides_take_turns_and_the_first_call_is_not_timed() -> None:
    calls: list[tuple[str, int]] = []
    sides = {name: lambda repeat, name=name: calls.append((name, repeat)) for name in "ab"}
    seconds = interleave(sides, 3, lambda: None)
    assert calls == [
        (name, repeat)
        for repeat, names in enumerate(["ab", "ab", "ba", "ab"], -1)
        for name in names
    ]
    assert [len(times) for times in seconds.values()] == [3, 3]
    timing = Timing.of([0.004, 0.001, 0.002, 0.003, 0.005])
    assert timing == Timing(median_ms=3.0, p25_ms=2.0, samples=5)


@needs_cpu_build
def test_nothing_is_timed_where_results_differ(native: ModuleType) -> None:
    isa = _C.resolve_isa("auto")
    rows, others = ([generate("mixed", 700, seed=seed)] for seed in (0, 1))
    placement = Placement.shuffled(1, 700)
    decoder = Decoder(SampledLayer(BUCKETS[2], rows, placement, native, isa, pool()), isa, pool())
    query = rows[0].queries(1, seed=1).bfloat16()
    for held, agrees in ((rows, True), (others, False)):
        dense = DenseLayer(held, placement, native)
        dense.start_step(query.shape[1])
        if agrees:
            assert bench_decode_attention.check_agreement(decoder, dense, query) >= 0
        else:
            with pytest.raises(SystemExit, match="nothing was timed"):
                bench_decode_attention.check_agreement(decoder, dense, query)


def test_cases_that_do_not_fit_are_named() -> None:
    skipped: list[str] = []
    kept = bench_decode_attention.cases([2048, 1 << 40], [1, 4], max_tokens=4096, skipped=skipped)
    assert kept == [bench_decode_attention.Case(2048, 1)]
    assert len(skipped) == 3
    assert skipped[0] == "2K x 4: more than 4096 tokens"
    bench_decode_attention.cases([1 << 40], [1], max_tokens=1 << 50, skipped=skipped)
    assert "GiB are free" in skipped[-1]


def _written(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert content["hardware"]["cores"] == len(CPUS)
    assert content["command"].startswith(f"python examples/{name}.py --quick")
    assert content["threads"]
    assert content["date"].startswith("20")
    assert str(Path.home()) not in json.dumps(content["hardware"])
    return content


@needs_cpu_build
@pytest.mark.usefixtures("own_cpus")
def test_decode_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--lengths", "2048", "--repeats", "2", "--cpu-time"]
    assert bench_decode_attention.main([*arguments, "--output", str(tmp_path)]) == 0
    content = _written(tmp_path, "bench_decode_attention")
    result = content["results"][0]
    assert result["case"] == {"num_tokens": 2048, "batch": 1}
    assert 0.01 < result["sampled_fraction"] < 0.04
    assert 0 <= result["agreement"] < bench_decode_attention.AGREEMENT
    for name in ("ours", "dense", "exact"):
        assert 0 < result[name]["p25_ms"] <= result[name]["median_ms"]
    assert 0 < result["distinct_rows"] <= result["row_reads"]
    assert result["dense_over_ours"] > 0
    (bandwidth,) = content["bandwidth_gb_per_s"]
    assert min(bandwidth[key] for key in ("sequential", "sorted_gather", "random_gather")) > 0
    assert {timing["isa"] for timing in content["isas"]} >= {"portable"}
    assert "CPU_ATTN/ours" in capsys.readouterr().out


@pytest.mark.usefixtures("own_cpus")
def test_index_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_index.main(["--quick", "--threads", "1", "--output", str(tmp_path)]) == 0
    content = _written(tmp_path, "bench_index")
    assert content["threads"] == [1]
    assert [build["level"] for build in content["build"]] == [1024, 2048, 4096, 8192]
    assert all(build["us"] > 0 and build["index_bytes"] > 300 for build in content["build"])
    assert [encoding["bits"] for encoding in content["encode"]] == [1, 2, 4]
    assert all(encoding["ns"] > 0 for encoding in content["encode"])
    idle, merges, missing = content["background"]["steps"]
    assert idle["segments"] == 0 < merges["segments"] + missing["segments"]
    native_sample = content["tradeoff"][0]
    assert native_sample["config"] == "buckets (10,150)"
    assert 0 < native_sample["error_median"] < 0.5
    generation = content["generation"]
    assert generation["tokens"] == 1024
    assert generation["rows_growth"] > 1
    assert "time per token grew" in capsys.readouterr().out
