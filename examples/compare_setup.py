"""The two engines of a comparison: model, memory budget and EngineArgs, from the user's settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare_figures import Case

GIB = 1 << 30
DENSE_BACKENDS = {"cpu": "CPU_ATTN", "cuda": "FLASH_ATTN"}
TAKEN_ENGINE_ARGS = (
    "additional_config",
    "attention_backend",
    "disable_log_stats",
    "enable_logging_iteration_details",
    "enable_prefix_caching",
    "gpu_memory_utilization",
    "hf_overrides",
    "kv_cache_memory_bytes",
    "load_format",
    "max_model_len",
    "max_num_seqs",
    "model",
    "skip_tokenizer_init",
    "worker_extension_cls",
)
DEFAULT_KV_CACHE_GIB = 4.0  # on the CPU platform, where vLLM would take a share of all memory

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    # Small enough for two cores, with heads of the usual size: what attention costs depends on them.
    "small": _LLAMA
    | {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "vocab_size": 8192,
    },
    # config.json of meta-llama/Llama-3.1-8B, without its rope scaling, which costs no time.
    "llama-3.1-8b": _LLAMA
    | {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class Device:
    """platform: vLLM's, "cpu" or "cuda"; total_bytes: of the GPU's memory, None on a CPU."""

    platform: str
    name: str
    total_bytes: int | None

    @property
    def dense_backend(self) -> str:
        return DENSE_BACKENDS[self.platform]

    @property
    def description(self) -> str:
        if self.total_bytes is None:
            return self.name
        return f"{self.name}, {self.total_bytes / GIB:.1f} GiB"


@dataclass(frozen=True)
class Settings:
    """What the user asked for. Exactly one of model, config and shape is set."""

    model: str | None
    config: Path | None
    shape: str | None
    layers: int | None
    load_format: str
    prompts: str
    lengths: tuple[int, ...]
    requests: tuple[int, ...]
    output_tokens: int
    repeats: int
    options: dict[str, Any]
    engine_arguments: dict[str, Any]
    gpu_memory_gib: float | None
    kv_cache_gib: float | None
    host_gib: float | None
    output: Path

    @property
    def cases(self) -> list[Case]:
        """Ascending, so that the shorter ones are finished when a run has to be ended early."""
        return [Case(length, requests) for length in self.lengths for requests in self.requests]


def with_budget(settings: Settings, device: Device) -> tuple[Settings, dict[str, Any]]:
    """(settings with magicpig's host_kv_cache_gib, EngineArgs of the memory budget).

    vLLM applies its share to the memory that CUDA reports, which is a little less than the
    device.total_bytes of the driver: a GPU never gets more than --gpu-memory-gib. Raises
    ValueError in one sentence where the platform has no such budget, or not as much.
    """
    if device.platform == "cpu":
        for name, value in (
            ("--gpu-memory-gib", settings.gpu_memory_gib),
            ("--host-gib", settings.host_gib),
        ):
            if value is not None:
                raise ValueError(
                    f"{name} is {value:g}, but vLLM's CPU platform has no GPU beside host memory; "
                    "size the KV cache of both backends with --kv-cache-gib."
                )
        kv_cache_gib = settings.kv_cache_gib or DEFAULT_KV_CACHE_GIB
        return settings, {"kv_cache_memory_bytes": int(kv_cache_gib * GIB)}
    if settings.kv_cache_gib is not None:
        raise ValueError(
            f"--kv-cache-gib is {settings.kv_cache_gib:g}, but belongs to vLLM's CPU platform; on a "
            "GPU say how much memory it shall have with --gpu-memory-gib."
        )
    if settings.host_gib is not None:
        options = settings.options | {"host_kv_cache_gib": settings.host_gib}
        settings = replace(settings, options=options)
    if settings.gpu_memory_gib is None:
        return settings, {}
    assert device.total_bytes is not None
    total_gib = device.total_bytes / GIB
    if settings.gpu_memory_gib > total_gib:
        raise ValueError(
            f"--gpu-memory-gib is {settings.gpu_memory_gib:g}, but {device.name} has "
            f"{total_gib:.1f} GiB; ask for at most that."
        )
    return settings, {"gpu_memory_utilization": settings.gpu_memory_gib / total_gib}


def write_model(settings: Settings, folder: Path) -> str:
    """What vLLM is to load: the name given, or `folder`, which gets a config.json."""
    if settings.model is not None:
        return settings.model
    if settings.config is not None:
        content = settings.config.read_text("utf-8")
    else:
        assert settings.shape is not None
        longest = max(settings.lengths) + settings.output_tokens
        content = json.dumps(SHAPES[settings.shape] | {"max_position_embeddings": longest})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content, "utf-8")
    return str(folder)


def engine_arguments(
    settings: Settings, budget: dict[str, Any], backend: str, model: str, max_model_len: int
) -> dict[str, Any]:
    """vLLM's EngineArgs of one backend; both get the same but for the backend and its options."""
    arguments: dict[str, Any] = {
        "model": model,
        "load_format": settings.load_format,
        "skip_tokenizer_init": True,
        "max_model_len": max_model_len,
        "max_num_seqs": max(settings.requests),
        "enable_prefix_caching": False,
        "attention_backend": backend,
        **budget,
        **settings.engine_arguments,
    }
    if settings.layers is not None:
        arguments["hf_overrides"] = {"num_hidden_layers": settings.layers}
    if backend == "magicpig":
        arguments["additional_config"] = {"magicpig": settings.options}
    return arguments
