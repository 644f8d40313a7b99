"""The part that measures the 8B shape: capacity, time to first token, time per output token."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpu_check_children import DONE
from gpu_check_figures import Side
from gpu_check_jobs import EAGER, EXAMPLES, IN_PROCESS, SERVING, SpeedJob, Task, engine_task
from gpu_check_model import fit_report, model_rows
from gpu_check_parts import Context, ask, ended_row
from gpu_check_report import Part
from gpu_check_scale import GIB, SpeedScale
from gpu_check_speed_rows import capacity_rows, single_rows, throughput_rows, ttft_row

from vllm_magicpig import capacity
from vllm_magicpig.config import MagicPigOptions, parse_options

sys.path.append(str(EXAMPLES))
from compare_setup import SHAPES

BLOCK_SIZE = 128
REHEARSAL_KV_BYTES = 1 << 30
OURS_SHARE = 0.6  # of the part's time: magicpig has more cases, and a pool to pin
MAX_DEVICE_SHARE = 0.92  # of a card that is smaller than the budget: vLLM's default


def run_speed(part: Part, budget_s: float, context: Context) -> None:
    scale = context.scale
    sizes = scale.speed
    tasks = speed_tasks(context)
    answered = ask(part, context, [tasks["speed-magicpig"]], budget_s * OURS_SHARE)
    left = budget_s - answered["speed-magicpig"].ended.seconds
    answered |= ask(part, context, [tasks["speed-dense"]], left)
    sides = {}
    for name, one in answered.items():
        part.raw[name]["events"] = one.events
        sides[name] = Side.of(one)
        if one.ended.state != DONE:
            part.rows.append(ended_row(name, one.ended, is_correctness=False))
    ours, dense = sides["speed-magicpig"], sides["speed-dense"]
    options = parse_options({"magicpig": sizes.options})
    shape = speed_config(sizes)
    tokens_per_gib = BLOCK_SIZE * GIB // host_bytes_per_block(shape, options)
    part.rows += capacity_rows(ours, dense, sizes, tokens_per_gib, scale.dense_backend)
    for length in (sizes.long, sizes.longest):
        if length is not None:
            part.rows += single_rows(
                length, ours, dense, shape, options, context.report.facts, sizes
            )
    part.rows += throughput_rows(ours, dense, sizes, scale.dense_backend)
    part.rows.append(ttft_row(ours, dense, sizes, scale.dense_backend))
    add_model_rows(part, context, ours, dense)
    if scale.is_rehearsal:  # no bar is meant for such sizes
        part.rows = [replace(row, bar="", met=None) for row in part.rows]
    part.notes.append(
        f"{sizes.shape}, {shape['num_hidden_layers']} layers, load_format=dummy, random prompts: "
        "attention over such weights is near-uniform and the sampled fraction is not that of real "
        f"text, so K = {options.K} and L = {options.L} were chosen to read about 2 % of the rows. "
        f"{sizes.output_tokens} tokens a request, one run of each case."
    )


def speed_config(sizes: SpeedScale) -> dict[str, Any]:
    config = SHAPES[sizes.shape] | {"max_position_embeddings": max_model_len(sizes)}
    return config if sizes.num_layers is None else config | {"num_hidden_layers": sizes.num_layers}


def max_model_len(sizes: SpeedScale) -> int:
    return max(sizes.long, sizes.longest or 0) + sizes.output_tokens


def our_cases(sizes: SpeedScale) -> list[tuple[int, int]]:
    """Those that matter most first: what there is no time for is left out at the end."""
    cases = [(sizes.long, 1), *((sizes.short, number) for number in sizes.num_requests)]
    return cases if sizes.longest is None else [*cases, (sizes.longest, 1)]


def speed_tasks(context: Context) -> dict[str, Task]:
    """magicpig within the small budget, which is all it needs for every case, and the dense backend
    within the large one."""
    scale, sizes = context.scale, context.scale.speed
    config = speed_config(sizes)
    total_gib = context.report.facts.get("gpu_memory_gib")
    ours, dense = our_cases(sizes), [(sizes.short, number) for number in sizes.num_requests]
    options = dict(sizes.options)
    if not scale.is_rehearsal:
        options["host_kv_cache_gib"] = host_gib(config, parse_options({"magicpig": options}), sizes)
    environment = IN_PROCESS | EAGER if scale.is_rehearsal else SERVING
    tasks = {}
    for name, cases, budget_gib, extra in (
        (
            "speed-magicpig",
            ours,
            sizes.small_gib,
            {"attention_backend": "magicpig", "additional_config": {"magicpig": options}},
        ),
        ("speed-dense", dense, sizes.large_gib, {"attention_backend": scale.dense_backend}),
    ):
        arguments = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "block_size": BLOCK_SIZE,
            "max_model_len": max(length for length, _ in cases) + sizes.output_tokens,
            "max_num_seqs": max(sizes.num_requests),
            "max_num_batched_tokens": sizes.max_num_batched_tokens,
            "enable_prefix_caching": False,
            "enforce_eager": not scale.compiles,
            **budget(budget_gib, total_gib),
            **extra,
        }
        job = SpeedJob(config, cases, sizes.output_tokens, name == "speed-magicpig", arguments)
        tasks[name] = engine_task(name, job, environment, context.scratch)
    return tasks


def budget(gib: float | None, total_gib: float | None) -> dict[str, Any]:
    """EngineArgs for so much device memory, weights included; on a CPU for the KV cache alone."""
    if gib is None:
        return {"kv_cache_memory_bytes": REHEARSAL_KV_BYTES}
    if not total_gib:
        raise ValueError(
            "the memory of the GPU is not known, as the hardware part did not tell it; do not skip "
            "that part."
        )
    return {"gpu_memory_utilization": min(gib / total_gib, MAX_DEVICE_SHARE)}


def host_bytes_per_block(config: Mapping[str, Any], options: MagicPigOptions) -> int:
    """Of pages and index, all sampled layers."""
    sparse, heads, num_bits, num_tables = sampled_shape(config, options)
    pages = capacity.host_block_bytes(sparse, heads, config["head_dim"], 2, num_tables, BLOCK_SIZE)
    return pages + capacity.index_bytes_per_block(sparse, heads, num_bits, num_tables, BLOCK_SIZE)


def sampled_shape(config: Mapping[str, Any], options: MagicPigOptions) -> tuple[int, int, int, int]:
    """Sampled layers, their kv heads, K and the tables of their pages."""
    sparse = sum(not options.is_dense(layer) for layer in range(config["num_hidden_layers"]))
    return sparse, config["num_key_value_heads"], options.K, options.indexed_tables


def host_gib(config: Mapping[str, Any], options: MagicPigOptions, sizes: SpeedScale) -> float:
    """What the largest case needs: no more than that has to be pinned."""
    blocks = max(
        number * -(-(length + sizes.output_tokens) // BLOCK_SIZE)
        for length, number in our_cases(sizes)
    )
    host_bytes = host_bytes_per_block(config, options) * (blocks + 1)  # with the null block
    host_bytes += capacity.index_spare_bytes(
        *sampled_shape(config, options), BLOCK_SIZE, max(length for length, _ in our_cases(sizes))
    )
    return round(host_bytes / GIB + 0.1, 1)  # a tenth against rounding


def add_model_rows(part: Part, context: Context, ours: Side, dense: Side) -> None:
    sizes = context.scale.speed
    if context.scale.is_rehearsal:
        part.notes.append("The cost model has no preset for the toy shape: nothing is compared.")
        return
    report = fit_report(context.report.facts, ours, dense, sizes.shape, sizes.options)
    if report is None:
        part.notes.append("Too little was measured to compare it with the cost model.")
        return
    context.report.cost_model = report
    part.rows += model_rows(report, context.scratch)
