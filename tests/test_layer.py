"""One sampled layer without an engine: pages, codes, centre, segments and a decode step, fed with
steps as vLLM's runner makes them, against the reference on what each request logically holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_magicpig import _C, reference
from vllm_magicpig.capacity import content_bytes
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.decode import DecodeKernel
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.lsh_index import LshIndex
from vllm_magicpig.projection import Projection
from vllm_magicpig.step import Chunk, Step

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 64, 128, 64
OPTIONS = MagicPigOptions(index="buckets", K=6, L=40, exact_below=256)


class Layer:
    """A layer's pages and index, and the keys and values that each request has stored."""

    def __init__(self, dtype: torch.dtype = torch.float32, is_fixed: bool = True) -> None:
        torch.manual_seed(0)
        width = content_bytes(HEAD_SIZE, dtype.itemsize, OPTIONS.num_tables) // dtype.itemsize
        # Rows that no request has stored are no numbers, as those of an overflow would be.
        kv_cache = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, width), torch.nan, dtype=dtype)
        self.dtype = dtype
        self.isa, self.pool = _C.resolve_isa("auto"), _C.ThreadPool([0, 0])
        self.pages = HostPages(kv_cache, HEAD_SIZE, OPTIONS.num_tables)
        self.center = KeyCenter("passage", 3, 0, KV_HEADS)
        if is_fixed:
            self.fix_center()
        self.projection = Projection(OPTIONS, 3, HEAD_SIZE, self.isa, self.pool)
        self.builder = _C.SegmentBuilder([0])
        self.index = LshIndex(
            OPTIONS, self.pages, self.projection, self.center, self.pool, self.builder
        )
        self.kernel = DecodeKernel(OPTIONS, self.pages, self.index, 0.125, self.isa, self.pool)
        self.keys: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.blocks: dict[str, list[int]] = {}
        self._free = list(range(NUM_BLOCKS - 1, 0, -1))

    def fix_center(self) -> None:
        self.center.observe(torch.randn(512, KV_HEADS, HEAD_SIZE) + 3.0)
        assert self.center.fix(HEAD_SIZE)

    def append(self, request: str, num_tokens: int) -> Step:
        """Stores num_tokens random tokens of a request; a chunk, or a decode step when it is one."""
        key, value = (torch.randn(num_tokens, KV_HEADS, HEAD_SIZE) for _ in range(2))
        key, value = (key + 3.0).to(self.dtype), value.to(self.dtype)
        context = self.keys[request].shape[0] if request in self.keys else 0
        blocks = self.blocks.setdefault(request, [])
        while len(blocks) * BLOCK_SIZE < context + num_tokens:
            blocks.append(self._free.pop())
        positions = np.arange(context, context + num_tokens)
        slots = np.array(blocks)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        table = np.zeros((1, NUM_BLOCKS), dtype=np.int32)
        table[0, : len(blocks)] = blocks
        decoding = num_tokens == 1
        step = Step(
            num_tokens=num_tokens,
            slots=slots,
            block_tables=table,
            seq_lens=np.array([context + num_tokens], dtype=np.int32),
            chunks=() if decoding else (Chunk(0, 0, num_tokens, context),),
            decode_rows=np.arange(1 if decoding else 0),
            decode_tokens=np.arange(1 if decoding else 0),
        )
        self.pages.store_rows(key, value, slots, self.pool)
        self.index.add(key, step)
        empty = torch.zeros(0, KV_HEADS, HEAD_SIZE, dtype=self.dtype)
        self.keys[request] = torch.cat([self.keys.get(request, empty), key])
        self.values[request] = torch.cat([self.values.get(request, empty), value])
        return step

    def expected(self, request: str, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, mask) of the reference for one decode query [num_heads, head_size]."""
        assert self.center.value is not None
        keys, values = (x[request].transpose(0, 1) for x in (self.keys, self.values))
        directions = self.projection.directions
        centred = keys.float() - self.center.value[:, None]
        key_codes = reference.hash_codes(centred, directions, OPTIONS.K)
        query_codes = reference.hash_codes(query.float(), directions, OPTIONS.K)
        mask = reference.sample(
            query_codes, key_codes, OPTIONS.min_matches, OPTIONS.sink_tokens, OPTIONS.window_tokens
        )
        out, _ = reference.sampled_attention(
            query, keys, values, 0.125, mask, self.center.value, OPTIONS.K, OPTIONS.L,
            [(OPTIONS.min_matches, 1.0)] * len(mask), OPTIONS.sink_tokens, OPTIONS.window_tokens,
        )  # fmt: skip
        return out, mask


@pytest.fixture
def layer() -> Layer:
    return Layer()


def attend(layer: Layer, query: torch.Tensor, step: Step) -> torch.Tensor:
    """Not rounded to the layer's dtype."""
    out = torch.empty(query.shape)
    layer.kernel.attend(query, out, step)
    return out


