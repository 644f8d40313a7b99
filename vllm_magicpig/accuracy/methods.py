"""Sparse attention methods by name, one decode step of one layer at a time.

    method = make_method(MethodSettings("quest", rows=0.02), layer_index=1, scale=128**-0.5)
    out, rows = method.attend(q, k, v)       # k and v of the whole sequence, the newest token included

All methods attend to the sink and window tokens exactly and choose among the middle, what lies
between. A choice is a log weight per row of the middle, -inf where the row is not gathered; the
result is softmax attention with these added to the logits. A middle shorter than
`options.exact_below` is attended exactly, as in the engine.

"signatures" is the next method: `rows` is of the group of query heads there, which share one list, and
its middle ends with the last full block of 128 tokens.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from vllm_magicpig import reference, signature_reference
from vllm_magicpig.accuracy.inclusion import tail_table
from vllm_magicpig.accuracy.key_codes import KeyCodes, count_matches, pick_best, tie_phases
from vllm_magicpig.accuracy.key_signatures import KeySignatures
from vllm_magicpig.accuracy.page_bounds import PageBounds
from vllm_magicpig.config import MagicPigOptions

LEAST_GAIN_ROWS, LEAST_GAIN_SHARE, MOST_GAIN_SHARE = 64, 0.0025, 0.16
"""Bounds of the rows where a gain chooses them: fewer than 64 leave errors of .5 in short middles."""

QUEST_PAGE_TOKENS = 16
"""Tang et al., "Quest", arXiv 2406.10774, section 4.2."""


@dataclass(frozen=True)
class MethodSettings:
    """name: one of METHODS; rows: fraction of the middle that a query head may gather, one row at
    least; 0 with magicpig is the paper's own sample, all that match; options: what the engine takes
    (rows, index, threads, isa and host_kv_cache_gib aside, which `rows` and plain PyTorch stand for);
    seed: of the draws of uniform and oracle-sampling (magicpig and signatures draw by options.seed);
    bits: of a dimension, of signatures; row_gain: of signatures, chances by equal marginal gain in the
    place of `rows`, all heads weighing alike."""

    name: str
    rows: float = 0.02
    options: MagicPigOptions = field(default_factory=MagicPigOptions)
    seed: int = 0
    bits: int = 2
    row_gain: float | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            close = difflib.get_close_matches(self.name, METHODS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"accuracy method {self.name!r} is unknown; choose one of {', '.join(METHODS)}{hint}"
            )
        if not 0 <= self.rows <= 1 or (self.rows == 0 and self.name != "magicpig"):
            least = (
                "0 (the paper's sample) to 1" if self.name == "magicpig" else "above 0 and up to 1"
            )
            raise ValueError(
                f"rows of method {self.name!r} is {self.rows!r}, but must be {least}; correct it."
            )
        if self.bits not in signature_reference.QUANTISER_STEP:
            raise ValueError(f"bits is {self.bits!r}, but must be 1, 2 or 4; correct it.")
        if self.row_gain is not None and not (self.name == "signatures" and self.row_gain > 0):
            raise ValueError(
                f"row_gain of method {self.name!r} is {self.row_gain!r}, but is for signatures alone "
                "and above 0; correct it or leave it out."
            )


@dataclass(frozen=True)
class Step:
    """One decode step of one layer: what all methods choose by.

    queries: float [num_q_heads, head_size]; keys: float [num_kv_heads, n, head_size]; logits: float
    [num_q_heads, m], scale * q.k of the middle; middle: its positions; limit: rows that a head may
    gather; log_static: float [num_q_heads], log of the sum of exp(scale * q.k) over all other tokens.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    logits: torch.Tensor
    scale: float
    middle: range
    limit: int
    log_static: torch.Tensor

    def nothing(self) -> torch.Tensor:
        """Log weights of which none is gathered."""
        return torch.full_like(self.logits, -math.inf)


