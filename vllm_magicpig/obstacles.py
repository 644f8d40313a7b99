"""Why this vLLM cannot run magicpig, in one sentence each: its version or its platform.

vLLM takes one platform class, and a built-in one ignores a backend that it does not know; 0.32 and
0.33 differ only in how loudly they log a platform plugin that fails.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import EntryPoint, entry_points

from vllm_magicpig.vllm_versions import installed_version, version_obstacle

logger = logging.getLogger("vllm.magicpig")


def find_obstacle() -> str | None:
    """What keeps magicpig from running in this process, None where it can."""
    return version_obstacle(installed_version()) or _selection_obstacle() or _class_obstacle()


def other_platform_obstacle() -> str | None:
    """Why vLLM's current platform is not ours although nothing kept it from being so, else None.

    Makes vLLM decide which platform it runs on.
    """
    from vllm.platforms import current_platform

    from vllm_magicpig.platform_hooks import MagicPigHooks

    if isinstance(current_platform, MagicPigHooks):
        return None
    return (
        f"vLLM runs on {type(current_platform).__name__}, which is not magicpig's platform class; "
        "VLLM_LOGGING_LEVEL=DEBUG shows what decided that."
    )


def platform_class() -> str:
    """Qualified name of our platform class for this build of vLLM."""
    from vllm.platforms import cuda_platform_plugin

    if cuda_platform_plugin() is not None:
        return "vllm_magicpig.cuda_platform.MagicPigCudaPlatform"
    return "vllm_magicpig.platform.MagicPigCpuPlatform"


def _selection_obstacle() -> str | None:
    """Why vLLM would not take our platform class."""
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
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


def _class_obstacle() -> str | None:
    """Whether our class fails to import, which would end vLLM's start with any backend."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    try:
        resolve_obj_by_qualname(platform_class())
    except Exception as error:
        logger.debug("magicpig's platform class failed.", exc_info=True)
        return (
            f"its platform class fails to import ({type(error).__name__}: {error}); reinstall "
            "vllm-magicpig with its dependencies, or vLLM."
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
