"""One decode step of a sampled layer."""

from __future__ import annotations

import torch

from vllm_magicpig import _C
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.layer_signatures import LayerSignatures
from vllm_magicpig.lsh_index import LshIndex
from vllm_magicpig.stats import LayerStats
from vllm_magicpig.step import Step


class DecodeKernel:
    """The native layer; by buckets, it attends exactly until `take_center`."""

    def __init__(
        self,
        options: MagicPigOptions,
        pages: HostPages,
        index: LshIndex | LayerSignatures | None,
        scale: float,
        isa: _C.Isa,
        pool: _C.ThreadPool,
    ) -> None:
        """index: None in exact mode."""
        self._pages = pages
        exact_below = max(options.exact_below, 1)
        if isinstance(index, LayerSignatures):
            self._native = _C.DecodeLayer.of_signatures(
                index.native, index.rule, scale=scale, exact_below=exact_below, isa=isa, pool=pool
            )
            return
        self._native = _C.DecodeLayer(
            pages.native,
            None if index is None else index.rule,
            None if index is None else index.native,
            None if index is None else index.projection.native,
            scale=scale,
            exact_below=exact_below,
            isa=isa,
            pool=pool,
        )
        if index is not None and index.center.value is not None:
            self.take_center(index.center)

    def take_center(self, center: KeyCenter) -> None:
        """Once, when it is fixed."""
        self._native.set_center(center.array)

    def attend(self, query: torch.Tensor, out: torch.Tensor, step: Step) -> None:
        """query: [num_tokens, num_q_heads, head_size] in the pages' dtype or float32; out: likewise,
        its rows step.decode_tokens are written."""
        self._native.attend(query, step.decode_batch(self._pages), out)

    def forget_steps(self) -> None:
        self._native.forget_steps()

    def stats(self) -> LayerStats:
        return LayerStats.from_counters(self._native.counters, self._native.recent_rows())
