"""The parts of gpu-check that measure the 8B shape, and the cost model's view of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_check_speed as speed
import pytest
from compare_figures import EngineFacts, Request, Run, Step
from compare_setup import SHAPES
from cost_model import read_report
from gpu_check_figures import HostStep, Measured, Side
from gpu_check_helpers import context
from gpu_check_jobs import read_job
from gpu_check_model import fit_report, model_rows
from gpu_check_report import MEASURED, NOT_RUN
from gpu_check_scale import GIB, GPU
from gpu_check_speed_rows import (
    capacity_at,
    else_row,
    row_bytes,
    single_rows,
    throughput_rows,
    ttft_rows,
)

from vllm_magicpig import capacity
from vllm_magicpig.config import MagicPigOptions, parse_options

LLAMA = SHAPES["llama-3.1-8b"]


# -------------------------------------------------------------------------------------------- speed


def stats(steps: int, **others: float) -> dict[str, Any]:
    """A worker's, of 30 sampled layers and 15 threads."""
    zero = dict.fromkeys(("hash", "lookup", "attend", "decode"), 0.0)
    given = {"threads": 15, "sampled_layers": 30, "decode_steps": steps}
    given |= {f"{name}_us_per_step": others.get(name, 0.0) for name in zero}
    return given | {name: others.get(name, 0) for name in ("sampled_rows", "middle_rows")}


def test_host_times_are_those_of_the_steps_between() -> None:
    before = stats(10, lookup=100.0, attend=1000.0, decode=900.0, sampled_rows=5, middle_rows=100)
    after = stats(20, lookup=200.0, attend=2500.0, decode=600.0, sampled_rows=25, middle_rows=1100)
    host = HostStep.between(before, after)
    assert host == HostStep(
        layers=30,
        threads=15,
        steps=10,
        hash_us=0.0,
        lookup_us=pytest.approx(300.0 / 15),
        attend_us=pytest.approx(4000.0 / 15),
        callback_us=pytest.approx(300.0),
        sampled_rows=2.0,
        sampled_fraction=0.02,
    )
    with pytest.raises(ValueError, match="no decode step"):
        HostStep.between(before, before)


def host_step(**changes: float) -> HostStep:
    whole = HostStep(30, 15, 31, 0.0, 3000.0, 10_000.0, 15_000.0, 2_000_000.0, 0.02)
    return replace(whole, **changes)


def measured_case(
    length: int, requests: int, tpot_s: float, ttft_s: float, host: HostStep | None
) -> Measured:
    """Every request gets its tokens at the same moments."""
    times = [ttft_s + i * tpot_s for i in range(5)]
    steps = [Step(ttft_s, requests, requests, requests * length, 0, 0, requests)]
    steps += [Step(at, requests, 0, 0, requests, requests, requests) for at in times[1:]]
    run = Run([Request(times, 0)] * requests, steps)
    event = {"length": length, "num_requests": requests, "run": asdict(run), "after": None}
    return replace(Measured.from_event(json.loads(json.dumps(event))), host=host)


