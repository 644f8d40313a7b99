"""Prints how many tokens and requests magicpig holds on common cards and hosts, as Markdown.

    python scripts/kv_capacity.py
    python scripts/kv_capacity.py --model llama-3.1-70b --tp 8 --cards 80 --host-memory 1024

The blocks come from vLLM's own KV cache planner, run on CUDA-shaped specs (no GPU is needed): dense
layers with their ordinary pages, sparse layers with one element a token. What the device has left is
arithmetic: vLLM's default share of the card, less bf16 weights, less a reserve (capacity.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    UniformTypeKVCacheSpecs,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_magicpig import capacity
from vllm_magicpig.capacity import GIB, Capacity
from vllm_magicpig.config import DEFAULT_INDEX, INDEXES, MagicPigOptions
from vllm_magicpig.cost_model import MODELS, ModelShape
from vllm_magicpig.device_backend import DevicePageBackend
from vllm_magicpig.support import block_size_multiple
from vllm_magicpig.vllm_versions import kv_cache_planner

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from argument_types import positive

DTYPE = torch.bfloat16
LAYOUTS = (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)
"""Those of FLASH_ATTN on CUDA; magicpig's sparse placeholders go along with either."""
MAX_MODEL_LEN = 131_072


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        if args.model not in MODELS:
            raise ValueError(f"model {args.model!r} is unknown; choose from {', '.join(MODELS)}.")
        model = MODELS[args.model].shard(args.tp)
        options = MagicPigOptions(index=args.index)
        multiple = block_size_multiple(options)
        if args.block_size % multiple:
            raise ValueError(
                f"block size is {args.block_size}, but must be a multiple of {multiple} with "
                f"{args.index}; choose another."
            )
    except ValueError as error:
        sys.exit(f"kv_capacity: {error}")
    for layout in LAYOUTS:
        check_layout(model, options, args.block_size, layout)
    rows = [
        capacity_row(model, options, args.block_size, card, memory, args.tp)
        for card in args.cards
        for memory in args.host_memory
    ]
    print(heading(args.model, model, options, args.block_size, args.tp))
    print()
    print("\n".join(table(rows)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="KV capacity by card and host memory, Markdown.")
    parser.add_argument("--model", default="llama-3.1-8b", help=", ".join(MODELS))
    parser.add_argument("--index", choices=INDEXES, default=DEFAULT_INDEX)
    parser.add_argument("--tp", type=positive, default=1, help="ranks, all on this machine")
    parser.add_argument("--block-size", type=positive, default=128, help="tokens")
    parser.add_argument("--cards", type=positive, nargs="+", default=[24, 40, 80], help="GiB each")
    parser.add_argument(
        "--host-memory", type=positive, nargs="+", default=[64, 128, 256, 512], help="free RAM, GiB"
    )
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------- planner


def layer_specs(
    model: ModelShape, options: MagicPigOptions | None, block_size: int
) -> dict[str, FullAttentionSpec]:
    """What the layers of a CUDA worker ask for; options None: every layer is dense."""
    dense = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        dtype=DTYPE,
    )
    sparse = DevicePageBackend.customize_spec(dense)
    return {
        f"model.layers.{i}.self_attn.attn": dense
        if options is None or options.is_dense(i)
        else sparse
        for i in range(model.num_layers)
    }


def planner_config(layout: KVCacheLayout) -> Any:
    """Those fields of a VllmConfig that the planner reads."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=None,
            get_resolved_kv_cache_layout=lambda: layout,
            prefix_cache_retention_interval=None,
        ),
        speculative_config=None,
    )


def plan(
    specs: dict[str, FullAttentionSpec], device_bytes: int, layout: KVCacheLayout
) -> KVCacheConfig:
    """vLLM's plan for one rank whose worker reports device_bytes."""
    config = planner_config(layout)
    planner = kv_cache_planner()
    groups = planner.get_kv_cache_groups(config, dict(specs))
    return planner.get_kv_cache_config_from_groups(config, groups, device_bytes)


def check_layout(
    model: ModelShape, options: MagicPigOptions, block_size: int, layout: KVCacheLayout
) -> None:
    """Raises AssertionError unless all layers share one block table and each finds its pages."""
    specs = layer_specs(model, options, block_size)
    num_blocks = 3
    config = plan(specs, num_blocks * block_bytes(model, options, block_size), layout)
    groups = config.kv_cache_groups
    assert len(groups) == 1, f"{len(groups)} groups, and each has a block table of its own"
    group = groups[0]
    assert sorted(group.layer_names) == sorted(specs), "a layer lies outside of the group"
    if len(set(specs.values())) > 1:
        assert isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs), type(group.kv_cache_spec)
    assert config.num_blocks == num_blocks, config.num_blocks
    assert not config.needs_kv_cache_zeroing, "vLLM would clear pages of a mixed dtype"

    (size,) = {tensor.size for tensor in config.kv_cache_tensors}
    memory = torch.empty(size, dtype=torch.int8)
    taken: list[tuple[int, int]] = []
    for tensor in config.kv_cache_tensors:
        spec = specs[tensor.layers[0]]
        for view in create_kv_cache_views(memory, spec, num_blocks, layout, tensor):
            elements = spec.state_content_size_bytes // DTYPE.itemsize
            assert view.shape == (num_blocks, spec.num_heads, block_size, elements), view.shape
            start = view.data_ptr() - memory.data_ptr()
            taken.append((start, start + num_blocks * spec.page_size_bytes))
    taken.sort()
    assert len(taken) == model.num_layers, "a layer has no pages"
    assert taken[-1][1] <= size, "pages lie past the end"
    for (_, end), (start, _) in pairwise(taken):
        assert end <= start, "two layers share bytes"


