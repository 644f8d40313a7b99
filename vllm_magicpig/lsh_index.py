"""The LSH side of one sampled layer's pages: codes for what is stored, segments for what is sealed."""

from __future__ import annotations

import numpy as np
import torch

from vllm_magicpig import _C
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import MIN_KEYS, KeyCenter
from vllm_magicpig.projection import Projection
from vllm_magicpig.step import Step

SEGMENT_TOKENS = 2048
"""One segment size for now: building one stalls a decode step for about a millisecond per kv head,
and a tail of up to this length is compared by code."""

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
    ) -> None:
        self._options, self._pages, self._pool = options, pages, pool
        self.projection, self.center = projection, center
        block_size = pages.block_size
        segment_tokens = -(-SEGMENT_TOKENS // block_size) * block_size
        self.native = _C.LshIndex(pages.native, options.K, segment_tokens)
        self.table = _C.InclusionTable(options.K, options.L, options.min_matches)
        # Slots whose rows were stored before the centre was frozen and which still lack codes.
        self._uncoded = (
            np.zeros(pages.num_blocks * block_size, dtype=bool) if center.value is None else None
        )

    def add(self, key: torch.Tensor, step: Step) -> None:
        """Codes for keys whose rows were just stored, then segments for what they completed.

        key: [num_tokens, num_kv_heads, head_size].
        """
        if self.center.value is None:
            assert self._uncoded is not None
            self._uncoded[step.slots[step.slots >= 0]] = True
            self._freeze_center(step)
        else:
            codes = self.projection.hash_keys(key, self.center.value)
            self.pages.store_codes(codes, step.slots, self._pool)
        if self.center.value is not None:
            self._seal(step)

    @property
    def pages(self) -> _C.Pages:
        return self._pages.native

    def _freeze_center(self, step: Step) -> None:
        """Takes the first request of this step that holds enough keys, and codes what was stored."""
        long_enough = np.flatnonzero(step.seq_lens >= MIN_KEYS)
        for row in long_enough.tolist():
            start, stop = _tokens_of(step, row)
            if stop == start or not bool((step.slots[start:stop] >= 0).all()):
                continue  # a padded or dummy row: its length and blocks mean nothing
            keys, _ = self._pages.gather(step.block_tables[row], 0, int(step.seq_lens[row]))
            self.center.freeze(keys)
            self._backfill()
            return

    def _backfill(self) -> None:
        assert self._uncoded is not None
        assert self.center.value is not None
        slots = np.flatnonzero(self._uncoded)
        for start in range(0, len(slots), _SLOTS_PER_BACKFILL):
            some = slots[start : start + _SLOTS_PER_BACKFILL]
            codes = self.projection.hash_keys(self._pages.keys_at(some), self.center.value)
            self.pages.store_codes(codes, some, self._pool)
        self._uncoded = None

    def _seal(self, step: Step) -> None:
        """Only requests that are long enough to be sampled are worth an index."""
        rows = [
            row
            for row, length in enumerate(step.seq_lens.tolist())
            if self._options.samples(length)
        ]
        if rows:
            self.native.seal(
                np.ascontiguousarray(step.block_tables[rows]), step.seq_lens[rows], self._pool
            )


def _tokens_of(step: Step, row: int) -> tuple[int, int]:
    """Flat positions [start, stop) of a request's tokens of this step."""
    for chunk in step.chunks:
        if chunk.request == row:
            return chunk.start, chunk.stop
    decoding = np.flatnonzero(step.decode_rows == row)
    if decoding.size == 0:
        return 0, 0
    token = int(step.decode_tokens[decoding[0]])
    return token, token + 1
