"""SimHash on the host, by Walsh-Hadamard transforms."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vllm_magicpig import _C, reference
from vllm_magicpig.config import MagicPigOptions

_TOKENS_AT_ONCE = 1024
"""Bounds the float32 copies of keys that are held."""


class Projection:
    """The hyperplanes of one layer, the same on every rank and after every restart."""

    def __init__(
        self,
        options: MagicPigOptions,
        layer_index: int,
        head_size: int,
        isa: _C.Isa,
        pool: _C.ThreadPool,
    ) -> None:
        seed = reference.layer_seed(options.seed, layer_index)
        self._hyperplanes = (head_size, options.L, options.K, seed)
        signs = reference.hadamard_signs(*self._hyperplanes)
        self.native = _C.SimHash(signs.numpy(), head_size, options.K, options.L)
        self._num_tables = options.num_tables
        self._isa, self._pool = isa, pool

    @cached_property
    def directions(self) -> torch.Tensor:
        """The same hyperplanes as a matrix, float32 [head_size, L * K]: what a device multiplies by."""
        return reference.hyperplanes(*self._hyperplanes)

    def hash_keys(self, keys: torch.Tensor, center: torch.Tensor) -> npt.NDArray[np.uint16]:
        """keys: [num_tokens, num_kv_heads, head_size]; center: float32 [num_kv_heads, head_size].

        Returns uint16 [num_tokens, num_kv_heads, num_tables]. Centre first: uncentred keys crowd one
        bucket.
        """
        num_tokens, num_kv_heads, _ = keys.shape
        codes = np.empty((num_tokens, num_kv_heads, self._num_tables), dtype=np.uint16)
        for start in range(0, num_tokens, _TOKENS_AT_ONCE):
            some = keys[start : start + _TOKENS_AT_ONCE].float().contiguous().numpy()
            codes[start : start + len(some)] = self.native.hash(
                some, center.numpy(), self._isa, self._pool
            )
        return codes

    def hash_queries(self, queries: torch.Tensor) -> npt.NDArray[np.uint16]:
        """queries: float32 [num_reqs, num_q_heads, head_size] -> uint16 [num_reqs, num_q_heads,
        num_tables].

        Queries are not centred: shifting all keys leaves softmax unchanged, shifting queries does
        not (arXiv 2410.16179, section 4.3).
        """
        return self.native.hash(queries.contiguous().numpy(), None, self._isa, self._pool)
