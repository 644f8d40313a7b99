"""MagicPIG in plain PyTorch, to be read beside the paper and used as the oracle of every test.

Source: Chen et al., "MagicPIG: LSH Sampling for Efficient LLM Generation", arXiv 2410.16179,
sections 3 and 4. Nothing here is fast and nothing here is called while serving.

Symbols, as in the paper: K bits per table, L tables, `codes` the L table codes of a vector,
p the SimHash collision probability of one bit, u the probability that a token is sampled.
"""

import math

import torch

LOG_U_FLOOR = -80.0
"""log u is clamped here, so that a code collision at a cosine of -1 (u = 0) stays finite."""

LAYER_SEED_STRIDE = 1_000_003
"""Spreads the seeds of layers, whose numbers are small."""


def hadamard_signs(head_size: int, num_tables: int, num_bits: int, seed: int) -> torch.Tensor:
    """Random signs of the hyperplanes of a layer: int8 [3 + blocks, size], 1 or -1, on the CPU.

    size is a power of two, 128 at least: shorter vectors are padded with zeros, so that each direction
    adds up enough signs to be nearly normal. The same (head_size, L, K, seed) gives the same signs in
    every process, which prefix sharing between ranks and restarts relies on.
    """
    size = max(128, 1 << (head_size - 1).bit_length())
    blocks = -(-num_tables // size) * num_bits
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (3 + blocks, size), generator=generator, dtype=torch.int8)
    return 2 * bits - 1


def layer_seed(seed: int, layer_index: int) -> int:
    """The seed of a layer's hyperplanes, so that no two of a model's layers share any."""
    return (seed + layer_index * LAYER_SEED_STRIDE) % (1 << 63)


def hyperplanes(head_size: int, num_tables: int, num_bits: int, seed: int) -> torch.Tensor:
    """Directions of all tables: float32 [head_size, num_tables * num_bits], on the CPU; exact.

    Column l * K + k is bit k of table l. The paper draws them from a normal distribution; these are
    rows of products of Walsh-Hadamard matrices H and random signs D, which hash eight times as fast
    (Andoni et al., "Practical and Optimal LSH for Angular Distance", arXiv 1509.02897, section 3):
    block b projects to H Db (H D2 H D1 H D0 / size). Bits of one table come from different blocks:
    within a block, directions are orthogonal, and their collisions would not be those of independent
    ones.
    """
    signs = hadamard_signs(head_size, num_tables, num_bits, seed).double()
    size = signs.shape[1]
    h = hadamard(size)
    rotation = (h * signs[2]) @ (h * signs[1]) @ (h * signs[0]) / size
    blocks = torch.stack([(h * d) @ rotation for d in signs[3:]])[..., :head_size]
    table = torch.arange(num_tables)[:, None]
    block, row = table // size * num_bits + torch.arange(num_bits), table % size
    return blocks[block, row.expand_as(block)].flatten(0, 1).T.float().contiguous()


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's matrix, float64 [size, size]; size a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hash_codes(vectors: torch.Tensor, directions: torch.Tensor, num_bits: int) -> torch.Tensor:
    """SimHash codes (section 4.1): the signs of `vectors @ directions`, packed per table.

    vectors: float [..., head_size], keys already centred, queries as they are;
    directions: float [head_size, L * K]. Bit k of code l is set when projection l * K + k is > 0.
    Returns int32 [..., L], each below 2**K.
    """
    projections = vectors.to(directions.dtype) @ directions
    num_tables = directions.shape[1] // num_bits
    signs = (projections > 0).reshape(*vectors.shape[:-1], num_tables, num_bits)
    bit_values = 1 << torch.arange(num_bits, dtype=torch.int32, device=signs.device)
    return (signs * bit_values).sum(-1, dtype=torch.int32)


def count_matches(query_codes: torch.Tensor, key_codes: torch.Tensor) -> torch.Tensor:
    """Number of tables in which codes are equal.

    query_codes: integer [num_q_heads, L]; key_codes: integer [num_kv_heads, num_tokens, L], where
    query head h reads kv head h // (num_q_heads // num_kv_heads).
    Returns int64 [num_q_heads, num_tokens].
    """
    group = query_codes.shape[0] // key_codes.shape[0]
    keys = key_codes.repeat_interleave(group, dim=0)
    return (query_codes[:, None, :] == keys).sum(-1)


