"""MagicPIG attention for vLLM; see README.md. Importing this package loads neither vLLM nor torch.

The two functions are entry points (pyproject.toml): vLLM calls `register` in every process
(group vllm.general_plugins) and `platform_plugin` when it looks for its platform (group
vllm.platform_plugins).
"""

from __future__ import annotations

import logging
from typing import Any

BACKEND_NAME = "MAGICPIG"
BACKEND_PATH = "vllm_magicpig.backend.MagicPigBackend"

logger = logging.getLogger("vllm.magicpig")


def register() -> Any:
    """Adds MAGICPIG to vLLM's attention backends, once per process; returns the enum member.

    Where magicpig cannot run it returns None, and whoever asks vLLM for the name is told why; with
    any other backend vLLM runs as if magicpig were not installed.
    """
    obstacle = _find_obstacle()
    if obstacle is not None:
        _refuse(obstacle)
        return None
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)
        member = AttentionBackendEnum[BACKEND_NAME]
        # An enum member pickles as EnumClass(value). A spawned child unpickles its configuration
        # before it loads plugins, when that value is unknown there, so this member pickles as the
        # call that registers it. Can go when vLLM loads plugins before it unpickles (not so in 0.33).
        member.__reduce_ex__ = lambda protocol: (_registered, ())
    return AttentionBackendEnum[BACKEND_NAME]


def platform_plugin() -> str | None:
    """Qualified name of our platform class, or None where another platform has to be used."""
    from vllm_magicpig.obstacles import find_obstacle, platform_class

    return platform_class() if find_obstacle() is None else None


def _registered() -> Any:
    """The member in a child process. Raises RuntimeError where magicpig cannot run there."""
    member = register()
    if member is None:
        raise RuntimeError(f"magicpig cannot run in a process of this engine: {_find_obstacle()}")
    return member


def _find_obstacle() -> str | None:
    from vllm_magicpig.obstacles import find_obstacle, other_platform_obstacle

    return find_obstacle() or other_platform_obstacle()


def _refuse(obstacle: str) -> None:
    """Makes vLLM's registry answer with this sentence to whoever asks for magicpig."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        AttentionBackendEnum._member_map_ = _Refusal(AttentionBackendEnum._member_map_, obstacle)
    except (ImportError, AttributeError):  # another vLLM: it refuses a name that it does not know
        logger.warning("Attention backend %s is not available: %s", BACKEND_NAME, obstacle)


class _Refusal(dict[str, Any]):
    """Members of vLLM's registry by name, without magicpig."""

    def __init__(self, members: dict[str, Any], obstacle: str) -> None:
        super().__init__(members)
        self._obstacle = obstacle

    def __missing__(self, name: str) -> Any:
        if name == BACKEND_NAME:
            raise ValueError(f"Attention backend magicpig is not available: {self._obstacle}")
        raise KeyError(name)
