"""Synthetic attention of known shapes: seeded keys, values and queries of one layer, and the error of
an estimate of it.

    layer = generate("needle", num_tokens=32768, seed=0)
    queries = layer.queries(10, seed=1)              # [10, num_q_heads, head_dim]
    exact = exact_attention(queries[0], layer.keys, layer.values)
    relative_error(estimate, exact)                  # one figure per query head

Each geometry stands for something that heads of trained models do:

    needle         a handful of tokens holds most of the softmax mass
    heavy_hitters  about 1 % of the tokens holds most of it
    flat           all tokens count alike: a sample must average, nothing can be picked
    heavy_tailed   key norms spread over more than an octave, and logits have fat tails
    clustered      keys crowd around 64 centres, each query asks for one of them
    cone           keys lie in a narrow cone around a centre that is large against their spread, the
                   first token (the attention sink) on its opposite side, with a good part of the mass
    recency        weights fall with the distance from the end
    two_scale      8 of 128 dimensions hold most of the keys' and queries' variance
    mixed          kv head h has the h-th of the above: the layer that the speed benchmarks use

A kv head is attended by a group of query heads, and steps follow one another; queries of one group and
of all steps share a direction (`correlation`), as those of a trained head do. Logits are q.k / sqrt(d),
keys have a spread of about 1 in each dimension, and query norms are chosen for the logits' spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

HEAD_DIM = 128
GROUP = 4
NUM_KV_HEADS = 8
CORRELATION = 0.8
"""Cosine of a query and the direction that its head asks for."""
ALIGNMENT = 0.8
"""Further standard deviation of the keys along that direction, beside the 1 of every dimension: more of
it spreads the cosines of queries and keys, and SimHash samples more rows."""


@dataclass(frozen=True)
class Head:
    """One kv head.

    keys, values: float32 [num_tokens, head_dim]; directions: unit vectors, float32 [n, head_dim], of
    which each query asks for one; query_norm: of all queries, offset aside; offset: float32 [head_dim],
    what all queries have in common beside that, in units of query_norm; noise_scale: float32
    [head_dim], spread of the part that no two queries share, None for the same in all dimensions.
    """

    keys: torch.Tensor
    values: torch.Tensor
    directions: torch.Tensor
    query_norm: float
    offset: torch.Tensor | None = None
    noise_scale: torch.Tensor | None = None

    def queries(
        self, num: int, group: int, correlation: float, generator: torch.Generator
    ) -> torch.Tensor:
        """float32 [num, group, head_dim]; the heads of a group ask for the same direction."""
        size = self.keys.shape[1]
        chosen = torch.randint(len(self.directions), (num,), generator=generator)
        noise = torch.randn(num, group, size, generator=generator)
        if self.noise_scale is not None:
            noise *= self.noise_scale
        noise /= noise.norm(dim=-1, keepdim=True)
        rest = math.sqrt(1 - correlation**2)
        mixed = correlation * self.directions[chosen][:, None] + rest * noise
        if self.offset is not None:
            mixed += self.offset
        return self.query_norm * mixed


@dataclass(frozen=True)
class AttentionLayer:
    """keys, values: float32 [num_kv_heads, num_tokens, head_dim], of values that bfloat16 holds, so
    that pages of either dtype store the same numbers."""

    name: str
    keys: torch.Tensor
    values: torch.Tensor
    heads: Sequence[Head]
    group: int
    correlation: float

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def center(self) -> torch.Tensor:
        """Mean key: float32 [num_kv_heads, head_dim]."""
        return self.keys.mean(dim=1)

    def queries(self, num: int, seed: int) -> torch.Tensor:
        """float32 [num, num_q_heads, head_dim], of values that bfloat16 holds."""
        parts = [
            head.queries(num, self.group, self.correlation, _generator(seed, 1, index))
            for index, head in enumerate(self.heads)
        ]
        return _as_bfloat16(torch.cat(parts, dim=1))


def generate(
    name: str,
    num_tokens: int,
    *,
    num_kv_heads: int = NUM_KV_HEADS,
    group: int = GROUP,
    head_dim: int = HEAD_DIM,
    seed: int = 0,
    correlation: float = CORRELATION,
    alignment: float = ALIGNMENT,
) -> AttentionLayer:
    """One layer of geometry `name`. The same arguments give the same numbers."""
    if name != "mixed" and name not in GEOMETRIES:
        raise ValueError(
            f"geometry {name!r} is unknown; choose one of {', '.join(GEOMETRIES)}, mixed."
        )
    every = list(GEOMETRIES.values())
    keys = torch.empty(num_kv_heads, num_tokens, head_dim)
    values = torch.empty_like(keys)
    heads = []
    for index in range(num_kv_heads):
        make = every[index % len(every)] if name == "mixed" else GEOMETRIES[name]
        kit = _Kit(num_tokens, head_dim, correlation, alignment, _generator(seed, 0, index))
        head = make(kit)
        keys[index], values[index] = _as_bfloat16(head.keys), _as_bfloat16(head.values)
        heads.append(replace(head, keys=keys[index], values=values[index]))
    return AttentionLayer(name, keys, values, heads, group, correlation)


def exact_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """float64 [num_q_heads, head_dim], of queries [num_q_heads, head_dim] over keys and values
    [num_kv_heads, n, head_dim]; in float64, one kv head after another."""
    weights = softmax_weights(queries, keys)
    group = len(queries) // len(keys)
    outputs = [
        weights[head * group : (head + 1) * group] @ values[head].double()
        for head in range(len(keys))
    ]
    return torch.cat(outputs)


def softmax_weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float64 [num_q_heads, n]: each token's share of the softmax mass. Shapes as above."""
    group = len(queries) // len(keys)
    scale = keys.shape[2] ** -0.5
    parts = [
        torch.softmax(
            scale * queries[head * group : (head + 1) * group].double() @ keys[head].double().T, -1
        )
        for head in range(len(keys))
    ]
    return torch.cat(parts)