def middle(num_tokens: int, sink_tokens: int, window_tokens: int) -> range:
    """Positions that are sampled: all but the first `sink_tokens` and last `window_tokens`."""
    start = min(sink_tokens, num_tokens)
    return range(start, max(start, num_tokens - window_tokens))


def sample(
    query_codes: torch.Tensor,
    key_codes: torch.Tensor,
    min_matches: int,
    sink_tokens: int,
    window_tokens: int,
) -> torch.Tensor:
    """The sample: tokens of the middle that match in at least `min_matches` tables (section 4.2).

    Shapes as in `count_matches`. Returns bool [num_q_heads, num_tokens].
    """
    mask = count_matches(query_codes, key_codes) >= min_matches
    positions = middle(mask.shape[1], sink_tokens, window_tokens)
    mask[:, : positions.start] = False
    mask[:, positions.stop :] = False
    return mask


def row_limit(middle_tokens: int, row_budget: float) -> int | None:
    """Rows that one head may take of a middle: this fraction of it, one at least; None for 0."""
    return max(1, int(row_budget * middle_tokens)) if row_budget > 0 else None


def tie_phase(seed: int, num_tokens: int, query_head: int, codes: list[int]) -> int:
    """Where the choice among equally good matches starts: 64 bits from splitmix64.

    codes: the query's, by which requests are told apart.
    """
    state = split_mix(seed)
    for value in (num_tokens, query_head, *codes):
        state = split_mix(state ^ value)
    return state


def split_mix(x: int) -> int:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def pick_best(
    counts: torch.Tensor, sampled: torch.Tensor, limit: int, phase: int
) -> tuple[torch.Tensor, int, float]:
    """The `limit` best matches of one head's sample, if it holds more; not in the paper.

    counts: integer [num_tokens] of `count_matches`; sampled: bool [num_tokens], more than `limit`.
    All that match in more than t tables are taken and a fraction r of those that match in t: every
    (1 / r)th in their order, from a place that `phase` tells, so that each has the same chance r.
    Returns (bool [num_tokens] of exactly `limit` tokens, t, r).
    """
    ordered = counts[sampled].sort(descending=True).values
    t = int(ordered[limit - 1])
    better = int((ordered > t).sum())
    ties = torch.nonzero(sampled & (counts == t)).flatten()
    taken = limit - better
    place = phase % len(ties) + taken * torch.arange(len(ties) + 1, dtype=torch.int64)
    passes = place.div(len(ties), rounding_mode="floor").diff() > 0
    picked = sampled & (counts > t)
    picked[ties[passes]] = True
    return picked, t, taken / len(ties)


def collision_probability(queries: torch.Tensor, centred_keys: torch.Tensor) -> torch.Tensor:
    """p = 1 - angle / pi of one SimHash bit, float64 (section 4.1, equation 6).

    queries: float [num_q_heads, head_size]; centred_keys: float [num_q_heads, n, head_size].
    Returns float64 [num_q_heads, n]. A zero vector has no angle; its cosine is taken as 0.
    """
    q, k = queries.double(), centred_keys.double()
    norms = q.norm(dim=-1)[:, None] * k.norm(dim=-1)
    cosine = torch.where(norms > 0, torch.einsum("hd,hnd->hn", q, k) / norms, 0.0)
    return 1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi


def log_inclusion_probability(
    p: torch.Tensor, num_bits: int, num_tables: int, min_matches: int
) -> torch.Tensor:
    """log u with u = P[Binomial(L, p**K) >= t], float64, never below LOG_U_FLOOR.

    For t = 2 this is the paper's u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L-1) (section 4.2). That
    closed form cancels for small p, so the tail is summed in logs, and where the tail is most of
    the mass the other side is, so that both ends keep their relative precision.
    """
    return _log_tail(p, num_bits, num_tables, min_matches).clamp(min=LOG_U_FLOOR)