# -------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Row:
    """A card beside a host. Blocks are vLLM's, its null block included."""

    card_gib: int
    host_gib: int
    plan: Capacity
    tokens: int
    requests: int
    dense_tokens: int
    dense_requests: int


def num_sparse_layers(model: ModelShape, options: MagicPigOptions) -> int:
    return sum(not options.is_dense(layer) for layer in range(model.num_layers))


def block_bytes(model: ModelShape, options: MagicPigOptions, block_size: int) -> int:
    """capacity.device_block_bytes of a model."""
    sparse = num_sparse_layers(model, options)
    return capacity.device_block_bytes(
        model.num_layers - sparse,
        sparse,
        model.num_kv_heads,
        model.head_size,
        model.itemsize,
        block_size,
    )


def capacity_row(
    model: ModelShape,
    options: MagicPigOptions,
    block_size: int,
    card_gib: int,
    host_gib: int,
    ranks: int,
) -> Row:
    """model: one rank's shard; the ranks share host_gib. Raises AssertionError if vLLM plans other
    blocks than capacity.py."""
    sparse = num_sparse_layers(model, options)
    heads, head_size, itemsize = model.num_kv_heads, model.head_size, model.itemsize
    planned = capacity.plan_blocks(
        capacity.default_host_bytes(host_gib * GIB, ranks),
        capacity.device_kv_bytes(card_gib * GIB, model.weight_bytes),
        capacity.host_block_bytes(
            sparse, heads, head_size, itemsize, options.num_tables, block_size
        ),
        capacity.index_bytes_per_block(sparse, heads, options.K, options.num_tables, block_size),
        block_bytes(model, options, block_size),
        index_spare_bytes=spare_bytes(model, options, block_size),
        signature_block_bytes=signature_bytes(model, options, block_size),
    )
    # A worker reports no more device memory than its host pool has blocks for.
    reported = min(planned.device_bytes, planned.num_blocks * planned.device_block_bytes)
    for layout in LAYOUTS:
        found = plan(layer_specs(model, options, block_size), reported, layout)
        assert found.num_blocks == planned.num_blocks, (found.num_blocks, planned)
    dense = plan(layer_specs(model, None, block_size), planned.device_bytes, LAYOUTS[0])
    return Row(
        card_gib,
        host_gib,
        planned,
        planned.tokens(block_size),
        planned.requests(block_size, MAX_MODEL_LEN),
        capacity.usable_tokens(dense.num_blocks, block_size),
        capacity.concurrent_requests(dense.num_blocks, block_size, MAX_MODEL_LEN),
    )


def spare_bytes(model: ModelShape, options: MagicPigOptions, block_size: int) -> int:
    """Of the index, all sparse layers, beside that of the blocks."""
    return capacity.index_spare_bytes(
        num_sparse_layers(model, options),
        model.num_kv_heads,
        options.K,
        options.num_tables,
        block_size,
        MAX_MODEL_LEN,
    )


def signature_bytes(model: ModelShape, options: MagicPigOptions, block_size: int) -> int:
    """Of one block, all sparse layers."""
    return capacity.signature_block_bytes(
        num_sparse_layers(model, options),
        model.num_kv_heads,
        model.head_size,
        options.signature_bits,
        block_size,
    )


def heading(
    name: str, model: ModelShape, options: MagicPigOptions, block_size: int, ranks: int
) -> str:
    sparse = num_sparse_layers(model, options)
    page = capacity.host_block_bytes(
        sparse,
        model.num_kv_heads,
        model.head_size,
        model.itemsize,
        options.num_tables,
        block_size,
    )
    if options.has_signatures:
        method = f"signatures of {options.bits} bits"
        contents = "signatures"
        beside = f"{signature_bytes(model, options, block_size):,} in signatures"
    else:
        method = f"K = {options.K}, L = {options.L}"
        contents = "index"
        index = capacity.index_bytes_per_block(
            sparse, model.num_kv_heads, options.K, options.num_tables, block_size
        )
        spare = spare_bytes(model, options, block_size)
        beside = (
            f"up to {index:,} in the index; the largest segments take {spare / GIB:.1f} GiB more "
            "while they are built"
        )
    per_rank = "" if ranks == 1 else f", each of {ranks} ranks"
    return (
        f"{name}{per_rank}, bf16, {model.num_layers - sparse} dense and {sparse} sparse layers, "
        f"{method}. Device memory for KV is {capacity.GPU_MEMORY_UTILIZATION:.0%} "
        f"of the card less {model.weight_bytes / 1e9:.2f} GB of weights and "
        f"{capacity.DEVICE_RESERVE_BYTES / GIB:g} GiB for activations, graphs and staging; pages and "
        f"{contents} take {capacity.DEFAULT_RAM_SHARE:.0%} of the host's free RAM. A block of "
        f"{block_size} tokens takes {block_bytes(model, options, block_size):,} bytes on the device, "
        f"{page:,} in host pages and {beside}."
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| card GiB | for KV GiB | host free GiB | for "
        f"{rows[0].plan.host_contents} GiB | blocks, device | "
        "blocks, host | limit | tokens | requests of 128K | FLASH_ATTN tokens | requests of 128K |"
    )
    yield "|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|"
    for row in rows:
        cells = [
            f"{row.card_gib}",
            f"{row.plan.device_bytes / GIB:.1f}",
            f"{row.host_gib}",
            f"{row.plan.host_bytes / GIB:.1f}",
            f"{row.plan.device_blocks:,}",
            f"{row.plan.host_blocks:,}",
            row.plan.limited_by.removesuffix(" memory"),
            f"{row.tokens:,}",
            f"{row.requests}",
            f"{row.dense_tokens:,}",
            f"{row.dense_requests}",
        ]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
