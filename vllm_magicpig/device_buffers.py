"""Memory that all sampled layers of a device share, allocated once. What lies on the device is there
before vLLM sizes its cache.

Every layer joins its streams to the main one before it ends, and layers follow one another on the
main stream, so one set serves them all. What runs in encode_stream, which is not joined, uses none of
this memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_magicpig import _C
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.device import Device
from vllm_magicpig.host_pages import row_bits

STAGING_TOKENS = 8192
"""Tokens of context in a staging buffer: 32 MiB at 8 kv heads of size 128 in bf16. A chunk of 8K
tokens attends them for longer than PCIe takes to bring the next ones."""


@dataclass(frozen=True)
class LayerShape:
    """Of one rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


class DecodeBuffers:
    """What goes to the host and back for the decode step of a layer; pinned but for out_device."""

    def __init__(
        self, device: Device, shape: LayerShape, options: MagicPigOptions, max_reqs: int
    ) -> None:
        heads = (max_reqs, shape.num_heads)
        kv_heads = (max_reqs, shape.num_kv_heads)
        self.query = device.pinned((*heads, shape.head_size), torch.float32)
        self.key = device.pinned((*kv_heads, shape.head_size), shape.dtype)
        self.value = device.pinned((*kv_heads, shape.head_size), shape.dtype)
        self.query_codes = self.key_codes = None
        if options.has_buckets:
            self.query_codes = device.pinned((*heads, options.num_tables), torch.uint16)
            self.key_codes = device.pinned((*kv_heads, options.num_tables), torch.uint16)
        self.out = device.pinned((*heads, shape.head_size), torch.float32)
        self.out_device = torch.empty_like(self.out, device=device.torch_device)
        self.native = _C.DecodeExchange(
            self.query.numpy(),
            row_bits(self.key),
            row_bits(self.value),
            None if self.query_codes is None else self.query_codes.numpy(),
            None if self.key_codes is None else self.key_codes.numpy(),
            self.out.numpy(),
        )


class PrefillBuffers:
    """Device memory of a prefill chunk: codes, two staging buffers and partial results."""

    def __init__(
        self, device: Device, shape: LayerShape, options: MagicPigOptions, max_tokens: int
    ) -> None:
        def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device.torch_device)

        kv_row = (shape.num_kv_heads, shape.head_size)
        self.key_codes = (
            empty(max_tokens, shape.num_kv_heads, options.num_tables, dtype=torch.uint16)
            if options.has_buckets
            else None
        )
        self.staging_tokens = STAGING_TOKENS
        self.keys = [empty(self.staging_tokens, *kv_row) for _ in range(2)]
        self.values = [empty(self.staging_tokens, *kv_row) for _ in range(2)]
        self.part = empty(max_tokens, shape.num_heads, shape.head_size)
        self.out = empty(max_tokens, shape.num_heads, shape.head_size, dtype=torch.float32)
        self.lse = empty(shape.num_heads, max_tokens, dtype=torch.float32)


class StepBuffers:
    """Pinned copies of what vLLM knows of a step on the device only."""

    def __init__(self, device: Device, max_reqs: int, max_blocks: int, max_tokens: int) -> None:
        self.block_tables = device.pinned((max_reqs, max_blocks), torch.int32)
        self.seq_lens = device.pinned((max_reqs,), torch.int32)
        self.slots = device.pinned((max_tokens,), torch.int64)
        self.native = _C.StreamMetadata(
            self.block_tables.numpy(), self.seq_lens.numpy(), self.slots.numpy()
        )


class DeviceBuffers:
    def __init__(
        self,
        device: Device,
        options: MagicPigOptions,
        shapes: set[LayerShape],
        *,
        max_reqs: int,
        max_tokens: int,
    ) -> None:
        """max_reqs, max_tokens: of an engine step."""
        self._device, self._max_reqs, self._max_tokens = device, max_reqs, max_tokens
        self.decode = {s: DecodeBuffers(device, s, options, max_reqs) for s in shapes}
        self.prefill = {s: PrefillBuffers(device, s, options, max_tokens) for s in shapes}
        self.store_stream = device.new_stream()
        self.decode_stream = device.new_stream()
        self.encode_stream = device.new_stream()

    def make_step_buffers(self, max_blocks: int) -> None:
        """`step`, all of it host memory, once vLLM's max_model_len is final: with --max-model-len -1
        that is after the cache is sized. max_blocks: of a request."""
        self.step = StepBuffers(self._device, self._max_reqs, max_blocks, self._max_tokens)