def _log_tail(p: torch.Tensor, num_bits: int, num_tables: int, min_matches: int) -> torch.Tensor:
    """log P[Binomial(L, p**K) >= min_matches], -inf where that cannot be."""
    x = p.double().clamp(0, 1) ** num_bits
    log_x, log_rest = torch.log(x)[..., None], torch.log1p(-x)[..., None]
    k = torch.arange(num_tables + 1, dtype=torch.float64)
    log_choose = (
        math.lgamma(num_tables + 1) - torch.lgamma(k + 1) - torch.lgamma(num_tables - k + 1)
    )
    # 0 * log 0 counts as 0: no success is certain at x = 0, all successes at x = 1.
    successes = torch.where(k > 0, k * log_x, 0.0)
    failures = torch.where(k < num_tables, (num_tables - k) * log_rest, 0.0)
    log_pmf = log_choose + successes + failures
    upper = torch.logsumexp(log_pmf[..., min_matches:], dim=-1)
    lower = torch.logsumexp(log_pmf[..., :min_matches], dim=-1)
    return torch.where(lower < math.log(0.5), torch.log1p(-lower.exp()), upper)


def log_mixed_inclusion_probability(
    p: torch.Tensor, num_bits: int, num_tables: int, min_matches: int, fraction: float
) -> torch.Tensor:
    """log u where only a fraction r of the tokens that match in exactly t tables is taken, float64:
    u = P[c > t] + r P[c = t], the marginal probability of being taken. r = 1 is the paper's u.
    """
    log_u = _log_tail(p, num_bits, num_tables, min_matches) + math.log(fraction)
    if fraction < 1 and min_matches < num_tables:
        log_above = _log_tail(p, num_bits, num_tables, min_matches + 1)
        log_u = torch.logaddexp(log_u, log_above + math.log1p(-fraction))
    return log_u.clamp(min=LOG_U_FLOOR)


def attention_over(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    log_u: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the masked tokens with logits scale * q.k - log u, float64.

    queries: [num_q_heads, head_size]; keys, values: [num_kv_heads, n, head_size]; mask: bool and
    log_u: float, both [num_q_heads, n]. Returns (out [num_q_heads, head_size], lse [num_q_heads],
    natural logarithm); a head whose mask is empty gives out 0 and lse -inf.
    """
    group = queries.shape[0] // keys.shape[0]
    k = keys.double().repeat_interleave(group, dim=0)
    v = values.double().repeat_interleave(group, dim=0)
    logits = scale * torch.einsum("hd,hnd->hn", queries.double(), k) - log_u
    logits = logits.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse.isfinite(), lse, 0.0)[:, None])
    return torch.einsum("hn,hnd->hd", weights, v), lse


def exact_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one decode step over all tokens. Shapes and result as in `attention_over`."""
    everything = torch.ones(queries.shape[0], keys.shape[1], dtype=torch.bool)
    return attention_over(queries, keys, values, scale, everything, torch.zeros(()))


def sampled_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sampled: torch.Tensor,
    center: torch.Tensor,
    num_bits: int,
    num_tables: int,
    thresholds: list[tuple[int, float]],
    sink_tokens: int,
    window_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator (section 3.3, algorithm 1): sinks and window with u = 1, the sample with its u.

    sampled: bool [num_q_heads, n] from `sample`; center: float [num_kv_heads, head_size], the key
    centre; thresholds: of each query head (t, r), (min_matches, 1) for the paper's sample. Other
    shapes and the result as in `attention_over`.
    """
    group = queries.shape[0] // keys.shape[0]
    centred = (keys.double() - center.double()[:, None, :]).repeat_interleave(group, dim=0)
    p = collision_probability(queries, centred)
    log_u = torch.stack(
        [
            log_mixed_inclusion_probability(p_of_head, num_bits, num_tables, t, r)
            for p_of_head, (t, r) in zip(p, thresholds, strict=True)
        ]
    )
    positions = middle(keys.shape[1], sink_tokens, window_tokens)
    exact = torch.ones(keys.shape[1], dtype=torch.bool)
    exact[positions.start : positions.stop] = False
    return attention_over(
        queries, keys, values, scale, sampled | exact, torch.where(exact, 0.0, log_u)
    )


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of tokens from the two partial results.

    out: [..., head_size], lse: [...]. Exact, associative and commutative; lse -inf is the empty set.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(lse.isfinite(), lse, 0.0)
    return out_a * (lse_a - safe).exp()[..., None] + out_b * (lse_b - safe).exp()[..., None], lse
