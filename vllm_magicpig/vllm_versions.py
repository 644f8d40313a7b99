"""The vLLM releases that magicpig runs on, and where they differ in what magicpig uses.

The hooks were read in RELEASES and are checked against their sources (`make vllm-contract`). Whoever
needs a name that moved between them asks here. This module loads no part of vLLM until then.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from packaging.version import InvalidVersion, Version

RELEASES = ("0.32.0", "0.33.0")
SUPPORTED = tuple(Version(release).release[:2] for release in RELEASES)
"""Minor versions: (0, 32), (0, 33). The extras of pyproject.toml ask for the same ones."""


def installed_version() -> str:
    """vLLM's own word: its CPU build has another distribution name, so metadata does not tell."""
    return str(getattr(import_module("vllm"), "__version__", "unknown"))


def version_obstacle(found: str) -> str | None:
    """Why magicpig does not run on this version of vLLM, None where it does.

    Patch releases, release candidates and local builds (0.33.0+cpu) have the hooks of their minor
    version. A development build may have those of any: its number only says which release it follows.
    """
    allowed = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    try:
        version = Version(found)
        if version.release[:2] in SUPPORTED and not version.is_devrelease:
            return None
    except InvalidVersion:
        pass
    return (
        f"vLLM's version is {found}, but vllm-magicpig supports releases of {allowed}; install one of "
        "them or choose another --attention-backend."
    )


def kv_cache_planner() -> ModuleType:
    """The module of get_kv_cache_groups and get_kv_cache_config_from_groups."""
    moved = Version(installed_version()).release >= (0, 33)
    return import_module(f"vllm.v1.core.{'kv_cache_planning' if moved else 'kv_cache_utils'}")
