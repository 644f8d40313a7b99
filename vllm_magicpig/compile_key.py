"""What vLLM's compile cache has to know of magicpig: its version and its resolved options.

vLLM looks compiled graphs up by a hash of its configuration. A dense layer is compiled to other
operations than a sampled one, and which layers are dense is decided here, from defaults too. vLLM
hashes additional_config, so that is where they go.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from vllm_magicpig.config import COMPILE_KEY, MagicPigOptions


def add_compile_key(vllm_config: Any, options: MagicPigOptions) -> None:
    """Puts the key into additional_config, in place of an earlier one; the user's dict stays as is.

    Raises ValueError for an additional_config of another type, which hashes itself.
    """
    given = vllm_config.additional_config
    if not isinstance(given, dict):
        raise ValueError(
            f"additional_config is of type {type(given).__name__}, but magicpig takes its options from "
            'a dict; pass {"magicpig": {...}}.'
        )
    vllm_config.additional_config = given | {COMPILE_KEY: _key(vllm_config.model_config, options)}


def _key(model: Any, options: MagicPigOptions) -> dict[str, Any]:
    layers = range(0 if model is None else model.get_total_num_hidden_layers())
    dense = [layer for layer in layers if options.is_dense(layer)]
    return {"version": version("vllm-magicpig")} | asdict(options) | {"dense_layers": dense}
