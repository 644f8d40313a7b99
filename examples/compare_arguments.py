"""Arguments of the comparison, checked at the door."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from argument_types import (
    folder_for_results,
    json_object,
    positive,
    positive_list,
    positive_number,
)
from compare_setup import DEFAULT_KV_CACHE_GIB, SHAPES, TAKEN_ENGINE_ARGS, Settings

from vllm_magicpig.config import parse_options


class _Parser(argparse.ArgumentParser):
    """One sentence, without the usage lines that argparse puts in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        description="Compares magicpig with the platform's dense attention: FLASH_ATTN on a GPU, "
        "CPU_ATTN on a CPU. Both engines run one after another with the same weights, prompts and "
        "device memory.",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="Hugging Face name or local folder")
    model.add_argument("--config", type=Path, help="config.json of a model; weights are random")
    model.add_argument("--shape", help=f"built in, weights are random: {', '.join(SHAPES)}")
    model.add_argument("--layers", type=positive, help="fewer layers, with random weights only")
    model.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    model.add_argument(
        "--prompts",
        choices=("text", "random"),
        help="English or random token ids; default: text where the weights are real",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--lengths",
        type=positive_list,
        default="2048,8192",
        help="prompt tokens; default %(default)s",
    )
    load.add_argument(
        "--requests", type=positive_list, default="1,2", help="at once; default %(default)s"
    )
    load.add_argument(
        "--output-tokens", type=positive, default=64, help="at least 2; default %(default)s"
    )
    load.add_argument("--repeats", type=positive, default=1)
    engines = parser.add_argument_group("engines")
    engines.add_argument("--options", type=json_object, default={}, help="JSON, magicpig's own")
    engines.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        help='JSON, further EngineArgs of both, such as {"enforce_eager": true}',
    )
    engines.add_argument(
        "--gpu-memory-gib", type=positive_number, help="take each GPU for one with this memory"
    )
    engines.add_argument("--host-gib", type=positive_number, help="magicpig's pinned pool (CUDA)")
    engines.add_argument(
        "--kv-cache-gib",
        type=positive_number,
        help=f"KV cache of each backend on a CPU; default {DEFAULT_KV_CACHE_GIB:g}",
    )
    parser.add_argument(
        "--output",
        type=folder_for_results,
        default=str(Path(".logs") / "comparison"),
        help="folder of the results",
    )
    return parser


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Exits with one sentence and code 2 where an argument is wrong."""
    parser = _parser()
    given = parser.parse_args(argv)
    named = [name for name in ("model", "config", "shape") if getattr(given, name) is not None]
    if len(named) > 1:
        parser.error(f"--{named[0]} and --{named[1]} both name a model; keep one of them.")
    if not named:
        given.shape = "small"
    if given.shape is not None and given.shape not in SHAPES:
        parser.error(f"--shape is {given.shape!r}, but must be one of {', '.join(SHAPES)}.")
    if given.config is not None:
        try:
            json_object(given.config.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, argparse.ArgumentTypeError):
            parser.error(
                f"--config is {str(given.config)!r}, but must be the config.json of a model; name "
                "such a file."
            )
    if given.model is None:
        given.load_format = "dummy"
    is_random = given.load_format == "dummy"
    if given.layers is not None and not is_random:
        parser.error(
            f"--layers is {given.layers}, but the weights of --model have all of its layers; add "
            "--load-format dummy."
        )
    if given.model is None and given.prompts == "text":
        parser.error("--prompts is text, but only --model has a tokenizer; use --prompts random.")
    if given.output_tokens < 2:
        parser.error(
            f"--output-tokens is {given.output_tokens}, but must be at least 2: the first one comes "
            "from the prefill."
        )
    try:
        parse_options({"magicpig": given.options})
    except ValueError as error:
        parser.error(str(error))
    if given.host_gib is not None and "host_kv_cache_gib" in given.options:
        parser.error("--host-gib and --options both give host_kv_cache_gib; keep one of them.")
    for name in TAKEN_ENGINE_ARGS:
        if name in given.engine_args:
            parser.error(
                f"--engine-args has {name!r}, which the comparison sets itself; remove it."
            )
    return Settings(
        model=given.model,
        config=given.config,
        shape=given.shape,
        layers=given.layers,
        load_format=given.load_format,
        prompts=given.prompts or ("random" if is_random else "text"),
        lengths=given.lengths,
        requests=given.requests,
        output_tokens=given.output_tokens,
        repeats=given.repeats,
        options=given.options,
        engine_arguments=given.engine_args,
        gpu_memory_gib=given.gpu_memory_gib,
        kv_cache_gib=given.kv_cache_gib,
        host_gib=given.host_gib,
        output=given.output,
    )