def side(*cases: Measured, segment_tokens: int | None = 2048, kv_gib: float = 22.0) -> Side:
    kv_bytes = int(kv_gib * GIB)
    facts = EngineFacts(1, kv_bytes // 131072, kv_bytes // 131072 // 128, 128, 1.0, kv_bytes, 9.0)
    return Side(facts, segment_tokens, {one.case: one for one in cases})


FACTS: dict[str, Any] = {
    "device": "NVIDIA H200",
    "gpu_memory_gib": 139.8,
    "memory_gib": 128.0,
    "host": {
        "threads": 16,
        "sequential_gbs": 250.0,
        "row_gather_gbs": 160.0,
        "line_gather_gbs": 60.0,
    },
    "device_bandwidth": {
        "hbm_gbs": 4096.0,
        "h2d_gbs": 50.0,
        "d2h_gbs": 45.0,
        "copy_us": 2.0,
        "callback_us": 8.0,
    },
}
OPTIONS = MagicPigOptions(index="buckets", K=10, L=170)


def test_a_case_is_read_from_what_the_engine_reported() -> None:
    one = measured_case(32768, 2, tpot_s=0.02, ttft_s=2.0, host=None)
    assert one.tpot_us == pytest.approx(20_000)
    assert one.figures.ttft_median_s == 2.0
    assert one.figures.decode_tokens_per_s == pytest.approx(100)
    assert one.decode_step_us == pytest.approx(20_000)


def test_bytes_read_are_sampled_rows_of_query_heads_and_static_rows_of_kv_heads() -> None:
    expected = (2_000_000 + 30 * 8 * 68) * 512
    assert row_bytes(host_step(), 1, LLAMA, OPTIONS) == expected


@pytest.mark.parametrize(("attend_us", "met"), [(10_000.0, True), (11_000.0, False)])
def test_the_gather_share_is_of_the_measured_bandwidth(attend_us: float, met: bool) -> None:
    """1.03 GB in 10 ms are 103 GB/s, 65 % of 160; in 11 ms 59 %."""
    one = measured_case(98304, 1, 0.03, 9.0, host_step(attend_us=attend_us))
    rows = single_rows(98304, side(one), LLAMA, OPTIONS, FACTS)
    (row,) = (row for row in rows if "rows read" in row.check)
    assert row.met is met
    assert f"{(2_000_000 + 16_320) * 512 / attend_us / 1e3 / 160:.0%} and" in row.figure
    unknown = single_rows(98304, side(one), LLAMA, OPTIONS, {})
    (row,) = (row for row in unknown if "rows read" in row.check)
    assert row.met is None
    assert "the host was not measured" in row.figure


@pytest.mark.parametrize(("tpot_s", "met"), [(0.044, True), (0.046, False)])
def test_time_per_token_has_a_bar(tpot_s: float, met: bool) -> None:
    one = measured_case(98304, 1, tpot_s, 9.0, host_step())
    rows = single_rows(98304, side(one), LLAMA, OPTIONS, FACTS)
    (row,) = (row for row in rows if row.check.endswith("time per output token"))
    assert (row.result, row.met) == (MEASURED, met)
    assert f"{1e3 * tpot_s:.1f} ms mean" in row.figure
    (split,) = (row for row in rows if "split" in row.check)
    assert "lookup 3.00, attention 10.00, rest of the host callbacks 2.00" in split.figure
    assert f"outside of them, hashing included {1e3 * tpot_s - 15:.2f}" in split.figure
    assert "30 empty callbacks 0.24" in split.figure


def test_a_case_that_was_not_reached_is_not_run() -> None:
    (row,) = single_rows(98304, side(), LLAMA, OPTIONS, FACTS)
    assert row.result == NOT_RUN


@pytest.mark.parametrize(("outside_ms", "met"), [(7.5, True), (8.1, False)])
def test_everything_else_is_what_neither_callbacks_nor_gpu_take(
    outside_ms: float, met: bool
) -> None:
    """KV of a token and layer are 4 KiB, at 4,096 GB/s 1 ns. Of the dense step at 32K magicpig reads
    30 layers less from GPU memory, and of 2 layers the 64K tokens by which its context is longer."""
    one = measured_case(98304, 1, 0.015 + outside_ms / 1e3, 9.0, host_step())
    baseline = measured_case(32768, 1, 0.006, 2.0, None)
    row = else_row(one, host_step(), baseline, LLAMA, FACTS)
    gpu_ms = 6 - 30 * 32768 / 1e6 + 2 * 65536 / 1e6
    assert f"{(outside_ms - gpu_ms) * 1e3 / 30:.0f} us a layer" in row.figure
    assert row.met is met
    alone = else_row(one, host_step(), None, LLAMA, FACTS)
    assert f"at most {outside_ms * 1e3 / 30:.0f} us a layer" in alone.figure
    assert alone.met is None


@pytest.mark.parametrize(("ttft_s", "met"), [(2.29, True), (2.31, False)])
def test_the_first_token_has_a_bar(ttft_s: float, met: bool) -> None:
    ours = side(measured_case(32768, 1, 0.02, ttft_s, host_step()))
    dense = side(measured_case(32768, 1, 0.01, 2.0, None))
    (row,) = ttft_rows(ours, dense, GPU.speed, "FLASH_ATTN")
    assert row.met is met
    assert f"ratio {ttft_s / 2:.2f}" in row.figure
    (missing,) = ttft_rows(ours, side(), GPU.speed, "FLASH_ATTN")
    assert missing.result == NOT_RUN


def test_throughput_is_told_as_it_is() -> None:
    ours = side(*(measured_case(32768, n, 0.02, 2.0, host_step()) for n in (1, 2)))
    dense = side(*(measured_case(32768, n, 0.01, 2.0, None) for n in (1, 2, 4)))
    sizes = replace(GPU.speed, dense_cases=tuple((32768, n) for n in (1, 2, 4)))
    one, two, four = throughput_rows(ours, dense, sizes, "FLASH_ATTN")
    assert "magicpig 50.0 tokens/s, FLASH_ATTN 100.0, ratio 0.50" in one.figure
    assert "magicpig 100.0 tokens/s" in two.figure
    assert (two.bar, two.met) == ("", None)
    assert (four.result, four.figure) == (NOT_RUN, "not reached: magicpig")


def test_capacity_changes_with_the_budget_alone() -> None:
    facts = side(kv_gib=22.0).facts
    assert facts is not None
    assert facts.kv_cache_tokens == 22 * 8192
    assert capacity_at(facts, 40, 24) == 6 * 8192
    assert capacity_at(facts, 40, 10) == 0


def test_engines_get_the_budget_and_a_pool_that_holds_every_case(tmp_path: Path) -> None:
    """They need no other part's result: the engine asks the card for its memory."""
    for name in ("speed-magicpig", "speed-dense"):
        speed.speed_task(context(tmp_path, GPU), name)
    ours, dense = (
        read_job(tmp_path / "speed-magicpig.json"),
        read_job(tmp_path / "speed-dense.json"),
    )
    assert (ours.device_gib, dense.device_gib) == (24.0, 40.0)
    assert ours.cases == [[32768, 1], [98304, 1]]
    assert dense.cases == [[32768, 1]]
    assert ours.config["num_hidden_layers"] == 32
    assert ours.arguments["max_num_seqs"] == 4
    assert ours.arguments["max_model_len"] >= 98304 + 16
    options = parse_options(ours.arguments["additional_config"])
    assert not options.check_host_memory
    per_block = speed.host_bytes_per_block(ours.config, options)
    assert options.host_kv_cache_gib is not None
    blocks = int(options.host_kv_cache_gib * GIB) // per_block
    for length, number in ours.cases:
        assert capacity.concurrent_requests(blocks, 128, length + 16) >= number
    assert options.host_kv_cache_gib * GIB < 1.02 * per_block * blocks


def test_an_engine_gets_its_share_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check_engine as engines
    from vllm.platforms import current_platform

    def card(gib: int) -> None:
        monkeypatch.setattr(
            type(current_platform),
            "get_device_total_memory",
            classmethod(lambda cls, device_id=0: gib * GIB),
        )

    card(140)
    assert engines.device_share(24.0) == {"gpu_memory_utilization": pytest.approx(24 / 140)}
    card(16)
    assert engines.device_share(24.0) == {"gpu_memory_utilization": engines.MAX_DEVICE_SHARE}
    assert engines.device_share(None) == {}


# --------------------------------------------------------------------------------------- cost model


def test_the_cost_model_reads_what_was_measured(tmp_path: Path) -> None:
    ours = side(
        measured_case(98304, 1, 0.03, 9.0, host_step()),
        measured_case(32768, 2, 0.02, 2.0, host_step()),
    )
    dense = side(measured_case(32768, 1, 0.006, 2.0, None))
    report = fit_report(FACTS, ours, dense, "llama-3.1-8b", GPU.speed.options)
    assert report is not None
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(report))
    runs = read_report(path)
    assert [run.measured_us["total"] for run in runs] == pytest.approx([6000, 30_000, 20_000])
    assert runs[1].measured_us == pytest.approx(
        {"total": 30_000, "host": 15_000, "lookup": 3000, "rows": 10_000}
    )
    assert set(runs[2].measured_us) == {"total"}
    assert report["gpu"]["pcie_gbs"] == 45.0
    assert report["host"]["threads"] == 15
    # Callbacks as measured: 30 layers of 8 us.
    assert runs[1].predicted.callback == pytest.approx(240)


@pytest.mark.parametrize(
    ("factor", "met"), [(1.19, True), (1.21, False), (0.81, True), (0.79, False)]
)
def test_the_cost_model_has_to_be_within_a_fifth(factor: float, met: bool, tmp_path: Path) -> None:
    """factor: predicted over measured."""

    def report(step_s: float) -> dict[str, Any]:
        dense = side(measured_case(32768, 1, step_s, 2.0, None))
        found = fit_report(FACTS, side(), dense, "llama-3.1-8b", GPU.speed.options)
        assert found is not None
        return found

    path = tmp_path / "one.json"
    path.write_text(json.dumps(report(0.006)))
    predicted_s = read_report(path)[0].predicted.total / 1e6
    (row,) = model_rows(report(predicted_s / factor), tmp_path)
    assert row.met is met
    assert f"{factor - 1:+.0%}" in row.figure


def test_nothing_is_compared_with_the_cost_model_before_it_is_measured() -> None:
    dense = side(measured_case(32768, 1, 0.006, 2.0, None))
    assert fit_report({}, side(), dense, "llama-3.1-8b", {}) is None
    assert fit_report(FACTS, side(), side(), "llama-3.1-8b", {}) is None
