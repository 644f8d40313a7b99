"""The two parts that measure the 8B shape: capacity, time to first token, time per output token."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpu_check_children import DONE
from gpu_check_figures import Side
from gpu_check_jobs import EAGER, EXAMPLES, IN_PROCESS, SERVING, SpeedJob, Task, script_task
from gpu_check_model import fit_report, model_rows
from gpu_check_parts import Context, ask, ended_row
from gpu_check_report import Part
from gpu_check_scale import GIB, Scale, SpeedScale
from gpu_check_speed_rows import (
    dense_capacity_row,
    else_rows,
    our_capacity_row,
    single_rows,
    throughput_rows,
    ttft_rows,
)

from vllm_magicpig import capacity
from vllm_magicpig.config import MagicPigOptions, parse_options

sys.path.append(str(EXAMPLES))
from compare_setup import SHAPES

BLOCK_SIZE = 128
REHEARSAL_KV_BYTES = 1 << 30


def run_speed(part: Part, budget_s: float, context: Context) -> None:
    """magicpig's cases, each reported as it is done."""
    scale, sizes = context.scale, context.scale.speed
    ours = run_side(part, budget_s, context, "speed-magicpig")
    options, shape = our_options(sizes), speed_config(sizes)
    for length in dict.fromkeys(length for length, number in sizes.cases if number == 1):
        part.rows += single_rows(length, ours, shape, options, context.report.facts)
    if ours.facts is not None:
        tokens_per_gib = BLOCK_SIZE * GIB // host_bytes_per_block(shape, options)
        part.rows.append(our_capacity_row(ours.facts, sizes, tokens_per_gib))
    without_bars(part, scale)
    part.notes.append(
        f"{sizes.shape}, {shape['num_hidden_layers']} layers, load_format=dummy, random prompts: "
        "attention over such weights is near-uniform and the sampled fraction is not that of real "
        f"text, so K = {options.K} and L = {options.L} were chosen to read about 2 % of the rows. "
        f"{sizes.output_tokens} tokens a request, one run of each case."
    )


def run_dense_speed(part: Part, budget_s: float, context: Context) -> None:
    """The dense backend, and what can be said of both."""
    scale, sizes = context.scale, context.scale.speed
    dense = run_side(part, budget_s, context, "speed-dense")
    ours = context.sides.get("speed-magicpig", Side(None, None, {}))
    shape = speed_config(sizes)
    if dense.facts is not None:
        part.rows.append(dense_capacity_row(dense.facts, sizes, scale.dense_backend))
    part.rows += throughput_rows(ours, dense, sizes, scale.dense_backend)
    part.rows += ttft_rows(ours, dense, sizes, scale.dense_backend)
    part.rows += else_rows(ours, dense, shape, context.report.facts, sizes)
    add_model_rows(part, context, ours, dense)
    without_bars(part, scale)


def run_side(part: Part, budget_s: float, context: Context, name: str) -> Side:
    answered = ask(part, context, [speed_task(context, name)], budget_s)[name]
    part.raw[name]["events"] = answered.events
    if answered.ended.state != DONE:
        part.rows.append(ended_row(name, answered.ended))
    side = context.sides[name] = Side.of(answered)
    return side


def without_bars(part: Part, scale: Scale) -> None:
    if scale.is_rehearsal:  # no bar is meant for such sizes
        part.rows = [replace(row, bar="", met=None) for row in part.rows]


def our_options(sizes: SpeedScale) -> MagicPigOptions:
    return parse_options({"magicpig": sizes.options})


def speed_config(sizes: SpeedScale) -> dict[str, Any]:
    config = SHAPES[sizes.shape] | {"max_position_embeddings": sizes.longest + sizes.output_tokens}
    return config if sizes.num_layers is None else config | {"num_hidden_layers": sizes.num_layers}


def speed_task(context: Context, name: str) -> Task:
    """magicpig within the small budget, which is all it needs for every case, and the dense backend
    within the large one."""
    scale, sizes = context.scale, context.scale.speed
    config, options = speed_config(sizes), dict(sizes.options)
    ours = name == "speed-magicpig"
    cases = list(sizes.cases if ours else sizes.dense_cases)
    if ours and not scale.is_rehearsal:
        options["host_kv_cache_gib"] = host_gib(config, our_options(sizes), sizes)
        options["check_host_memory"] = False
    backend: dict[str, Any] = {"attention_backend": scale.dense_backend}
    if ours:
        backend = {
            "attention_backend": "magicpig",
            "additional_config": {"magicpig": options},
        }
    arguments = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "max_model_len": max(length for length, _ in cases) + sizes.output_tokens,
        "max_num_seqs": sizes.max_num_seqs,
        "max_num_batched_tokens": sizes.max_num_batched_tokens,
        "enable_prefix_caching": False,
        "enforce_eager": not scale.compiles,
        **({"kv_cache_memory_bytes": REHEARSAL_KV_BYTES} if scale.is_rehearsal else {}),
        **backend,
    }
    device_gib = sizes.small_gib if ours else sizes.large_gib
    job = SpeedJob(config, cases, sizes.output_tokens, ours, device_gib, arguments)
    environment = IN_PROCESS | EAGER if scale.is_rehearsal else SERVING
    return script_task(
        name, "gpu_check_engine.py", job, environment, context.scratch, context.results
    )


def host_bytes_per_block(config: Mapping[str, Any], options: MagicPigOptions) -> int:
    """Of pages and index, all sampled layers."""
    sparse, heads, num_bits, num_tables = sampled_shape(config, options)
    pages = capacity.host_block_bytes(sparse, heads, config["head_dim"], 2, num_tables, BLOCK_SIZE)
    return pages + capacity.index_bytes_per_block(sparse, heads, num_bits, num_tables, BLOCK_SIZE)


def sampled_shape(config: Mapping[str, Any], options: MagicPigOptions) -> tuple[int, int, int, int]:
    """Sampled layers, their kv heads, K and the tables of their pages."""
    sparse = sum(not options.is_dense(layer) for layer in range(config["num_hidden_layers"]))
    return sparse, config["num_key_value_heads"], options.K, options.num_tables


def host_gib(config: Mapping[str, Any], options: MagicPigOptions, sizes: SpeedScale) -> float:
    """What the largest case needs: no more than that has to be pinned."""
    blocks = max(
        number * -(-(length + sizes.output_tokens) // BLOCK_SIZE) for length, number in sizes.cases
    )
    host_bytes = host_bytes_per_block(config, options) * (blocks + 1)  # with the null block
    host_bytes += capacity.index_spare_bytes(
        *sampled_shape(config, options), BLOCK_SIZE, sizes.longest
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
