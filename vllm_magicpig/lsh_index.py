"""The LSH side of one sampled layer's pages: codes for what is stored, segments for what is sealed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from vllm_magicpig import _C
from vllm_magicpig.capacity import segment_levels
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import MIN_KEYS, KeyCenter
from vllm_magicpig.projection import Projection
from vllm_magicpig.step import Step

_SLOTS_PER_BACKFILL = 4096


class LshIndex:
    """Codes and segments over `pages`; the centre outlives it, since pages may be bound anew."""

    def __init__(
        self,
        options: MagicPigOptions,
        pages: HostPages,
        projection: Projection,
        center: KeyCenter,
        pool: _C.ThreadPool,
        builder: _C.SegmentBuilder | None,
        max_bytes: int = 0,
    ) -> None:
        """builder: None without buckets; max_bytes: of all segments, 0 = no limit."""
        self._options, self._pages, self._pool = options, pages, pool
        self.projection, self.center, self.builder = projection, center, builder
        self.rule = sample_rule(options)
        self.native: _C.LshIndex | None = None
        if options.has_buckets:
            levels = segment_levels(pages.block_size)
            self.native = _C.LshIndex(pages.native, options.K, levels, max_bytes)
        self._asked_at: int | None = None

    def add(self, key: torch.Tensor, step: Step) -> None:
        """Codes for keys whose rows were just stored; the builder makes the segments that the step's
        requests lack now.

        key: [num_tokens, num_kv_heads, head_size].
        """
        if self.center.value is None:
            self.freeze(step.seq_lens, step.block_tables, step.stored_rows(step.slots))
        else:
            codes = self.projection.hash_keys(key, self.center.value)
            self.pages.store_codes(codes, step.slots, self._pool)
        if self.center.value is None or self.native is None or self.builder is None:
            return
        if self.native.changes != self._asked_at:
            self._ask(step, self.native, self.builder)

    def forget(self) -> None:
        """Drops all segments, and the counts of them; the centre stays. No builder is at work."""
        self._asked_at = None
        if self.native is not None:
            self.native.forget()

    @property
    def pages(self) -> _C.Pages:
        return self._pages.native

    def freeze(
        self,
        seq_lens: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        stored_rows: Iterable[int],
    ) -> None:
        """Takes the centre from the first of these requests that holds enough keys, if one does, and
        gives codes to all that the pages hold.

        stored_rows: rows of requests whose tokens, seq_lens of them, are all in the pages; padded and
        dummy rows are not among them, since their lengths and blocks mean nothing.
        """
        for row in stored_rows:
            if seq_lens[row] >= MIN_KEYS:
                keys, _ = self._pages.gather(block_tables[row], 0, int(seq_lens[row]))
                self.center.freeze(keys)
                self._backfill()
                return

    def _backfill(self) -> None:
        """Codes for whole blocks: slots that are still empty get theirs when they are written."""
        assert self.center.value is not None
        block_size = self._pages.block_size
        blocks = self.pages.written_blocks().astype(np.int64)
        slots = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
        for start in range(0, len(slots), _SLOTS_PER_BACKFILL):
            some = slots[start : start + _SLOTS_PER_BACKFILL]
            codes = self.projection.hash_keys(self._pages.keys_at(some), self.center.value)
            self.pages.store_codes(codes, some, self._pool)

    def _ask(self, step: Step, native: _C.LshIndex, builder: _C.SegmentBuilder) -> None:
        """Only requests that are long enough to be sampled are worth an index."""
        self._asked_at = native.changes  # before it asks: what changes meanwhile counts later
        rows = [
            row
            for row, length in enumerate(step.seq_lens.tolist())
            if self._options.samples(length)
        ]
        # Also without any such request: what went stale is given back.
        builder.ask(native, np.ascontiguousarray(step.block_tables[rows]), step.seq_lens[rows])


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
    """The index of a layer, or None in exact mode, where there is no centre."""
    if center is None:
        return None
    projection = Projection(options, layer_index, pages.head_size, isa, pool)
    return LshIndex(options, pages, projection, center, pool, builder, max_index_bytes)
