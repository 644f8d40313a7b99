"""Rows of the 8B shape's speed: what was measured, beside the bars."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gpu_check_figures import HostStep, Measured, Side
from gpu_check_jobs import EXAMPLES
from gpu_check_report import (
    MAX_ELSE_US,
    MAX_TPOT_MS,
    MAX_TTFT_RATIO,
    MIN_GATHER_SHARE,
    NOT_RUN,
    Row,
    measured,
)
from gpu_check_scale import GIB, SpeedScale

from vllm_magicpig.config import MagicPigOptions

sys.path.append(str(EXAMPLES))
from compare_figures import Case, EngineFacts


def our_capacity_row(facts: EngineFacts, sizes: SpeedScale, tokens_per_gib: int) -> Row:
    """tokens_per_gib: of host memory."""
    where = "" if sizes.small_gib is None else f", {sizes.small_gib:g} GiB of device memory"
    return measured(
        f"KV capacity of magicpig{where}",
        f"{facts.kv_cache_tokens:,} tokens in a host pool made for this run (a GiB of host memory "
        f"holds {tokens_per_gib:,}); start-up {facts.start_s:.0f} s",
    )


def dense_capacity_row(facts: EngineFacts, sizes: SpeedScale, dense_name: str) -> Row:
    if sizes.small_gib is None or sizes.large_gib is None:
        figure = f"{facts.kv_cache_tokens:,} tokens; start-up {facts.start_s:.0f} s"
        return measured(f"KV capacity of {dense_name}", figure)
    tokens = capacity_at(facts, sizes.large_gib, sizes.small_gib)
    return measured(
        f"KV capacity of {dense_name}, {sizes.small_gib:g} GiB of device memory",
        f"{tokens:,} tokens: {'less' if tokens < sizes.longest else 'NOT less'} than a request of "
        f"{sizes.longest:,} (derived: its {facts.kv_bytes / GIB:.1f} GiB of KV, "
        f"{facts.kv_cache_tokens:,} tokens, at {sizes.large_gib:g} GiB, less the difference)",
    )


def capacity_at(facts: EngineFacts, budget_gib: float, other_gib: float) -> int:
    """Tokens with another budget: all that changes with it is the memory left for the KV cache."""
    kv_bytes = facts.kv_bytes - int((budget_gib - other_gib) * GIB)
    return max(0, kv_bytes * facts.kv_cache_tokens // facts.kv_bytes)


def single_rows(
    length: int,
    ours: Side,
    shape: Mapping[str, Any],
    options: MagicPigOptions,
    facts: Mapping[str, Any],
) -> list[Row]:
    """One request of a long context: its times, and where they go."""
    what = f"1 x {length:,} tokens"
    one = ours.cases.get(Case(length, 1))
    if one is None or one.host is None:
        return [Row(f"{what}: magicpig", NOT_RUN, "not reached")]
    host, tpot_ms = one.host, one.tpot_us / 1e3
    median = "no" if one.figures.tpot_ms is None else f"{one.figures.tpot_ms:.1f} ms"
    read_bytes = row_bytes(host, 1, shape, options)
    gathered_gbs = read_bytes / host.attend_us / 1e3
    step_gbs = read_bytes / host.callback_us / 1e3
    rows = [
        measured(f"{what}: time to first token", f"{one.figures.ttft_median_s:.2f} s"),
        measured(
            f"{what}: time per output token",
            f"{tpot_ms:.1f} ms mean, {median} median; "
            f"{100 * host.sampled_fraction:.2f} % of the middle sampled",
            f"<= {MAX_TPOT_MS:g} ms",
            tpot_ms <= MAX_TPOT_MS,
        ),
        measured(f"{what}: split of it", split(host, one.tpot_us, facts)),
    ]
    gather = facts.get("host", {}).get("row_gather_gbs")
    figure = f"{gathered_gbs:.1f} GB/s while attending, {step_gbs:.1f} over the whole callback"
    if gather is None:
        rows.append(measured(f"{what}: rows read", f"{figure}; the host was not measured"))
    else:
        share = gathered_gbs / gather
        rows.append(
            measured(
                f"{what}: rows read",
                f"{figure}: {share:.0%} and {step_gbs / gather:.0%} of the {gather:.1f} GB/s of "
                "random rows",
                f">= {MIN_GATHER_SHARE:.0%} while attending",
                share >= MIN_GATHER_SHARE,
            )
        )
    return rows


def row_bytes(
    host: HostStep, num_requests: int, shape: Mapping[str, Any], options: MagicPigOptions
) -> float:
    """K and V of a step: every query head gathers its sample; sink and window are read once for
    each kv head."""
    one_row = 2 * shape["head_dim"] * 2
    static = options.sink_tokens + options.window_tokens
    static_rows = num_requests * host.layers * shape["num_key_value_heads"] * static
    return (host.sampled_rows + static_rows) * one_row


def split(host: HostStep, tpot_us: float, facts: Mapping[str, Any]) -> str:
    """In ms of a step. Lookup and attention are what each thread spends in them, on average."""
    outside = "outside of them" if host.hash_us else "outside of them, hashing included"
    parts = {
        "lookup": host.lookup_us,
        "attention": host.attend_us,
        "rest of the host callbacks": host.callback_us - host.lookup_us - host.attend_us,
        outside: tpot_us - host.callback_us,
    }
    if host.hash_us:  # on the CPU platform alone: a GPU hashes outside of the callbacks
        parts["hashing within them"] = host.hash_us
    text = ", ".join(f"{name} {us / 1e3:.2f}" for name, us in parts.items())
    device = facts.get("device_bandwidth")
    if device is not None:
        latency = host.layers * device["callback_us"] / 1e3
        text += (
            f" (of which latency of {host.layers} empty callbacks {latency:.2f}, as measured alone)"
        )
    return f"{text} ms; {host.threads} threads, {host.layers} layers, {host.steps} steps"


def else_rows(
    ours: Side,
    dense: Side,
    shape: Mapping[str, Any],
    facts: Mapping[str, Any],
    sizes: SpeedScale,
) -> list[Row]:
    """Of each case of one request that magicpig has answered."""
    singles = [one for one in ours.cases.values() if one.case.num_requests == 1]
    baseline = dense.cases.get(Case(sizes.dense_cases[0][0], 1))
    return [
        else_row(one, one.host, baseline, shape, facts) for one in singles if one.host is not None
    ]


def else_row(
    one: Measured,
    host: HostStep,
    baseline: Measured | None,
    shape: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Row:
    """All of a sampled layer but the callback itself and the GPU's own work.

    The GPU's work is the dense backend's step with one request, less the time that reading the KV of
    the sampled layers takes at the measured bandwidth; plus the same of the longer context for
    the dense layers.
    """
    outside_us = one.tpot_us - host.callback_us
    device = facts.get("device_bandwidth")
    check = f"1 x {one.case.length:,} tokens: everything else"
    bar = f"<= {MAX_ELSE_US:g} us a layer"
    if baseline is None or device is None:
        each = outside_us / host.layers
        return measured(
            check,
            f"at most {each:.0f} us a layer: the GPU's own work, which is in it, was not measured",
            bar,
            True if each <= MAX_ELSE_US else None,
        )
    token_us = 2 * shape["num_key_value_heads"] * shape["head_dim"] * 2 / device["hbm_gbs"] / 1e3
    dense_layers, short = shape["num_hidden_layers"] - host.layers, baseline.case.length
    gpu_us = (
        baseline.tpot_us
        - host.layers * short * token_us
        + dense_layers * (one.case.length - short) * token_us
    )
    each = (outside_us - gpu_us) / host.layers
    return measured(
        check,
        f"{each:.0f} us a layer: {outside_us / 1e3:.2f} ms outside of the callbacks less "
        f"{gpu_us / 1e3:.2f} ms of the GPU's own work (the dense backend's step at "
        f"{short:,} tokens, corrected by KV bytes over {device['hbm_gbs']:.0f} GB/s)",
        bar,
        each <= MAX_ELSE_US,
    )


def throughput_rows(ours: Side, dense: Side, sizes: SpeedScale, dense_name: str) -> list[Row]:
    rows = []
    budgets = (
        ""
        if sizes.large_gib is None
        else f" ({dense_name} within {sizes.large_gib:g} GiB, magicpig within {sizes.small_gib:g})"
    )
    for length, number in sizes.dense_cases:
        case = Case(length, number)
        check = f"{number} x {length:,} tokens: decode"
        a, b = ours.cases.get(case), dense.cases.get(case)
        if a is None or b is None:
            missing = [name for name, one in (("magicpig", a), (dense_name, b)) if one is None]
            rows.append(Row(check, NOT_RUN, f"not reached: {' and '.join(missing)}"))
            continue
        speeds = [one.figures.decode_tokens_per_s for one in (a, b)]
        if speeds[0] is None or speeds[1] is None:
            rows.append(Row(check, NOT_RUN, "no step that only decodes"))
            continue
        fraction = 0.0 if a.host is None else a.host.sampled_fraction
        rows.append(
            measured(
                check,
                f"magicpig {speeds[0]:.1f} tokens/s, {dense_name} {speeds[1]:.1f}, ratio "
                f"{speeds[0] / speeds[1]:.2f}{budgets}; {100 * fraction:.2f} % sampled",
            )
        )
    return rows


def ttft_rows(ours: Side, dense: Side, sizes: SpeedScale, dense_name: str) -> list[Row]:
    """Of the cases that both backends have."""
    rows = []
    for length, number in sizes.dense_cases:
        case = Case(length, number)
        check = f"{number} x {length:,} tokens: time to first token"
        a, b = ours.cases.get(case), dense.cases.get(case)
        if a is None or b is None:
            rows.append(Row(check, NOT_RUN, "not reached by both"))
            continue
        ratio = a.figures.ttft_median_s / b.figures.ttft_median_s
        rows.append(
            measured(
                check,
                f"magicpig {a.figures.ttft_median_s:.3f} s, {dense_name} "
                f"{b.figures.ttft_median_s:.3f} s, ratio {ratio:.2f}",
                f"<= {MAX_TTFT_RATIO:g}",
                ratio <= MAX_TTFT_RATIO,
            )
        )
    return rows
