"""Signatures of one layer, made once per block of keys and kept, and the lists of its decode steps."""

from __future__ import annotations

import torch

from vllm_magicpig import signature_reference
from vllm_magicpig.reference import layer_seed
from vllm_magicpig.signature_reference import BLOCK_TOKENS, Signatures


class KeySignatures:
    """Of all full blocks seen so far, under the rotation that the layer's seed gives."""

    def __init__(self, bits: int, seed: int, layer_index: int) -> None:
        self._bits, self._seed, self._layer_index = bits, seed, layer_index
        self._rotation = torch.empty(0)
        self._of_kv_head: list[Signatures] = []

    def reset(self) -> None:
        """Forgets the keys, for another prompt."""
        self._of_kv_head = []

    def extend(self, keys: torch.Tensor) -> None:
        """keys: float [num_kv_heads, n, head_size], all of the sequence."""
        full = keys.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS
        known = len(self._of_kv_head[0].factors) if self._of_kv_head else 0
        if full <= known:
            return
        seed = layer_seed(self._seed, self._layer_index)
        self._rotation = signature_reference.rotation(keys.shape[2], seed).to(keys)
        fresh = [
            signature_reference.encode(head, self._rotation, self._bits)
            for head in keys[:, known:full]
        ]
        if self._of_kv_head:
            fresh = [_joined(*pair) for pair in zip(self._of_kv_head, fresh, strict=True)]
        self._of_kv_head = fresh

    def log_shares(
        self, kv_head: int, queries: torch.Tensor, middle: range, log_static: torch.Tensor
    ) -> torch.Tensor:
        """Predicted log shares of the softmax: float [g, m]. queries: [g, head_size], scaled;
        log_static: [g], log of the sum of exp over what is always attended."""
        inside = slice(middle.start, middle.stop)
        signatures = self._of_kv_head[kv_head]
        base, residual = signature_reference.scores(queries, signatures, self._rotation)
        base, residual = base[:, inside], residual[:, inside]
        b = signature_reference.shrink(queries, residual, signatures.error_variances[inside])
        return signature_reference.shares(base + b[:, None] * residual, log_static)

    def listed(self, kv_head: int, position: int, pi: torch.Tensor) -> torch.Tensor:
        """The step's list, bool [m]; position: of its query."""
        seed = self._seed
        word = signature_reference.step_word(seed, self._layer_index, kv_head, position)
        return signature_reference.systematic(pi, word / 2**64)


def _joined(old: Signatures, new: Signatures) -> Signatures:
    return Signatures(
        torch.cat([old.means, new.means]),
        torch.cat([old.codes, new.codes]),
        torch.cat([old.factors, new.factors]),
        torch.cat([old.error_variances, new.error_variances]),
    )
