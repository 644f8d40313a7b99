"""The part that serves two layers of the 8B shape as users do: sampled, compiled, with graphs."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gpu_check_children import DONE
from gpu_check_figures import HostStep
from gpu_check_jobs import EAGER, EXAMPLES, IN_PROCESS, CompiledJob, Task, script_task
from gpu_check_parity import two_layers
from gpu_check_parts import Context, ask, ended_row
from gpu_check_report import Part, Row, checked, measured

sys.path.append(str(EXAMPLES))
from compare_figures import Run

NAME = "compiled"


def run_compiled(part: Part, budget_s: float, context: Context) -> None:
    answered = ask(part, context, [compiled_task(context)], budget_s)[NAME]
    part.raw[NAME]["events"] = answered.events
    started_s = answered.first("started_s")
    if started_s is not None:
        how = "compiled, with graphs" if context.scale.compiles else "eager"
        part.rows.append(measured(f"start-up, {how}", f"{started_s:.0f} s"))
    for event in answered.all("compiled"):
        part.rows += compiled_rows(event)
    if answered.ended.state != DONE:
        part.rows.append(ended_row(NAME, answered.ended))
    part.notes.append(
        "Attention of each sampled layer is timed between two events of the main stream: hashing, "
        "copies, the host's part and the way back."
    )


def compiled_task(context: Context) -> Task:
    scale, sizes = context.scale, context.scale.compiled
    max_len = max(sizes.lengths) + sizes.tokens
    job = CompiledJob(
        config=two_layers(sizes.shape, max_len),
        lengths=list(sizes.lengths),
        tokens=sizes.tokens,
        arguments={
            "dtype": "bfloat16",
            "max_model_len": max_len,
            "max_num_batched_tokens": sizes.max_num_batched_tokens,
            "max_num_seqs": 4,
            "enable_prefix_caching": False,
            "enforce_eager": not scale.compiles,
            "kv_cache_memory_bytes": sizes.kv_cache_bytes,
            "attention_backend": "magicpig",
            "additional_config": {"magicpig": scale.small_engine_options(sizes.options)},
            **scale.small_engine_arguments(),
        },
    )
    environment = IN_PROCESS if scale.compiles else IN_PROCESS | EAGER
    return script_task(
        NAME, "gpu_check_engine.py", job, environment, context.scratch, context.results
    )


def compiled_rows(event: Mapping[str, Any]) -> list[Row]:
    """A prompt: whether it was answered whole and sampled, and what its steps took."""
    what = f"{event['length']:,} tokens"
    (request,) = Run.from_dict(event["run"]).requests
    times = request.token_times
    steps_us = [1e6 * (b - a) for a, b in pairwise(times)]
    host = HostStep.between(event["before"], event["after"])
    rows = [
        checked(
            f"{what}: served",
            host.steps >= len(steps_us) and host.sampled_rows > 0,
            f"{len(times)} tokens, {host.steps} sampled steps, "
            f"{100 * host.sampled_fraction:.2f} % of the middle",
            "every step after the first is sampled",
        ),
        measured(
            f"{what}: a step",
            f"{statistics.median(steps_us) / 1e3:.2f} ms, host callback "
            f"{host.callback_us / 1e3:.3f} ms over {host.layers} sampled layers",
        ),
    ]
    for name, layer_us in event["layers"].items():
        if layer_us:
            ordered = sorted(layer_us)
            rows.append(
                measured(
                    f"{what}: attention of {name}",
                    f"median {statistics.median(ordered):.0f} us, slowest {ordered[-1]:.0f} us",
                )
            )
    return rows
