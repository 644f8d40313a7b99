"""The key centre of a layer: when it is frozen, and its calibration file.

Softmax does not change when all keys shift by a constant, so any centre is valid; a good one only
lowers the variance of the sample. Key centres are stable across prompts (arXiv 2410.16179, section
4.3), so each (layer, kv head) freezes one for the life of the server. That is what lets requests
share codes and index segments.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

MIN_KEYS = 512
"""Keys of one request needed for a centre: its standard error is then 4 % of the keys' spread."""


class KeyCenter:
    """value: float32 [num_kv_heads, head_size] once frozen, None before."""

    def __init__(
        self, source: str, layer_index: int, first_kv_head: int, num_kv_heads: int
    ) -> None:
        """source: "first_prompt", "none" or a calibration file; the heads are this rank's."""
        self._heads = (first_kv_head, num_kv_heads)
        self._layer_index = layer_index
        self._source = source
        self.value: torch.Tensor | None = None

    @cached_property
    def array(self) -> npt.NDArray[np.float32]:
        """value as the kernels take it; once frozen."""
        assert self.value is not None
        array: npt.NDArray[np.float32] = self.value.numpy()
        return array

    def prepare(self, head_size: int) -> None:
        """Fixes the centres that need no prompt: zeros for "none", those of a file."""
        first, count = self._heads
        if self._source == "first_prompt":
            return
        if self._source == "none":
            self.value = torch.zeros(count, head_size, dtype=torch.float32)
            return
        all_heads = load_centers(self._source).get(self._layer_index)
        if all_heads is None or all_heads.shape[0] < first + count:
            held = "no centre" if all_heads is None else f"{all_heads.shape[0]} kv heads"
            raise ValueError(
                f"calibration file {self._source} has {held} for layer {self._layer_index}, but "
                f"kv heads {first} to {first + count - 1} are needed; write it from this model."
            )
        if all_heads.shape[1] != head_size:
            raise ValueError(
                f"calibration file {self._source} has head size {all_heads.shape[1]}, but the model "
                f"has {head_size}; write it from this model."
            )
        self.value = all_heads[first : first + count].float().contiguous()

    def freeze(self, keys: torch.Tensor) -> None:
        """keys: [num_kv_heads, num_tokens >= MIN_KEYS, head_size] of one real request."""
        assert self.value is None, "a centre is frozen once"
        assert keys.shape[1] >= MIN_KEYS
        self.value = keys.double().mean(dim=1).float()


def save_centers(path: str | Path, centers: dict[int, torch.Tensor]) -> None:
    """Writes a calibration file: layer index -> float32 [num_kv_heads of all ranks, head_size]."""
    tensors = {f"center.{index}": value.contiguous() for index, value in sorted(centers.items())}
    save_file(tensors, str(path), metadata={"format": "vllm-magicpig key centres 1"})


def load_centers(path: str | Path) -> dict[int, torch.Tensor]:
    """Reads what `save_centers` wrote; raises ValueError for any other file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if not names or not all(name.startswith("center.") for name in names):
                raise ValueError(f"holds {names[:3]}")
            return {int(name.removeprefix("center.")): file.get_tensor(name) for name in names}
    except Exception as error:
        raise ValueError(
            f"{path} is no calibration file of magicpig ({error}); write one with "
            "magicpig_save_centers."
        ) from error
