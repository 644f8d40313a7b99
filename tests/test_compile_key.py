"""vLLM looks its compiled graphs up by a hash that has to change with magicpig and its options."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_magicpig import compile_key, config
from vllm_magicpig.compile_key import COMPILE_KEY, add_compile_key
from vllm_magicpig.config import MagicPigOptions, parse_options


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=20,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def configure(model: Path, **arguments: Any) -> VllmConfig:
    return EngineArgs(
        model=str(model), skip_tokenizer_init=True, **{"attention_backend": "magicpig"} | arguments
    ).create_engine_config()


def test_the_hash_changes_with_the_version_and_with_a_default(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = configure(model).compute_hash()
    assert configure(model).compute_hash() == before
    with monkeypatch.context() as patch:
        patch.setattr(compile_key, "version", lambda name: "99.0")
        assert configure(model).compute_hash() != before
    with monkeypatch.context() as patch:
        patch.setattr(config, "DENSE_LAYER_STRIDE", 8)
        assert configure(model).compute_hash() != before
    assert configure(model).compute_hash() == before


def test_with_another_backend_it_is_vllms_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = configure(model, attention_backend="CPU_ATTN")
    assert chosen.additional_config == {}
    before = chosen.compute_hash()
    monkeypatch.setattr(compile_key, "version", lambda name: "99.0")
    assert configure(model, attention_backend="CPU_ATTN").compute_hash() == before


def test_the_key_is_the_version_and_the_resolved_options(model: Path) -> None:
    given = {"magicpig": {"index": "signatures", "bits": 1}, "other": 1}
    kept = copy.deepcopy(given)
    chosen = configure(model, additional_config=given)
    assert given == kept, "the dict is the user's"
    key = chosen.additional_config[COMPILE_KEY]  # type: ignore[index]
    assert key["dense_layers"] == [0, 16]
    assert (key["index"], key["bits"], key["row_budget"]) == ("signatures", 1, 0.02)
    assert key["version"] == compile_key.version("vllm-magicpig")
    assert chosen.additional_config == kept | {COMPILE_KEY: key}
    assert parse_options(chosen.additional_config) == parse_options(given)


def test_a_second_pass_changes_nothing(model: Path) -> None:
    """vLLM's EngineCore checks the configuration that it is handed again."""
    chosen = configure(model, additional_config={"magicpig": {"dense_layers": [1]}})
    once, hashed = copy.deepcopy(chosen.additional_config), chosen.compute_hash()
    current_platform.check_and_update_config(chosen)
    assert chosen.additional_config == once
    assert chosen.compute_hash() == hashed


def test_an_additional_config_that_hashes_itself_is_refused() -> None:
    chosen = SimpleNamespace(additional_config=object(), model_config=None)
    with pytest.raises(
        ValueError, match="additional_config is of type object, but magicpig takes its"
    ):
        add_compile_key(chosen, MagicPigOptions())