class Method(ABC):
    """What a method keeps of one layer from step to step, and its draws."""

    def __init__(self, settings: MethodSettings, layer_index: int, scale: float) -> None:
        self.settings, self.options = settings, settings.options
        self.layer_index, self.scale = layer_index, scale
        self.reset()

    def reset(self) -> None:
        """Ready for another prompt; the same prompt then gives the same result."""
        self._draws: torch.Generator | None = None

    def observe(self, keys: torch.Tensor) -> None:  # noqa: B027 (most methods keep nothing)
        """After a prefill; keys: [num_kv_heads, n, head_size], all of the sequence."""

    def middle(self, num_tokens: int) -> range:
        """Positions that are chosen among."""
        return reference.middle(num_tokens, self.options.sink_tokens, self.options.window_tokens)

    @abstractmethod
    def log_weights(self, step: Step) -> torch.Tensor:
        """float [num_q_heads, m]: what is added to the logits, -inf where a row is not gathered."""

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """queries: [num_q_heads, head_size]; keys, values: [num_kv_heads, n, head_size], n growing from
        step to step. Returns (out of queries' shape and dtype, rows: int64 [num_q_heads], gathered of
        the middle). Computes in float64 for float64 queries, else in float32.
        """
        exact_dtype = torch.promote_types(queries.dtype, torch.float32)
        q, k, v = queries.to(exact_dtype), keys.to(exact_dtype), values.to(exact_dtype)
        num_kv_heads, n, _ = k.shape
        grouped = q.reshape(num_kv_heads, -1, q.shape[1])
        logits = self.scale * (grouped @ k.transpose(1, 2)).flatten(0, 1)
        middle = self.middle(n)
        inner = logits[:, middle.start : middle.stop]
        rows = torch.full((len(q),), len(middle), device=q.device)
        self.observe(k)
        if len(middle) >= max(self.options.exact_below, 1):
            limit = reference.row_limit(len(middle), self.settings.rows) or len(middle)
            outer = torch.cat([logits[:, : middle.start], logits[:, middle.stop :]], 1)
            step = Step(q, k, inner, self.scale, middle, limit, outer.logsumexp(1))
            added = self.log_weights(step)
            rows = (added > -math.inf).sum(1)
            out = self.output(step, logits, v, added)
        else:
            out = softmax_attention(logits, v)
        return out.to(queries.dtype), rows

    def output(
        self, step: Step, logits: torch.Tensor, values: torch.Tensor, added: torch.Tensor
    ) -> torch.Tensor:
        """The estimate, float [num_q_heads, head_size]. logits: [num_q_heads, n], of all tokens, of
        which step.logits is a view; values: [num_kv_heads, n, head_size]; added: of `log_weights`."""
        weighted = logits.clone()
        weighted[:, step.middle.start : step.middle.stop] += added
        return softmax_attention(weighted, values)

    def generator(self, device: torch.device) -> torch.Generator:
        """Of this layer's draws since the last reset."""
        if self._draws is None:
            seed = reference.layer_seed(self.settings.seed, self.layer_index)
            self._draws = torch.Generator(device).manual_seed(seed)
        return self._draws