def assert_decodes_as_the_reference(layer: Layer, request: str) -> None:
    step = layer.append(request, 1)
    query = torch.randn(1, HEADS, HEAD_SIZE).to(layer.dtype)
    before = layer.kernel.stats().sampled_rows
    out = attend(layer, query, step)[0]
    expected, mask = layer.expected(request, query[0])
    # Codes come from GEMMs of other shapes, so a projection within rounding of zero may fall on the
    # other side: the samples are compared by size, the outputs where they are the same.
    assert layer.kernel.stats().sampled_rows - before == mask.sum()
    assert (out.double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prompt_in_chunks_then_decode_steps(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    for num_tokens in (700, 900, 600):
        layer.append("a", num_tokens)
    for _ in range(3):
        assert_decodes_as_the_reference(layer, "a")
    layer.builder.drain()
    assert_decodes_as_the_reference(layer, "a")
    table = np.array(layer.blocks["a"], np.int32)
    assert layer.index.native.find(table, 2204) == [(0, 2048)]


def test_nobody_waits_for_the_builder_and_its_progress_changes_no_sample() -> None:
    """The same life with a builder that has ended, one that is drained after each step and one that
    works beside the steps: the same bits out."""
    outs: dict[str, list[torch.Tensor]] = {}
    built = {}
    for builder in ("ended", "drained", "racing"):
        layer = Layer()
        if builder == "ended":
            layer.builder.close()
        outs[builder] = []
        for request, num_tokens in (("a", 1500), ("b", 2100), ("a", 2590)):
            layer.append(request, num_tokens)
        torch.manual_seed(1)
        for _ in range(30):
            for request in ("a", "b"):
                step = layer.append(request, 1)
                outs[builder].append(attend(layer, torch.randn(1, HEADS, HEAD_SIZE), step))
            if builder == "drained":
                layer.builder.drain()
        layer.builder.raise_error()
        layer.index.native.clear()
        built[builder] = layer.index.native.segments_built
    for other in ("drained", "racing"):
        assert all(map(torch.equal, outs["ended"], outs[other]))
    assert built["ended"] == 0
    # The last levels of 4,120 and of 2,130 tokens; whether those before them came first is chance.
    assert built["drained"] >= 3


def test_python_asks_only_when_something_changed(layer: Layer) -> None:
    layer.append("a", 3000)
    asked = []
    ask = layer.index._ask
    layer.index._ask = lambda step, *rest: (asked.append(int(step.seq_lens[0])), ask(step, *rest))  # type: ignore[method-assign]
    for _ in range(80):
        layer.builder.drain()
        layer.append("a", 1)
    # 3,001: the builder had built. 3,073: a block was begun, behind the one that completed the third
    # segment; 3,074: that one was built.
    assert asked == [3001, 3073, 3074]
    table = np.array(layer.blocks["a"], np.int32)
    assert layer.index.native.find(table, 3080) == [(0, 2048), (2048, 3072)]


def test_memory_of_a_finished_request_is_given_back_by_the_steps_of_others(layer: Layer) -> None:
    layer.append("a", 3200)
    layer.append("b", 600)
    layer.builder.drain()
    assert layer.index.native.num_segments == 2
    layer._free += reversed(layer.blocks.pop("a"))
    layer.append("c", 200)
    layer.builder.drain()
    assert layer.index.native.num_segments == 1, "the first lost two of its blocks"
    layer.append("d", 900)
    layer.append("e", 900)
    layer.append("f", 900)
    layer.builder.drain()
    assert (layer.index.native.num_segments, layer.index.native.num_bytes) == (0, 0)


def test_an_index_goes_while_the_builder_works_for_it(layer: Layer) -> None:
    for request in "abc":
        layer.append(request, 2100)
    pages = layer.pages.native
    del layer.index, layer.kernel
    assert layer.builder.pending == 0
    assert pages.num_tokens == 6300
    layer.builder.drain()
    layer.builder.raise_error()


def test_until_the_centre_is_fixed_keys_have_no_codes_and_decode_is_exact() -> None:
    """As while the worker's passage runs, whose blocks are forgotten after it."""
    layer = Layer(is_fixed=False)
    layer.append("a", 500)
    step = layer.append("a", 1)
    query = torch.randn(1, HEADS, HEAD_SIZE)
    out = attend(layer, query, step)[0]
    keys, values = (x["a"].transpose(0, 1) for x in (layer.keys, layer.values))
    expected, _ = reference.exact_attention(query[0], keys, values, 0.125)
    assert (out.double() - expected).abs().max() < 1e-5
    assert layer.kernel.stats().exact_heads == HEADS
    assert layer.center.value is None
    layer.fix_center()
    layer.kernel.take_center(layer.center)
    layer.append("b", 700)
    assert_decodes_as_the_reference(layer, "b")


def test_gathered_pieces_are_the_rows_in_order(layer: Layer) -> None:
    layer.append("a", 300)
    layer.append("b", 130)
    layer.append("a", 77)
    table = np.array(layer.blocks["a"], dtype=np.int32)
    for piece_tokens in (64, 100, 128, 1000):
        pieces = list(layer.pages.pieces(table, 377, piece_tokens))
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
        assert torch.equal(keys, layer.keys["a"].transpose(0, 1))
        assert torch.equal(values, layer.values["a"].transpose(0, 1))


def test_hashing_in_any_batch_is_the_references_but_for_signs_within_rounding_of_zero(
    layer: Layer,
) -> None:
    keys = torch.randn(3000, KV_HEADS, HEAD_SIZE)
    center = torch.randn(KV_HEADS, HEAD_SIZE)
    codes = layer.projection.hash_keys(keys, center).astype(np.int32)
    directions = layer.projection.directions.double()
    projections = (keys - center).double() @ directions
    # |x . r| is summed over head_size terms in float32, in any order.
    magnitude = (keys - center).double().abs() @ directions.abs()
    doubtful = projections.abs() <= HEAD_SIZE * 2.0**-24 * magnitude
    assert doubtful.double().mean() < 1e-4
    bits = (torch.from_numpy(codes)[..., None] >> torch.arange(OPTIONS.K)) & 1
    expected = (projections > 0).view(3000, KV_HEADS, OPTIONS.L, OPTIONS.K)
    certain = ~doubtful.view_as(expected)
    assert torch.equal(bits.bool()[certain], expected[certain])
