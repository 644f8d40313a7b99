"""What the hooks do with a configuration, over a stub of vLLM's platform."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_magicpig.key_center import save_centers
from vllm_magicpig.metrics import MagicPigCollector
from vllm_magicpig.platform_hooks import MagicPigHooks


class VllmPlatform:
    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        pass

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        vllm_config.cache_config.block_size = 64


class Platform(MagicPigHooks, VllmPlatform):
    platform_worker = "worker"
    magicpig_worker = "magicpig worker"


def config(center: str, backend: str = "MAGICPIG") -> Any:
    """Of a model of 3 layers and 2 kv heads."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(
            backend=SimpleNamespace(name=backend), backend_per_kind={}
        ),
        additional_config={"magicpig": {"center": center}},
        speculative_config=None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(
            cache_dtype="auto", block_size=16, user_specified_block_size=False
        ),
        parallel_config=SimpleNamespace(
            worker_cls="worker", decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=None),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            is_encoder_decoder=False,
            get_total_num_hidden_layers=lambda: 3,
            get_total_num_kv_heads=lambda: 2,
        ),
    )


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> MagicPigCollector:
    collector = MagicPigCollector()
    monkeypatch.setattr("vllm_magicpig.metrics._registered_collector", lambda: collector)
    return collector


def test_a_calibration_file_of_another_model_ends_the_start(
    tmp_path: Path, collector: MagicPigCollector
) -> None:
    path = tmp_path / "centers"
    save_centers(path, {1: torch.zeros(2, 8)}, {"num_layers": "3"})
    Platform.check_and_update_config(config(str(path)))
    save_centers(path, {1: torch.zeros(2, 8)}, {"num_layers": "32"})
    with pytest.raises(ValueError, match="has a model of 32 layers, but the model has 3; write"):
        Platform.check_and_update_config(config(str(path)))
    Platform.check_and_update_config(config(str(path), backend="CPU_ATTN"))


def test_only_an_engine_with_magicpig_is_shown_at_metrics(collector: MagicPigCollector) -> None:
    Platform.check_and_update_config(config("none", backend="CPU_ATTN"))
    assert collector.vllm_config is None
    chosen = config("none")
    Platform.check_and_update_config(chosen)
    assert collector.vllm_config is chosen


def block_size_after(chosen: Any) -> int:
    Platform.check_and_update_config(chosen)
    Platform.update_block_size_for_backend(chosen)
    size: int = chosen.cache_config.block_size
    return size


def test_blocks_of_128_tokens_unless_the_user_says_otherwise(collector: MagicPigCollector) -> None:
    """vLLM 0.32's CPU platform has set 128 by then, 0.33's leaves its own 16 until the layers exist."""
    assert block_size_after(config("none")) == 128
    chosen = config("none")
    chosen.cache_config.block_size, chosen.cache_config.user_specified_block_size = 32, True
    assert block_size_after(chosen) == 32
    chosen.cache_config.block_size = 48
    with pytest.raises(
        ValueError, match="does not support block size 48, it supports multiples of"
    ):
        block_size_after(chosen)
    assert block_size_after(config("none", backend="CPU_ATTN")) == 64


def test_a_kind_of_layer_alone_cannot_have_magicpig(collector: MagicPigCollector) -> None:
    """Its layers would be without the worker that gives them pages."""
    chosen = config("none", backend="CPU_ATTN")
    chosen.attention_config.backend_per_kind = {"full_attention": SimpleNamespace(name="MAGICPIG")}
    with pytest.raises(
        ValueError, match="chosen in backend_per_kind, but it has to be the backend"
    ):
        Platform.check_and_update_config(chosen)
