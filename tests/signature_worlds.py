"""Heads to test signatures on: keys lean on a common direction, drift along the text, vary in norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_magicpig import signature_reference as reference

SINK, WINDOW = 4, 64


@dataclass(frozen=True)
class World:
    """One kv head in float64; queries are scaled. middle: what is sampled of the n tokens."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    middle: range

    @property
    def inside(self) -> slice:
        return slice(self.middle.start, self.middle.stop)

    @property
    def logits(self) -> torch.Tensor:
        return self.queries @ self.keys.T

    @property
    def static_logits(self) -> torch.Tensor:
        return torch.cat(
            [self.logits[:, : self.middle.start], self.logits[:, self.middle.stop :]], 1
        )

    @property
    def exact(self) -> torch.Tensor:
        return self.logits.softmax(1) @ self.values

    def encoded(self, bits: int = 2, seed: int = 0) -> tuple[reference.Signatures, torch.Tensor]:
        """(signatures of all full blocks, R)."""
        R = reference.rotation(self.keys.shape[1], seed)
        full = len(self.keys) // reference.BLOCK_TOKENS * reference.BLOCK_TOKENS
        return reference.encode(self.keys[:full], R, bits), R

    def log_shares(self, bits: int = 2, seed: int = 0) -> torch.Tensor:
        signatures, R = self.encoded(bits, seed)
        base, residual = (
            part[:, self.inside] for part in reference.scores(self.queries, signatures, R)
        )
        b = reference.shrink(self.queries, residual, signatures.error_variances[self.inside])
        return reference.shares(base + b[:, None] * residual, self.static_logits.logsumexp(1))

    def attend(self, pi: torch.Tensor, listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, error bar) over the list and what is always attended."""
        chances = torch.ones(len(self.keys), dtype=torch.float64)
        chances[self.inside] = torch.where(listed, pi, 0.0)
        read = chances > 0
        logits, values, chances = self.logits[:, read], self.values[read], chances[read]
        out, lse = reference.estimate(logits, values, chances)
        return out, reference.error_bar(logits, values, chances, out, lse)


def world(
    num_tokens: int = 1500,
    head_size: int = 64,
    group: int = 4,
    gain: float = 2.0,
    mean_value: float = 0.5,
    seed: int = 0,
) -> World:
    """gain: of the queries, about the standard deviation of their logits in nats; mean_value: of each
    dimension, whose standard deviation is 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = 3 * normal(head_size)
    drift = normal(-(-num_tokens // 50), head_size).repeat_interleave(50, 0)[:num_tokens]
    keys = normal(num_tokens, head_size) * torch.exp(0.2 * normal(num_tokens, 1))
    keys = common + 0.7 * drift + keys
    queries = normal(group, head_size) + 0.3 * normal(head_size)
    queries = gain * queries / queries.norm(dim=1, keepdim=True)
    values = normal(num_tokens, head_size) + mean_value
    return World(queries, keys, values, reference.middle(num_tokens, SINK, WINDOW))


def dominated(num_tokens: int, cosine: float, gain: float, seed: int) -> World:
    """128 dimensions, one query. Token n / 3 has this centred cosine to it, all others those of chance;
    gain: the query's product with a centred key along it. It leans on the common direction as well."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_tokens + 3, 128, generator=generator, dtype=torch.float64)
    common, toward, across = noise[0], noise[1] / noise[1].norm(), noise[2]
    keys = 3 * common + noise[3:]
    across -= (across @ toward) * toward
    residual = cosine * toward + math.sqrt(1 - cosine**2) * across / across.norm()
    keys[num_tokens // 3] = 3 * common + math.sqrt(128) * residual
    query = gain / math.sqrt(128) * (toward + 0.5 * common / common.norm())
    values = torch.randn(num_tokens, 128, generator=generator, dtype=torch.float64)
    return World(query[None], keys, values, reference.middle(num_tokens, SINK, WINDOW))
