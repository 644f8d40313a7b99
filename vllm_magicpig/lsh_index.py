"""The LSH side of one sampled layer's pages: codes for what is stored, segments for what is sealed."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from vllm_magicpig import _C
from vllm_magicpig.capacity import segment_levels
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.projection import Projection
from vllm_magicpig.step import Step


class LshIndex:
    """Codes and segments over `pages`; the centre outlives it, since pages may be bound anew."""

    def __init__(
        self,
        options: MagicPigOptions,
        pages: HostPages,
        projection: Projection,
        center: KeyCenter,
        pool: _C.ThreadPool,
        builder: _C.SegmentBuilder,
        max_bytes: int = 0,
    ) -> None:
        """max_bytes: of all segments, 0 = no limit."""
        self._options, self._pages, self._pool = options, pages, pool
        self.projection, self.center, self.builder = projection, center, builder
        self.rule = sample_rule(options)
        levels = segment_levels(pages.block_size)
        self.native = _C.LshIndex(pages.native, options.K, levels, max_bytes)
        self._asked_at: int | None = None

    def add(self, key: torch.Tensor, step: Step) -> None:
        """Codes for keys whose rows were just stored; the builder makes the segments that the step's
        requests lack now.

        key: [num_tokens, num_kv_heads, head_size].
        """
        if self.center.value is None:  # start-up: nothing that is stored stays
            return
        codes = self.projection.hash_keys(key, self.center.value)
        self.pages.store_codes(codes, step.slots, self._pool)
        if self.native.changes != self._asked_at:
            self._ask(step)

    def forget(self) -> None:
        """Drops all segments, and the counts of them; the centre stays. No builder is at work."""
        self._asked_at = None
        self.native.forget()

    @property
    def pages(self) -> _C.Pages:
        return self._pages.native

    def _ask(self, step: Step) -> None:
        """Only requests that are long enough to be sampled are worth an index."""
        self._asked_at = self.native.changes  # before it asks: what changes meanwhile counts later
        rows = [
            row
            for row, length in enumerate(step.seq_lens.tolist())
            if self._options.samples(length)
        ]
        # Also without any such request: what went stale is given back.
        self.builder.ask(
            self.native, np.ascontiguousarray(step.block_tables[rows]), step.seq_lens[rows]
        )


@cache
def sample_rule(options: MagicPigOptions) -> _C.SampleRule:
    """One for all layers: its table takes megabytes."""
    return _C.SampleRule(
        _C.InclusionTable(options.K, options.L),
        min_matches=options.min_matches,
        sink_tokens=options.sink_tokens,
        window_tokens=options.window_tokens,
        row_budget=options.rows or 0.0,
        seed=options.seed,
    )


def make_index(
    options: MagicPigOptions,
    pages: HostPages,
    layer_index: int,
    center: KeyCenter | None,
    isa: _C.Isa,
    pool: _C.ThreadPool,
    builder: _C.SegmentBuilder | None,
    max_index_bytes: int,
) -> LshIndex | None:
    """The index of a layer, or None in exact mode, where there are no centre and no builder."""
    if center is None:
        return None
    assert builder is not None
    projection = Projection(options, layer_index, pages.head_size, isa, pool)
    return LshIndex(options, pages, projection, center, pool, builder, max_index_bytes)
