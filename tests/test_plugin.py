"""Registration, in fresh processes as vLLM makes them; no engine is started."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import AttentionConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_magicpig
from vllm_magicpig import obstacles

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="about vLLM's CPU build, and this is a CUDA build"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a folder of its own: a process started in the repository's root could import any folder of
    it, triton_kernels/ too, and would never do so where it is installed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=env | environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )


def output(code: str, **environment: str) -> str:
    result = run(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_loads_neither_vllm_nor_torch() -> None:
    code = "import sys, vllm_magicpig; print(sorted({'vllm', 'torch'} & set(sys.modules)))"
    assert output(code) == "[]"


def test_no_top_level_triton_kernels_is_exposed() -> None:
    """vLLM would take it for OpenAI's package of that name."""
    code = (
        "import importlib.util as u;"
        "print(u.find_spec('triton_kernels'), bool(u.find_spec('vllm_magicpig.triton_kernels')))"
    )
    assert output(code) == "None True"


def test_registering_twice_gives_one_member_with_the_backends_name() -> None:
    code = (
        "import vllm_magicpig as m; a = m.register(); b = m.register();"
        "print(a is b, a.name, a.get_class().get_name())"
    )
    assert output(code).splitlines()[-1] == "True MAGICPIG MAGICPIG"


@pytest.mark.parametrize("name", ["magicpig", "MAGICPIG", "MagicPig"])
def test_any_case_selects_it(name: str) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    backend = AttentionConfig(backend=name).backend  # type: ignore[arg-type]
    assert backend is not None
    assert backend.name == "MAGICPIG"


def test_the_member_unpickles_before_plugins_are_loaded() -> None:
    """A spawned child reads its configuration first."""
    dump = "import pickle, vllm_magicpig as m; print(pickle.dumps(m.register()).hex())"
    pickled = output(dump).splitlines()[-1]
    load = f"import pickle; print(pickle.loads(bytes.fromhex({pickled!r})).name)"
    assert output(load).splitlines()[-1] == "MAGICPIG"


def test_where_vllm_skips_platform_plugins_asking_for_it_is_refused_rather_than_ignored() -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.config import AttentionConfig; print(AttentionConfig(backend='cpu_attn').backend);"
        "AttentionConfig(backend='magicpig')"
    )
    result = run(code, VLLM_TARGET_DEVICE="CPU")  # vLLM takes any case
    assert result.returncode != 0
    assert result.stdout.splitlines()[-1] == "AttentionBackendEnum.CPU_ATTN"
    assert "magicpig is not available: VLLM_TARGET_DEVICE=cpu makes vLLM skip" in result.stderr


@pytest.fixture
def new_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's backends as a new process finds them."""
    members = {
        name: m for name, m in AttentionBackendEnum.__members__.items() if name != "MAGICPIG"
    }
    monkeypatch.setattr(AttentionBackendEnum, "_member_map_", members)


def assert_refused(sentence: str) -> None:
    """magicpig is, where it is asked for, and other names are not."""
    assert vllm_magicpig.register() is None
    assert vllm_magicpig.register() is None
    with pytest.raises(ValueError) as caught:
        AttentionConfig(backend="magicpig")  # type: ignore[arg-type]
    assert f"Attention backend magicpig is not available: {sentence}" in str(caught.value)
    assert AttentionConfig(backend="CPU_ATTN").backend == AttentionBackendEnum.CPU_ATTN  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown attention backend: 'MAGICPIGS'"):
        AttentionConfig(backend="magicpigs")  # type: ignore[arg-type]


@pytest.mark.usefixtures("new_registry")
def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    assert vllm_magicpig.platform_plugin() is None
    assert_refused(
        "vLLM's version is 0.34.0, but vllm-magicpig supports releases of 0.32 and 0.33;"
    )


@pytest.mark.usefixtures("new_registry")
def test_a_platform_class_that_fails_to_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would import it whatever the backend, and end there."""
    monkeypatch.setitem(sys.modules, "vllm_magicpig.platform", None)
    assert vllm_magicpig.platform_plugin() is None
    assert_refused("its platform class fails to import (ModuleNotFoundError: ")


@pytest.mark.usefixtures("new_registry")
def test_a_platform_that_is_not_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: vLLM 0.32 logs a platform plugin that fails at DEBUG only."""
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr("vllm.platforms._current_platform", CpuPlatform())
    assert_refused("vLLM runs on CpuPlatform, which is not magicpig's platform class;")


