"""An engine step where vLLM's block tables, lengths and slots are on a device.

What Python must know to launch work (how many requests decode, which tokens are chunks, how long
their context is) vLLM has on the host; the rest is copied to pinned memory in stream order, where
only the host callbacks read it, so that Python never waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from vllm_magicpig import _C
from vllm_magicpig.device import Device
from vllm_magicpig.device_buffers import StepBuffers
from vllm_magicpig.flash import Ragged
from vllm_magicpig.step import Chunk, Requests, split_requests


@dataclass(frozen=True)
class Span:
    """Chunks whose tokens lie one after another, so that one call serves them all."""

    chunks: tuple[Chunk, ...]
    queries: Ragged

    @property
    def tokens(self) -> slice:
        return slice(self.chunks[0].start, self.chunks[-1].stop)


@dataclass(frozen=True)
class DeviceStep(AttentionMetadata, Requests):
    """block_tables: int32 [num_reqs, max_blocks] and slots: int64 [num_tokens], both on the device;
    decode_index: where the decode tokens are in the flat tensors."""

    spans: tuple[Span, ...]
    block_tables: torch.Tensor
    slots: torch.Tensor
    decode_index: slice | torch.Tensor
    buffers: StepBuffers
    native: _C.StreamStep

    @property
    def num_decodes(self) -> int:
        return len(self.decode_rows)


def make_device_step(
    metadata: CommonAttentionMetadata, device: Device, buffers: StepBuffers
) -> DeviceStep:
    # vLLM calls it an upper bound for speculative decoding's sake, which is refused at start-up: it
    # is exact without.
    seq_lens = metadata.seq_lens_cpu_upper_bound
    assert seq_lens is not None, "vLLM 0.32's runners always give it"
    requests = split_requests(metadata, seq_lens)
    num_reqs = len(requests.seq_lens)
    block_tables = metadata.block_table_tensor[:num_reqs]
    slots = metadata.slot_mapping[: requests.num_tokens].to(torch.int64)
    device.launch(_copy_to_host, buffers, block_tables, metadata.seq_lens[:num_reqs], slots)
    native = _C.StreamStep(
        buffers.native,
        num_reqs,
        requests.num_tokens,
        requests.decode_rows.astype(np.int32),
        requests.decode_tokens,
        np.array([chunk.request for chunk in requests.chunks], dtype=np.int32),
        np.array([chunk.start for chunk in requests.chunks], dtype=np.int64),
        np.array([chunk.stop for chunk in requests.chunks], dtype=np.int64),
    )
    return DeviceStep(
        **vars(requests),
        spans=tuple(_spans(requests.chunks, metadata.query_start_loc)),
        block_tables=block_tables,
        slots=slots,
        decode_index=_index(requests, device.torch_device),
        buffers=buffers,
        native=native,
    )


def _copy_to_host(
    buffers: StepBuffers, block_tables: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor
) -> None:
    num_reqs, width = block_tables.shape[0], buffers.block_tables.shape[1]
    tables = block_tables[:, :width].to(torch.int32)
    # A table is as wide as its runner likes: past max_model_len there are no blocks.
    if tables.shape[1] < width:
        tables = pad(tables, (0, width - tables.shape[1]))
    # Whole rows of one contiguous source: any other copy to the host would wait for the device.
    tables = tables.contiguous()
    buffers.block_tables[:num_reqs].copy_(tables, non_blocking=True)
    buffers.seq_lens[:num_reqs].copy_(seq_lens.to(torch.int32), non_blocking=True)
    buffers.slots[: slots.shape[0]].copy_(slots, non_blocking=True)


def _spans(chunks: tuple[Chunk, ...], query_start_loc: torch.Tensor) -> list[Span]:
    spans = []
    # Adjacent chunks are those of adjacent requests: their row numbers rise in step.
    for _, run in groupby(enumerate(chunks), key=lambda pair: pair[1].request - pair[0]):
        some = tuple(chunk for _, chunk in run)
        starts = query_start_loc[some[0].request : some[-1].request + 2] - some[0].start
        lens = tuple(chunk.stop - chunk.start for chunk in some)
        spans.append(Span(some, Ragged(lens, starts.to(torch.int32))))
    return spans


def _index(requests: Requests, torch_device: torch.device) -> slice | torch.Tensor:
    tokens = requests.decode_tokens
    if len(tokens) == 0:
        return slice(0, 0)
    if int(tokens[-1] - tokens[0]) == len(tokens) - 1:
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    host = torch.from_numpy(tokens)
    if torch_device.type == "cuda":
        host = host.pin_memory()
    return host.to(torch_device, non_blocking=True)
