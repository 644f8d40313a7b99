"""The key centre of a layer: where it comes from, and its calibration file.

Softmax does not change when all keys shift by a constant, so any centre is valid; a good one only
lowers the variance of the sample. Key centres are stable across prompts (arXiv 2410.16179, section
4.3), so each (layer, kv head) has one for the life of the server. That is what lets requests share
codes and index segments. No request ever changes it: what one is answered does not depend on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file


class KeyCenter:
    """value: float32 [num_kv_heads, head_size] once fixed, None before."""

    def __init__(
        self, source: str, layer_index: int, first_kv_head: int, num_kv_heads: int
    ) -> None:
        """source: "passage", "none" or a calibration file; the heads are this rank's."""
        self._heads = (first_kv_head, num_kv_heads)
        self._layer_index = layer_index
        self._source = source
        self._sum: torch.Tensor | None = None
        self._count = 0
        self.value: torch.Tensor | None = None

    @cached_property
    def array(self) -> npt.NDArray[np.float32]:
        """value as the kernels take it; once fixed."""
        assert self.value is not None
        array: npt.NDArray[np.float32] = self.value.numpy()
        return array

    @property
    def is_nonzero(self) -> bool:
        return self.value is not None and bool(self.value.any())

    def prepare(self, head_size: int) -> None:
        """Fixes the centres that need no keys: zeros for "none", those of a file."""
        first, count = self._heads
        if self._source == "passage":
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

    def observe(self, keys: torch.Tensor) -> None:
        """Adds keys to the mean, without waiting for their device.

        keys: [num_tokens, num_kv_heads, head_size], of the passage that the worker runs at start-up.
        """
        assert self.value is None, "a centre is fixed once"
        total = keys.sum(dim=0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += keys.shape[0]

    def fix(self, head_size: int) -> bool:
        """Takes the mean of all observed keys; zeros, and False, where there is no finite one."""
        assert self.value is None, "a centre is fixed once"
        mean = None if self._sum is None else (self._sum / self._count).float().cpu()
        self._sum = None
        is_finite = mean is not None and bool(mean.isfinite().all())
        if mean is None or not is_finite:
            mean = torch.zeros(self._heads[1], head_size)
        self.value = mean.contiguous()
        return is_finite


def save_centers(
    path: str | Path, centers: Mapping[int, torch.Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Writes a calibration file: layer index -> float32 [num_kv_heads of all ranks, head_size].

    about: what else to say of it, such as the num_layers of its model, which `check_centers` compares.
    """
    tensors = {f"center.{index}": value.contiguous() for index, value in sorted(centers.items())}
    metadata = {"format": "vllm-magicpig key centres 1", **(about or {})}
    save_file(tensors, str(path), metadata=metadata)


def check_centers(path: str | Path, num_layers: int, num_kv_heads: int) -> None:
    """Raises ValueError where a calibration file is of another model.

    num_layers, num_kv_heads: of the model, all ranks together. A file that does not say how many layers
    its model had (`magicpig_save_centers`) is judged by those it holds.
    """
    centers = load_centers(path)
    with safe_open(str(path), framework="pt") as file:
        held_layers = (file.metadata() or {}).get("num_layers")
    held_heads = next(iter(centers.values())).shape[0]
    if held_layers is not None and held_layers != str(num_layers):
        differs = f"a model of {held_layers} layers", f"{num_layers}"
    elif max(centers) >= num_layers:
        differs = f"a centre for layer {max(centers)}", f"layers 0 to {num_layers - 1}"
    elif held_heads != num_kv_heads:
        differs = f"{held_heads} kv heads", f"{num_kv_heads}"
    else:
        return
    raise ValueError(
        f"calibration file {path} has {differs[0]}, but the model has {differs[1]}; write it from this "
        "model."
    )


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
            "`vllm-magicpig tune`."
        ) from error
