"""A sampled layer on vLLM's CPU platform: its pages are vLLM's own KV tensor, its steps synchronous."""

from __future__ import annotations

import torch

from vllm_magicpig import _C
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.decode import DecodeKernel
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.layer_signatures import LayerSignatures
from vllm_magicpig.lsh_index import make_index
from vllm_magicpig.prefill import CONTEXT_PIECE_TOKENS, attend_chunk
from vllm_magicpig.stats import LayerStats
from vllm_magicpig.step import Step


class HostLayer:
    def __init__(
        self,
        options: MagicPigOptions,
        layer_index: int,
        kv_cache: torch.Tensor,
        head_size: int,
        scale: float,
        first_kv_head: int,
        center: KeyCenter | None,
        isa: _C.Isa,
        pool: _C.ThreadPool,
        builder: _C.SegmentBuilder | None,
        max_index_bytes: int,
    ) -> None:
        """kv_cache: as for HostPages; first_kv_head: of this rank; center, builder: None where no
        buckets are used."""
        self.pages = HostPages(kv_cache, head_size, options.num_tables)
        self.index = make_index(
            options, self.pages, layer_index, center, isa, pool, builder, max_index_bytes
        )
        self.signatures = (
            LayerSignatures(options, self.pages, layer_index, first_kv_head, isa, pool)
            if options.has_signatures
            else None
        )
        index = self.index if self.signatures is None else self.signatures
        self._kernel = DecodeKernel(options, self.pages, index, scale, isa, pool)
        self._scale, self.pool = scale, pool

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        step: Step,
    ) -> None:
        """Stores the step's tokens, then writes their attention to `output`; shapes as for the impl."""
        if step.is_dummy:
            output.zero_()
            return
        key, value = key[: step.num_tokens], value[: step.num_tokens]
        self.pages.store_rows(key, value, step.slots, self.pool)
        if self.index is not None:
            self.index.add(key, step)
        if self.signatures is not None:
            self.signatures.add(step)
        for chunk in step.chunks:
            tokens = slice(chunk.start, chunk.stop)
            context = self.pages.pieces(
                step.block_tables[chunk.request], chunk.context_len, CONTEXT_PIECE_TOKENS
            )
            output[tokens] = attend_chunk(
                query[tokens], key[tokens], value[tokens], context, self._scale
            )
        if step.decode_rows.size:
            self._kernel.attend(query, output, step)

    def forget(self) -> None:
        self.pages.native.forget()
        if self.index is not None:
            self.index.forget()
        self._kernel.forget_steps()

    def take_center(self) -> None:
        """Samples from now on: the centre has just been fixed."""
        assert self.index is not None
        self._kernel.take_center(self.index.center)

    def stats(self) -> LayerStats:
        return self._kernel.stats()