@pytest.mark.usefixtures("new_registry")
@pytest.mark.parametrize("fails", [False, True])
def test_another_platform_plugin_has_the_platform_unless_it_fails(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Entry:
        name = "other"

        def load(self) -> Any:
            if fails:
                raise ImportError("no driver")
            return lambda: "other.Platform"

    monkeypatch.setattr(obstacles, "entry_points", lambda group: [Entry()])
    offered = vllm_magicpig.platform_plugin()
    if fails:  # vLLM goes on without it, 0.33 with a warning
        assert offered == "vllm_magicpig.platform.MagicPigCpuPlatform"
    else:
        assert offered is None
        assert_refused("the platform plugin 'other' is active and vLLM takes only one;")


def test_a_vllm_with_another_registry_is_told_in_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It cannot know the name, so it refuses magicpig itself; other backends must go on."""
    warnings: list[str] = []
    monkeypatch.setattr("vllm.__version__", "0.50.0")
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    monkeypatch.setattr(
        vllm_magicpig.logger, "warning", lambda text, *values: warnings.append(text % values)
    )
    assert vllm_magicpig.register() is None
    (warning,) = warnings
    assert warning.startswith(
        "Attention backend MAGICPIG is not available: vLLM's version is 0.50.0"
    )


def test_a_child_process_that_cannot_run_it_ends_rather_than_take_another_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pickled = pickle.dumps(vllm_magicpig.register())
    members = dict(AttentionBackendEnum.__members__)
    monkeypatch.setattr(AttentionBackendEnum, "_member_map_", members)
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    with pytest.raises(RuntimeError, match="cannot run in a process of this engine: VLLM_TARGET"):
        pickle.loads(pickled)


def configure(model: str, **arguments: Any) -> tuple[str, str]:
    """The backend class that vLLM selects for an ordinary layer, and its whole configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.selector import get_attn_backend

    config = EngineArgs(model=model, skip_tokenizer_init=True, **arguments).create_engine_config()
    with set_current_vllm_config(config):
        backend = get_attn_backend(64, torch.bfloat16, "auto", num_heads=4)
    config.instance_id = ""  # random
    return backend.__name__, f"{config.parallel_config.worker_cls} {config!r}"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tiny")
    LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_with_another_backend_an_installed_plugin_changes_nothing(tiny_model: str) -> None:
    """The whole configuration, worker and backend, with the plugin loaded and with it switched off."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_plugin import configure\n"
        f"print(configure({tiny_model!r}), configure({tiny_model!r}, attention_backend='CPU_ATTN'))"
    )
    with_plugin, without = (output(code, **env) for env in ({}, {"VLLM_PLUGINS": ""}))
    assert with_plugin.splitlines()[-1] == without.splitlines()[-1]
    assert (
        without.splitlines()[-1].count("('CPUAttentionBackend', 'vllm.v1.worker.cpu_worker.") == 2
    )


def test_choosing_it_changes_worker_and_backend(tiny_model: str) -> None:
    backend, configuration = configure(tiny_model, attention_backend="magicpig")
    assert backend == "MagicPigBackend"
    assert configuration.startswith("vllm_magicpig.cpu_worker.MagicPigCPUWorker ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"additional_config": {"magicpig": {"K": 99}}},
            "magicpig option K is 99, but must be 0 for exact attention or 2 to 15 bits per table;",
        ),
        (
            {"additional_config": {"magicpig": {"host_kv_cache_gib": 8}}},
            "magicpig option host_kv_cache_gib is 8.0, but it sizes the pinned pool",
        ),
        ({"kv_cache_dtype": "fp8"}, "magicpig does not support KV cache dtype fp8"),
        ({"block_size": 16}, "magicpig does not support block size 16"),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "magicpig"}}},
            "magicpig is chosen in backend_per_kind, but it has to be the backend of the whole model",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "magicpig does not support speculative decoding (ngram)",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_at_start_up(
    tiny_model: str, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        configure(tiny_model, attention_backend="magicpig", **arguments)
    assert sentence in str(caught.value)


def test_the_extension_links_neither_torch_nor_openmp_nor_cuda() -> None:
    from vllm_magicpig import _C

    assert _C.__file__ is not None
    needed = subprocess.run(
        ["readelf", "-d", str(Path(_C.__file__))], check=True, capture_output=True, text=True
    ).stdout
    libraries = [line for line in needed.splitlines() if "NEEDED" in line]
    assert libraries
    assert not [x for x in libraries if any(n in x for n in ("torch", "omp", "cuda", "c10"))]
