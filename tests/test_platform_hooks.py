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
        additional_config={"magicpig": {"index": "buckets", "center": center}},
        speculative_config=None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            block_size=16,
            user_specified_block_size=False,
            kv_offloading_size=None,
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
            is_diffusion=False,
            runner_type="generate",
            attention_chunk_size=None,
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


@pytest.mark.parametrize(
    ("dense_layers", "sentence"),
    [
        ([99], r"dense_layers \[99\] of a model of 3 layers, .* indices from 0 to 2; correct it"),
        ([0, 3, 4], r"dense_layers \[3, 4\] of a model of 3 layers"),
        (
            [0, 1, 2],
            r"a model whose 3 attention layers are all dense \(0 of them .* pass \"dense_layers",
        ),
    ],
)
def test_dense_layers_are_layers_of_the_model_and_leave_some_to_sample(
    collector: MagicPigCollector, dense_layers: list[int], sentence: str
) -> None:
    chosen = config("none")
    chosen.additional_config["magicpig"]["dense_layers"] = dense_layers
    with pytest.raises(ValueError, match=sentence):
        Platform.check_and_update_config(chosen)
    chosen.additional_config["magicpig"]["dense_layers"] = [0, 2]
    Platform.check_and_update_config(chosen)


def test_a_model_of_one_layer_has_none_to_sample_by_default(collector: MagicPigCollector) -> None:
    chosen = config("none")
    chosen.model_config.get_total_num_hidden_layers = lambda: 1
    with pytest.raises(ValueError, match=r"whose 1 attention layers are all dense"):
        Platform.check_and_update_config(chosen)


def test_a_worker_class_without_magicpig_ends_the_start(collector: MagicPigCollector) -> None:
    """Its layers would never get pages, and answer with zeros."""
    chosen = config("none")
    chosen.parallel_config.worker_cls = "vllm.v1.worker.worker_base.WorkerBase"
    with pytest.raises(ValueError, match=r"worker class vllm\.v1\.worker\.worker_base\.WorkerBase"):
        Platform.check_and_update_config(chosen)
    chosen.parallel_config.worker_cls = "fake_device_worker.FakeDeviceWorker"
    Platform.check_and_update_config(chosen)
    assert chosen.parallel_config.worker_cls == "fake_device_worker.FakeDeviceWorker"


def test_other_backends_for_some_kinds_end_the_start(collector: MagicPigCollector) -> None:
    chosen = config("none")
    chosen.attention_config.backend_per_kind = {
        "sliding_window": SimpleNamespace(name="FLASH_ATTN")
    }
    with pytest.raises(ValueError, match=r"names other backends for sliding_window, .* drop"):
        Platform.check_and_update_config(chosen)


def test_options_without_the_backend_are_said_to_do_nothing(
    collector: MagicPigCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("vllm_magicpig.platform_hooks.logger.warning", said.append)
    chosen = config("none", backend="CPU_ATTN")
    Platform.check_and_update_config(chosen)
    assert len(said) == 1
    assert "pass --attention-backend magicpig" in said[0]
    chosen.additional_config = {"another": {}}
    Platform.check_and_update_config(chosen)
    Platform.check_and_update_config(config("none"))
    assert len(said) == 1
