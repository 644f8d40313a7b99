"""One decode step of a sampled layer: hash -> look up -> attend."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from vllm_magicpig import _C
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.lsh_index import LshIndex
from vllm_magicpig.stats import LayerStats
from vllm_magicpig.step import Step


@dataclass(frozen=True)
class DecodeKernel:
    """What the decode steps of one layer share."""

    options: MagicPigOptions
    pages: HostPages
    index: LshIndex | None  # None in exact mode
    scale: float
    isa: _C.Isa
    pool: _C.ThreadPool
    stats: LayerStats

    def attend(self, query: torch.Tensor, step: Step) -> torch.Tensor:
        """query: [num_decodes, num_q_heads, head_size], rows as in step.decode_rows.

        Returns float32 of that shape.
        """
        started = time.perf_counter_ns()
        q = query.float().contiguous()
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2])
        seq_lens = step.seq_lens[step.decode_rows]

        codes = index = rule = center = None
        if self.index is not None and self.index.center.value is not None:
            codes = self.index.projection.hash_queries(q)
            index, rule = self.index.native, self.index.rule
            center = self.index.center.value.numpy()
        hashed = time.perf_counter_ns()

        rows, lookup_ns, attend_ns = _C.decode_attention(
            self.pages.native,
            rule,
            index,
            q.numpy(),
            codes,
            center,
            step.block_tables[step.decode_rows],
            seq_lens,
            out.numpy(),
            lse.numpy(),
            scale=self.scale,
            exact_below=max(self.options.exact_below, 1),
            isa=self.isa,
            pool=self.pool,
        )

        middles = seq_lens.astype(np.int64) - self.options.sink_tokens - self.options.window_tokens
        self.stats.record(rows, middles)
        self.stats.hash_ns += hashed - started
        self.stats.lookup_ns += lookup_ns
        self.stats.attend_ns += attend_ns
        self.stats.decode_ns += time.perf_counter_ns() - started
        return out
