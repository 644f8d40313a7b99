"""What vLLM sees of sampled layers with pages in the host pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_magicpig.backend import MagicPigBackend, with_options
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.device_backend import DeviceMetadataBuilder, DevicePageBackend

SPEC = FullAttentionSpec(block_size=128, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)


def config(block_size: int = 128) -> Any:
    layer = SimpleNamespace(impl=SimpleNamespace(sampled=None))
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=block_size),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
        model_config=None,
    )


def builder(spec: FullAttentionSpec, vllm_config: Any) -> DeviceMetadataBuilder:
    return DeviceMetadataBuilder(spec, ["layer"], vllm_config, torch.device("cpu"))


def test_a_token_takes_one_element_of_the_device() -> None:
    assert SPEC.page_size_bytes == 128 * 8 * 2 * 128 * 2
    assert DevicePageBackend.customize_spec(SPEC).page_size_bytes == 128 * 2


@pytest.mark.parametrize(
    ("options", "multiple", "codes"),
    [
        (MagicPigOptions(index="buckets", L=75), 32, 75),
        (MagicPigOptions(index="signatures"), 128, 0),
        (MagicPigOptions(K=0), 32, 0),
    ],
)
def test_blocks_are_what_the_options_need(
    options: MagicPigOptions, multiple: int, codes: int
) -> None:
    """Signatures are in no page: its tokens are rows alone."""
    for backend in (MagicPigBackend, DevicePageBackend):
        sampled = with_options(backend, options)
        (size,) = sampled.get_supported_kernel_block_sizes()
        assert isinstance(size, MultipleOf)
        assert size.base == multiple
        assert sampled.get_name() == backend.get_name()
        assert sampled.__qualname__ == backend.__qualname__
    in_pages = with_options(MagicPigBackend, options).customize_spec(SPEC)
    assert in_pages.page_size_bytes == SPEC.page_size_bytes + 128 * 8 * 2 * codes


def test_the_dense_layers_choose_the_layout() -> None:
    assert DevicePageBackend.supported_kv_cache_layouts() is None


def test_before_the_pool_exists_a_step_is_none() -> None:
    made = builder(DevicePageBackend.customize_spec(SPEC), config())
    assert made.build(0, None) is None  # type: ignore[arg-type]


def test_blocks_that_another_backend_splits_are_refused_with_the_size_to_take() -> None:
    """vLLM splits a group's blocks when one of its backends takes smaller ones only."""
    with pytest.raises(ValueError, match=r"split into blocks of 64 .* pass --block-size 64"):
        builder(SPEC.copy_with_new_block_size(64), config())
