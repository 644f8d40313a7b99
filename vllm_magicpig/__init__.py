"""MagicPIG attention for vLLM; see README.md. Importing this package loads neither vLLM nor torch.

The two functions are entry points (pyproject.toml): vLLM calls `register` in every process
(group vllm.general_plugins) and `platform_plugin` when it looks for its platform (group
vllm.platform_plugins).
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import EntryPoint, entry_points
from typing import Any

BACKEND_NAME = "MAGICPIG"
BACKEND_PATH = "vllm_magicpig.backend.MagicPigBackend"

logger = logging.getLogger("vllm.magicpig")


def register() -> Any:
    """Adds MAGICPIG to vLLM's attention backends, once per process; returns the enum member.

    Returns None, and leaves the name unknown to vLLM, where our platform class cannot be the
    current one: vLLM would otherwise quietly run another backend in its place.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[BACKEND_NAME]
    obstacle = _platform_obstacle()
    if obstacle is not None:
        logger.warning("Attention backend %s is not available: %s", BACKEND_NAME, obstacle)
        return None
    register_backend(BACKEND_NAME, BACKEND_PATH)
    member = AttentionBackendEnum[BACKEND_NAME]
    # An enum member pickles as EnumClass(value). A spawned child unpickles its configuration
    # before it loads plugins, when that value is unknown there, so this member pickles as the call
    # that registers it. Can go when vLLM loads plugins before it unpickles (not so in 0.33).
    member.__reduce_ex__ = lambda protocol: (register, ())
    return member


def platform_plugin() -> str | None:
    """Qualified name of our platform class, or None where another platform has to be used."""
    from vllm.platforms import cuda_platform_plugin

    if _platform_obstacle() is not None:
        return None
    if cuda_platform_plugin() is not None:
        return "vllm_magicpig.cuda_platform.MagicPigCudaPlatform"
    return "vllm_magicpig.platform.MagicPigCpuPlatform"


def _platform_obstacle() -> str | None:
    """Why our platform class cannot be vLLM's current one, or None when it can."""
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return (
            "VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins; unset it, a CPU build of vLLM "
            "needs no such setting."
        )
    others = [
        entry.name
        for entry in entry_points(group="vllm.platform_plugins")
        if entry.name != "magicpig" and _is_allowed(entry.name) and _is_active(entry)
    ]
    if others:
        return (
            f"the platform plugin {others[0]!r} is active and vLLM takes only one; uninstall it or "
            "name the ones to load in VLLM_PLUGINS."
        )
    if cpu_platform_plugin() is None and cuda_platform_plugin() is None:
        return (
            "vllm-magicpig runs on vLLM's CUDA and CPU platforms and this is neither; install one of "
            "those builds of vLLM, and see that its driver runs."
        )
    return None


def _is_active(platform_plugin: EntryPoint) -> bool:
    """Whether another platform plugin offers its class; one that fails does not, as in vLLM."""
    try:
        return platform_plugin.load()() is not None
    except Exception:
        logger.debug("Platform plugin %s failed.", platform_plugin.name, exc_info=True)
        return False


def _is_allowed(plugin_name: str) -> bool:
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or plugin_name in allowed.split(",")
