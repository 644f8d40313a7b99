"""SimHash on the host: one GEMM with the layer's hyperplanes, signs packed natively."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_magicpig import _C, reference
from vllm_magicpig.config import MagicPigOptions

_ROWS_PER_GEMM = 2048
"""Bounds the projections held at once: 12 MB at K = 10, L = 150."""

_LAYER_SEED_STRIDE = 1_000_003
"""Spreads the layers' seeds, so that no two of a model's layers share hyperplanes."""


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
        self._word_bits, self._code_words = options.word_bits, options.code_words
        seed = (options.seed + layer_index * _LAYER_SEED_STRIDE) % (1 << 63)
        self.directions = reference.hyperplanes(head_size, options.L, options.K, seed)
        self._isa, self._pool = isa, pool

    def hash_keys(self, keys: torch.Tensor, center: torch.Tensor) -> npt.NDArray[np.uint16]:
        """keys: [num_tokens, num_kv_heads, head_size]; center: float32 [num_kv_heads, head_size].

        Returns uint16 [num_tokens, num_kv_heads, code_words]. Centre first: uncentred keys crowd one
        bucket.
        """
        num_tokens, num_kv_heads, _ = keys.shape
        codes = np.empty((num_tokens, num_kv_heads, self._code_words), dtype=np.uint16)
        tokens_per_gemm = max(1, _ROWS_PER_GEMM // num_kv_heads)
        for start in range(0, num_tokens, tokens_per_gemm):
            stop = min(start + tokens_per_gemm, num_tokens)
            codes[start:stop] = self._hash(keys[start:stop].float() - center)
        return codes

    def hash_queries(self, queries: torch.Tensor) -> npt.NDArray[np.uint16]:
        """queries: float32 [num_reqs, num_q_heads, head_size] -> uint16 [num_reqs, num_q_heads,
        code_words].

        Queries are not centred: shifting all keys leaves softmax unchanged, shifting queries does
        not (arXiv 2410.16179, section 4.3).
        """
        return self._hash(queries)

    def _hash(self, vectors: torch.Tensor) -> npt.NDArray[np.uint16]:
        projections = vectors.reshape(-1, vectors.shape[-1]) @ self.directions
        codes = _C.pack_codes(projections.numpy(), self._word_bits, self._isa, self._pool)
        return codes.reshape(*vectors.shape[:-1], self._code_words)
