"""Key codes of one layer, made once per key and kept; which tokens a query's codes select."""

from __future__ import annotations

import torch

from vllm_magicpig import reference
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.key_center import KeyCenter

MIN_KEYS = 512
"""Keys needed for a centre: its standard error is then 4 % of the keys' spread."""
_TOKENS_AT_ONCE = 2048
"""Bounds the projections that are held: 12 MB a kv head at K = 10, L = 150."""


class KeyCodes:
    """codes of all keys seen so far, under the hyperplanes that the engine draws for this layer."""

    def __init__(self, options: MagicPigOptions, layer_index: int) -> None:
        self._options, self._layer_index = options, layer_index
        self._directions = torch.empty(0)
        self._codes = torch.empty(0, 0, 0, dtype=torch.int16)
        self._norms = torch.empty(0, 0)
        self._center: KeyCenter | None = None
        self.num_tokens = 0

    @property
    def center(self) -> torch.Tensor | None:
        """float32 [num_kv_heads, head_size], None before a prompt of MIN_KEYS tokens.

        With the option center = "passage" the mean key of the first such prompt stands for that of
        the passage, which the caller may prefill first, as the engine does.
        """
        return None if self._center is None else self._center.value

    @property
    def codes(self) -> torch.Tensor:
        """int16 [num_kv_heads, L, num_tokens]: table by table, so that counting reads straight on."""
        return self._codes[:, :, : self.num_tokens]

    @property
    def norms(self) -> torch.Tensor:
        """|k - mu|: float [num_kv_heads, num_tokens]."""
        return self._norms[:, : self.num_tokens]

    def reset(self) -> None:
        """Forgets the keys, for another prompt; the centre stays, as in a server."""
        self.num_tokens = 0

    def extend(self, keys: torch.Tensor) -> None:
        """keys: float [num_kv_heads, n, head_size], all of the sequence; those beyond num_tokens are
        hashed. Without a centre, and too few keys to fix one, nothing is."""
        num_kv_heads, n, head_size = keys.shape
        if self._center is None:
            self._center = KeyCenter(self._options.center, self._layer_index, 0, num_kv_heads)
            self._center.prepare(head_size)
            seed = reference.layer_seed(self._options.seed, self._layer_index)
            directions = reference.hyperplanes(head_size, self._options.L, self._options.K, seed)
            self._directions = directions.to(keys.device)
        if self._center.value is None:
            if n < MIN_KEYS:
                return
            self._center.observe(keys.transpose(0, 1))
            self._center.fix(head_size)
        assert self._center.value is not None
        self._reserve(n, keys)
        center = self._center.value.to(keys.device)[:, None]
        for start in range(self.num_tokens, n, _TOKENS_AT_ONCE):
            some = slice(start, min(start + _TOKENS_AT_ONCE, n))
            centred = keys[:, some].float() - center
            codes = reference.hash_codes(centred, self._directions, self._options.K)
            self._codes[:, :, some] = codes.transpose(1, 2).to(torch.int16)
            self._norms[:, some] = (keys[:, some] - center).norm(dim=-1)
        self.num_tokens = max(n, self.num_tokens)

    def _reserve(self, n: int, keys: torch.Tensor) -> None:
        if n <= self._codes.shape[2]:
            return
        num_kv_heads, room = keys.shape[0], max(n, 2 * self._codes.shape[2])
        codes = self._codes.new_empty(num_kv_heads, self._options.L, room, device=keys.device)
        norms = keys.new_empty(num_kv_heads, room)
        if self.num_tokens:
            codes[:, :, : self.num_tokens] = self.codes
            norms[:, : self.num_tokens] = self.norms
        self._codes, self._norms = codes, norms

    def hash_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """queries: float [num_q_heads, head_size], not centred. Returns int16 [num_q_heads, L]."""
        codes = reference.hash_codes(queries.float(), self._directions, self._options.K)
        return codes.to(torch.int16)


def count_matches(query_codes: torch.Tensor, key_codes: torch.Tensor) -> torch.Tensor:
    """Number of tables in which codes are equal; twin of `reference.count_matches`.

    query_codes: int16 [num_q_heads, L]; key_codes: int16 [num_kv_heads, L, num_tokens].
    Returns int16 [num_q_heads, num_tokens].
    """
    num_kv_heads, num_tables, num_tokens = key_codes.shape
    queries = query_codes.reshape(num_kv_heads, -1, num_tables)
    counts = torch.zeros(*queries.shape[:2], num_tokens, dtype=torch.int16, device=key_codes.device)
    for table in range(num_tables):
        counts += queries[:, :, table, None] == key_codes[:, None, table]
    return counts.flatten(0, 1)


def tie_phases(seed: int, num_tokens: int, query_codes: torch.Tensor) -> list[int]:
    """`reference.tie_phase` of each query head.

    query_codes: int16 [num_q_heads, L].
    """
    return [
        reference.tie_phase(seed, num_tokens, head, codes)
        for head, codes in enumerate(query_codes.tolist())
    ]


def pick_best(
    counts: torch.Tensor, min_matches: int, limit: int, phases: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sample of each head, cut to its `limit` best; twin of `reference.pick_best`, for all heads.

    counts: int16 [num_q_heads, m], of the middle; phases: of `tie_phases`. Returns (bool
    [num_q_heads, m], t: int64 [num_q_heads], r: float64 [num_q_heads]): a token is in if it matches in
    more than t tables, or in t and is one of a fraction r of those.
    """
    num_heads, _ = counts.shape
    clamped = counts.long()
    size = int(clamped.max()) + 1
    histogram = clamped.new_zeros(num_heads, size).scatter_add_(
        1, clamped, torch.ones_like(clamped)
    )
    at_least = histogram.flip(1).cumsum(1).flip(1)
    # The highest t that still has `limit` tokens at or above it, but no lower than the sample's.
    t = ((at_least >= limit).sum(1) - 1).clamp(min=min_matches)
    fits = _at(at_least, torch.full_like(t, min_matches)) <= limit
    t = torch.where(fits, min_matches, t)
    better, ties = _at(at_least, t + 1), _at(histogram, t)
    taken = torch.where(fits, ties, limit - better)
    tied = counts == t[:, None]
    rank = tied.cumsum(1) - 1
    start = torch.tensor(
        [phase % max(int(n), 1) for phase, n in zip(phases, ties, strict=True)], device=t.device
    )
    step = ties.clamp(min=1)[:, None]
    place = start[:, None] + taken[:, None] * rank
    passes = (place + taken[:, None]).div(step, rounding_mode="floor") > place.div(
        step, rounding_mode="floor"
    )
    mask = (counts > t[:, None]) | (tied & passes)
    fraction = torch.where(fits, 1.0, taken.double() / ties.clamp(min=1))
    return mask, t, fraction


def _at(table: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """table[h, column[h]], 0 beyond its end."""
    inside = column.clamp(max=table.shape[1] - 1)
    return torch.where(column < table.shape[1], table.gather(1, inside[:, None])[:, 0], 0)
