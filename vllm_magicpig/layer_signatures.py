"""The signatures of one layer's pages, and the rule by which its steps draw their lists."""

from __future__ import annotations

import numpy as np
import torch

from vllm_magicpig import _C
from vllm_magicpig.capacity import signature_block_bytes
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.reference import layer_seed
from vllm_magicpig.signature_reference import rotation_signs
from vllm_magicpig.step import Step


class LayerSignatures:
    """128 keys are encoded once all of them are stored, and again where they are written anew, so that
    shared prefixes, preemption and blocks that change their owner need nothing more."""

    def __init__(
        self,
        options: MagicPigOptions,
        pages: HostPages,
        layer_index: int,
        first_kv_head: int,
        isa: _C.Isa,
        pool: _C.ThreadPool,
    ) -> None:
        """first_kv_head: of this rank, among the model's."""
        self._options, self._isa, self._pool = options, isa, pool
        self.pages = pages
        self.block_bytes = signature_block_bytes(
            1, pages.num_kv_heads, pages.head_size, options.bits, pages.block_size
        )
        self.memory = torch.zeros(pages.num_blocks * self.block_bytes, dtype=torch.uint8)
        signs = rotation_signs(pages.head_size, layer_seed(options.seed, layer_index))
        self.native = _C.SignaturePool(
            pages.native, self.memory.numpy(), signs.numpy(), options.bits
        )
        self.rule = _C.SignatureRule(
            sink_tokens=options.sink_tokens,
            window_tokens=options.window_tokens,
            row_budget=options.row_budget,
            seed=options.seed,
            layer=layer_index,
            first_kv_head=first_kv_head,
        )

    def add(self, step: Step) -> None:
        """Encodes what the step's chunks completed, of requests that are long enough to be sampled.

        What decode steps complete, they encode themselves: one block in 128 steps.
        """
        rows = [
            chunk.request
            for chunk in step.chunks
            if self._options.samples(int(step.seq_lens[chunk.request]))
        ]
        if rows:
            self.native.encode(
                np.ascontiguousarray(step.block_tables[rows]),
                step.seq_lens[rows],
                isa=self._isa,
                pool=self._pool,
            )

    @property
    def used_bytes(self) -> int:
        return self.pages.native.num_used_blocks * self.block_bytes