def softmax_attention(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """logits: [num_q_heads, n]; values: [num_kv_heads, n, head_size], of the same dtype. Returns
    [num_q_heads, head_size]."""
    weights = torch.softmax(logits, dim=-1).reshape(len(values), -1, logits.shape[1])
    return torch.bmm(weights, values).flatten(0, 1)


class Exact(Method):
    """All rows: the baseline."""

    def log_weights(self, step: Step) -> torch.Tensor:
        return torch.zeros_like(step.logits)


class TopK(Method):
    """The rows of the largest logits, as an oracle finds them; no index does better at selection."""

    def log_weights(self, step: Step) -> torch.Tensor:
        best = step.logits.topk(step.limit, dim=1).indices
        return step.nothing().scatter_(1, best, 0.0)


class OracleSampling(Method):
    """`limit` draws with replacement by the true softmax probability w_i of the middle.

    The estimate of the middle's output is the mean of the drawn values, which is unbiased (arXiv
    2410.16179, section 3.2), and its softmax mass Z is known to the oracle: a row drawn c times counts
    c Z / limit. Rows gathered are the distinct ones.
    """

    def log_weights(self, step: Step) -> torch.Tensor:
        log_mass = step.logits.double().logsumexp(1, keepdim=True)
        log_share = step.logits.double() - log_mass
        draws = torch.multinomial(
            log_share.exp(),
            step.limit,
            replacement=True,
            generator=self.generator(step.logits.device),
        )
        times = torch.zeros_like(log_share).scatter_add_(
            1, draws, torch.ones_like(draws, dtype=torch.float64)
        )
        return (times.log() - math.log(step.limit) - log_share).to(step.logits.dtype)


class Uniform(Method):
    """`limit` rows of equal chance, without replacement, each standing for m / limit of them."""

    def log_weights(self, step: Step) -> torch.Tensor:
        order = torch.rand(
            step.logits.shape,
            generator=self.generator(step.logits.device),
            device=step.logits.device,
        )
        drawn = order.topk(step.limit, dim=1).indices
        return step.nothing().scatter_(1, drawn, math.log(len(step.middle) / step.limit))


class Streaming(Method):
    """Sink and window alone, the window widened by the budget (Xiao et al., arXiv 2309.17453)."""

    def log_weights(self, step: Step) -> torch.Tensor:
        weights = step.nothing()
        weights[:, -step.limit :] = 0.0
        return weights


class Quest(Method):
    """Whole pages of 16 tokens in the order of an upper bound of their logits (arXiv 2406.10774).

    The bound is of the page's elementwise minimum and maximum key. Pages start at the first token
    after the sink; as many are taken as fit into the budget, one at least.
    """

    def reset(self) -> None:
        super().reset()
        self._bounds = PageBounds(QUEST_PAGE_TOKENS, self.options.sink_tokens)

    def observe(self, keys: torch.Tensor) -> None:
        self._bounds.extend(keys)

    def log_weights(self, step: Step) -> torch.Tensor:
        bounds = self._bounds.logit_bounds(step.queries, step.keys, step.middle)
        num_pages = bounds.shape[1]
        page = torch.arange(len(step.middle), device=bounds.device) // QUEST_PAGE_TOKENS
        order = bounds.argsort(dim=1, descending=True, stable=True)
        taken = page.bincount(minlength=num_pages)[order].cumsum(1) <= step.limit
        taken[:, 0] = True
        chosen = torch.zeros_like(taken).scatter_(1, order, taken)
        return step.nothing().masked_fill_(chosen[:, page], 0.0)


class MagicPig(Method):
    """The engine's estimator: tokens whose codes match, each weighted by 1 / u (reference.py).

    Hyperplanes and, within a budget, the choice among ties are the engine's own, so that equal codes
    give equal samples. The centre is the mean key of the first prompt, in the engine that of its
    passage (vllm_magicpig/passage.py): prefill that first, or pass a calibration file as `center`,
    where both must agree. Exact with K = 0 and before a prompt has fixed the centre.
    """

    def __init__(self, settings: MethodSettings, layer_index: int, scale: float) -> None:
        self.keys = KeyCodes(settings.options, layer_index)
        super().__init__(settings, layer_index, scale)

    def reset(self) -> None:
        super().reset()
        self.keys.reset()

    def observe(self, keys: torch.Tensor) -> None:
        if not self.options.is_exact:
            self.keys.extend(keys)

    def log_weights(self, step: Step) -> torch.Tensor:
        if self.options.is_exact or self.keys.center is None:
            return torch.zeros_like(step.logits)
        return self.sample_weights(step)

    def sample_weights(self, step: Step) -> torch.Tensor:
        """`log_weights` where keys are hashed: -log u of what is sampled."""
        mask, t, fraction = self.sample(step)
        table = tail_table(self.options.K, self.options.L, step.logits.device)
        p = self.collision_probability(step, self.logit_bounds(step))
        log_u = table.log_mixed(p, t[:, None], fraction[:, None])
        return torch.where(mask, -log_u, -math.inf).to(step.logits.dtype)

    def sample(self, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mask: bool [num_q_heads, m], t: int64 and r: float64 [num_q_heads]) as in `pick_best`."""
        query_codes = self.keys.hash_queries(step.queries)
        counts = self.matches(step, query_codes)
        phases = tie_phases(self.options.seed, step.keys.shape[1], query_codes)
        return pick_best(counts, self.options.min_matches, step.limit, phases)

    def matches(self, step: Step, query_codes: torch.Tensor) -> torch.Tensor:
        """Tables in which each row of the middle matches: int16 [num_q_heads, m]."""
        return count_matches(
            query_codes, self.keys.codes[:, :, step.middle.start : step.middle.stop]
        )

    def logit_bounds(self, step: Step) -> torch.Tensor:
        """scale |q| |k - mu|: float [num_q_heads, m]."""
        norms = self.keys.norms[:, step.middle.start : step.middle.stop].to(step.logits)
        query_norms = step.queries.norm(dim=-1).reshape(len(norms), -1, 1)
        products = torch.bmm(query_norms, norms[:, None])
        return (step.scale * products).flatten(0, 1)

    def collision_probability(self, step: Step, logit_bounds: torch.Tensor) -> torch.Tensor:
        """p of one bit, [num_q_heads, m]; twin of `reference.collision_probability`."""
        assert self.keys.center is not None
        center = self.keys.center.to(step.queries)
        grouped = step.queries.reshape(len(center), -1, center.shape[1])
        shift = step.scale * torch.bmm(grouped, center[:, :, None]).flatten(0, 1)
        cosine = torch.where(logit_bounds > 0, (step.logits - shift) / logit_bounds, 0.0)
        return 1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi


class SignatureList(Method):
    """Rows listed for a group by predicted logits, weighted by 1 / pi (signature_reference.py)."""

    def __init__(self, settings: MethodSettings, layer_index: int, scale: float) -> None:
        self.keys = KeySignatures(settings.bits, settings.options.seed, layer_index)
        super().__init__(settings, layer_index, scale)

    def reset(self) -> None:
        super().reset()
        self.keys.reset()

    def observe(self, keys: torch.Tensor) -> None:
        self.keys.extend(keys)

    def middle(self, num_tokens: int) -> range:
        options = self.options
        return signature_reference.middle(num_tokens, options.sink_tokens, options.window_tokens)

    def log_weights(self, step: Step) -> torch.Tensor:
        num_kv_heads, num_tokens, head_size = step.keys.shape
        grouped = (step.scale * step.queries).reshape(num_kv_heads, -1, head_size)
        static = step.log_static.reshape(num_kv_heads, -1)
        weights = []
        for kv_head, queries in enumerate(grouped):
            log_shares = self.keys.log_shares(kv_head, queries, step.middle, static[kv_head])
            pi = self.inclusion(log_shares.double(), step.limit)
            listed = self.keys.listed(kv_head, num_tokens - 1, pi)
            log_weights = torch.where(listed, -pi.log(), -math.inf)
            weights.append(log_weights.expand(len(queries), -1))
        return torch.cat(weights).to(step.logits.dtype)

    def inclusion(self, log_shares: torch.Tensor, limit: int) -> torch.Tensor:
        gain, m = self.settings.row_gain, log_shares.shape[1]
        if gain is None:
            return signature_reference.budget_inclusion(log_shares, limit)
        alike = log_shares.new_ones(len(log_shares))
        least = min(m, max(LEAST_GAIN_ROWS, LEAST_GAIN_SHARE * m))
        return signature_reference.gain_inclusion(
            log_shares, alike, gain, least, max(least, MOST_GAIN_SHARE * m)
        )


METHODS: dict[str, type[Method]] = {
    "exact": Exact,
    "magicpig": MagicPig,
    "signatures": SignatureList,
    "top-k": TopK,
    "oracle-sampling": OracleSampling,
    "quest": Quest,
    "uniform": Uniform,
    "streaming": Streaming,
}


def make_method(settings: MethodSettings, layer_index: int, scale: float) -> Method:
    """scale: of the logits, usually head_size ** -0.5."""
    return METHODS[settings.name](settings, layer_index, scale)