def relative_error(estimate: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|estimate - exact| / |exact| of each query head, float64; both [..., num_q_heads, head_dim].

    Values have a mean and follow their keys (`_Kit.values`), so |exact| does not vanish where many
    tokens share the mass.
    """
    difference = (estimate.double() - exact.double()).norm(dim=-1)
    return difference / exact.double().norm(dim=-1)


# ---------------------------------------------------------------------------------- the geometries


@dataclass
class _Kit:
    """What the makers below share: sizes, and draws from one kv head's generator."""

    num_tokens: int
    head_dim: int
    correlation: float
    alignment: float
    generator: torch.Generator

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def direction(self) -> torch.Tensor:
        vector = self.normal(self.head_dim)
        return vector / vector.norm()

    def tokens(self, num: int) -> torch.Tensor:
        """`num` different positions, none of them a sink or in the window."""
        inner = max(self.num_tokens - 256, 1)
        return 64 + torch.randperm(inner, generator=self.generator)[:num]

    def spread(self, direction: torch.Tensor) -> torch.Tensor:
        """Keys of unit variance, with more of it along `direction`."""
        keys = self.normal(self.num_tokens, self.head_dim)
        keys += self.alignment * self.normal(self.num_tokens, 1) * direction
        return keys

    def aligned(self, direction: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """Keys of the usual norm with this cosine to `direction` (unit vectors, noise else)."""
        noise = self.normal(len(cosine), self.head_dim)
        noise -= (noise @ direction)[:, None] * direction
        noise /= noise.norm(dim=-1, keepdim=True)
        keys = cosine[:, None] * direction + (1 - cosine**2).sqrt()[:, None] * noise
        return math.sqrt(self.head_dim) * keys

    def values(self, keys: torch.Tensor) -> torch.Tensor:
        """Half a unit of mean, half a unit that follows the key, the rest noise: outputs are neither
        zero where the mass is spread nor independent of what was attended."""
        mixing = self.normal(self.head_dim, self.head_dim) / math.sqrt(self.head_dim)
        spread = keys - keys.mean(dim=0)
        values = 0.5 * self.normal(self.head_dim) + 0.5 * (spread @ mixing)
        return values + math.sqrt(0.5) * self.normal(self.num_tokens, self.head_dim)

    def head(
        self,
        keys: torch.Tensor,
        directions: torch.Tensor,
        query_norm: float,
        offset: torch.Tensor | None = None,
        noise_scale: torch.Tensor | None = None,
    ) -> Head:
        directions = directions.reshape(-1, self.head_dim)
        return Head(keys, self.values(keys), directions, query_norm, offset, noise_scale)


def _needle(kit: _Kit) -> Head:
    direction = kit.direction()
    keys = kit.spread(direction)
    # A needle's logit is 22 * 0.8 * 0.85 = 15 at the default correlation; the log-sum-exp of all others
    # is log n + 22**2 / (2 d) * (1 + alignment**2 * correlation**2), about 13 at 32K.
    keys[kit.tokens(4)] = kit.aligned(direction, torch.full((4,), 0.85))
    return kit.head(keys, direction, query_norm=22.0)


def _heavy_hitters(kit: _Kit) -> Head:
    direction = kit.direction()
    keys = kit.spread(direction)
    num = max(kit.num_tokens // 100, 1)
    cosine = 0.35 + 0.3 * torch.rand(num, generator=kit.generator)
    keys[kit.tokens(num)] = kit.aligned(direction, cosine)
    return kit.head(keys, direction, query_norm=16.0)


def _flat(kit: _Kit) -> Head:
    direction = kit.direction()
    return kit.head(kit.spread(direction), direction, query_norm=4.0)


def _heavy_tailed(kit: _Kit) -> Head:
    direction = kit.direction()
    norms = torch.exp(0.25 * kit.normal(kit.num_tokens, 1))
    return kit.head(norms * kit.spread(direction), direction, query_norm=14.0)


def _clustered(kit: _Kit) -> Head:
    num_clusters = 64
    centers = kit.normal(num_clusters, kit.head_dim)
    centers /= centers.norm(dim=-1, keepdim=True)
    member = torch.randint(num_clusters, (kit.num_tokens,), generator=kit.generator)
    # 0.7 of a key's norm is its cluster's, so that the spread per dimension stays 1.
    keys = 0.7 * math.sqrt(kit.head_dim) * centers[member]
    keys += math.sqrt(1 - 0.7**2) * kit.normal(kit.num_tokens, kit.head_dim)
    return kit.head(keys, centers, query_norm=11.0)


def _cone(kit: _Kit) -> Head:
    axis, direction, query_norm = kit.direction(), kit.direction(), 14.0
    direction = direction - (direction @ axis) * axis
    direction /= direction.norm()
    root = math.sqrt(kit.head_dim)
    keys = kit.spread(direction) + 2 * root * axis
    against = 0.2  # share of each query that points away from the cone
    spread = query_norm**2 / kit.head_dim * (1 + (kit.alignment * kit.correlation) ** 2)
    rest = math.log(kit.num_tokens) + spread / 2 - against * query_norm * 2
    # The sink's logit is the log-sum-exp of all others: half of the mass.
    keys[0] = -rest / (against * query_norm) * root * axis
    return kit.head(keys, direction, query_norm, offset=-against * axis)


def _recency(kit: _Kit) -> Head:
    direction, query_norm = kit.direction(), 12.0
    distance = torch.arange(kit.num_tokens - 1, -1, -1.0)[:, None]
    rise = 7 / (query_norm * kit.correlation) * torch.exp(-distance / (kit.num_tokens / 64))
    keys = kit.spread(direction) + math.sqrt(kit.head_dim) * rise * direction
    return kit.head(keys, direction, query_norm)


def _two_scale(kit: _Kit) -> Head:
    scale = torch.ones(kit.head_dim)
    scale[torch.randperm(kit.head_dim, generator=kit.generator)[: kit.head_dim // 16]] = 3.0
    scale /= scale.square().mean().sqrt()
    direction = kit.direction() * scale
    direction /= direction.norm()
    keys = kit.normal(kit.num_tokens, kit.head_dim) * scale
    return kit.head(keys, direction, query_norm=8.0, noise_scale=scale)


GEOMETRIES: dict[str, Callable[[_Kit], Head]] = {
    "needle": _needle,
    "heavy_hitters": _heavy_hitters,
    "flat": _flat,
    "heavy_tailed": _heavy_tailed,
    "clustered": _clustered,
    "cone": _cone,
    "recency": _recency,
    "two_scale": _two_scale,
}


def _generator(*place: int) -> torch.Generator:
    """Independent streams of one seed."""
    mixed = 0
    for part in place:
        mixed = (mixed * 1_000_003 + part) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def _as_bfloat16(rows: torch.Tensor) -> torch.Tensor:
    return rows.bfloat16().float()
