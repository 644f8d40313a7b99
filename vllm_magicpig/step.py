"""What one engine step asks of the attention layers, made once for all of them.

`split_requests` reads what vLLM knows on the host on every platform; `make_step` adds the rest where
all of vLLM's metadata is in host memory (stream_step.py does so where it is on a device).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from vllm_magicpig import _C
from vllm_magicpig.host_pages import HostPages


@dataclass(frozen=True)
class Chunk:
    """A request's tokens of this step that are attended densely (prefill, also of one token)."""

    request: int  # row of the block tables
    start: int  # first token in the step's flat tensors
    stop: int
    context_len: int  # tokens of the request that earlier steps stored


@dataclass(frozen=True)
class Requests:
    """seq_lens: int32 [num_reqs], this step's tokens included; decode_rows: int64 [num_decodes], rows
    of requests that decode one token; decode_tokens: int64 [num_decodes], their flat positions.
    """

    num_tokens: int
    seq_lens: npt.NDArray[np.int32]
    chunks: tuple[Chunk, ...]
    decode_rows: npt.NDArray[np.int64]
    decode_tokens: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step(AttentionMetadata, Requests):
    """slots: int64 [num_tokens], -1 = not stored; block_tables: int32 [num_reqs, max_blocks]."""

    slots: npt.NDArray[np.int64]
    block_tables: npt.NDArray[np.int32]

    @cached_property
    def _decode_batches(self) -> dict[tuple[int, int], _C.DecodeBatch]:
        return {}

    def decode_batch(self, pages: HostPages) -> _C.DecodeBatch:
        """The decode_rows and decode_tokens, made for the first layer of so many blocks that asks."""
        shape = (pages.num_blocks, pages.block_size)
        batch = self._decode_batches.get(shape)
        if batch is None:
            rows = self.decode_rows
            batch = _C.DecodeBatch(
                pages.native, self.block_tables[rows], self.seq_lens[rows], self.decode_tokens
            )
            self._decode_batches[shape] = batch
        return batch

    @cached_property
    def is_dummy(self) -> bool:
        """Warm-up and profiling runs store nothing; their lengths and block tables mean nothing."""
        return not bool((self.slots >= 0).any())


def split_requests(metadata: CommonAttentionMetadata, seq_lens: torch.Tensor) -> Requests:
    """Which requests decode one token and which are chunks of a prompt.

    seq_lens: [at least num_reqs], in host memory.
    """
    if metadata.causal is not True:  # models known for this are refused at start-up
        raise NotImplementedError(
            "magicpig does not support attention in both directions, it supports causal attention; "
            "choose another --attention-backend for this model."
        )
    starts = metadata.query_start_loc_cpu.numpy()
    num_reqs = min(metadata.num_reqs, len(starts) - 1)
    # num_actual_tokens may be padded; the last start is what the requests really have.
    num_tokens = min(metadata.num_actual_tokens, int(starts[num_reqs]))
    lengths = _int32(seq_lens[:num_reqs])
    query_lens = np.diff(starts[: num_reqs + 1])
    prefilling = np.zeros(num_reqs, dtype=bool)
    if metadata.is_prefilling is not None:
        prefilling |= metadata.is_prefilling[:num_reqs].numpy()
    decodes = (query_lens == 1) & ~prefilling
    chunks = tuple(
        Chunk(
            request=row,
            start=int(starts[row]),
            stop=int(starts[row + 1]),
            context_len=int(lengths[row] - query_lens[row]),
        )
        for row in np.flatnonzero((query_lens > 0) & ~decodes).tolist()
    )
    decode_rows = np.flatnonzero(decodes)
    return Requests(
        num_tokens=num_tokens,
        seq_lens=lengths,
        chunks=chunks,
        decode_rows=decode_rows,
        decode_tokens=starts[decode_rows].astype(np.int64),
    )


def make_step(metadata: CommonAttentionMetadata) -> Step:
    """The step where vLLM's block tables, lengths and slots are in host memory (CPU platform)."""
    requests = split_requests(metadata, metadata.seq_lens)
    return Step(
        **vars(requests),
        slots=metadata.slot_mapping[: requests.num_tokens].to(torch.int64).numpy(),
        block_tables=_int32(metadata.block_table_tensor[: len(requests.seq_lens)]),
    )


def _int32(tensor: torch.Tensor) -> npt.NDArray[np.int32]:
    # Copied: the runner reuses its buffers for the next step while nothing here says it may not.
    return np.array(tensor.to(torch.int32).numpy(), copy=True)
