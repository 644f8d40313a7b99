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

    def attend(self, query: torch.Tensor, out: torch.Tensor, step: Step) -> None:
        """query: [num_decodes, num_q_heads, head_size] in the pages' dtype, rows as in
        step.decode_rows; out: likewise or float32, contiguous, is written.
        """
        started = time.perf_counter_ns()

        hasher = index = rule = center = None
        if self.index is not None and self.index.center.value is not None:
            hasher = self.index.projection.native
            index, rule = self.index.native, self.index.rule
            center = self.index.center.array

        rows, hash_ns, lookup_ns, attend_ns = _C.decode_attention(
            self.pages.native,
            rule,
            index,
            query,
            hasher,
            center,
            step.decode_tables,
            step.decode_lens,
            out,
            None,
            scale=self.scale,
            exact_below=max(self.options.exact_below, 1),
            isa=self.isa,
            pool=self.pool,
        )

        sinks_and_window = self.options.sink_tokens + self.options.window_tokens
        middles = step.decode_lens.astype(np.int64) - sinks_and_window
        self.stats.record(rows, middles)
        self.stats.hash_ns += hash_ns
        self.stats.lookup_ns += lookup_ns
        self.stats.attend_ns += attend_ns
        self.stats.decode_ns += time.perf_counter_ns() - started
