"""One layer as the benchmarks decode it: the project's pages, index and kernel, vLLM's own cache and op
over the same rows, and the reference layout's lookup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import bench_build
import numpy as np
import numpy.typing as npt
import torch
from bench_geometries import AttentionLayer

from vllm_magicpig import _C
from vllm_magicpig.capacity import segment_levels
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.host_pages import row_bits
from vllm_magicpig.lsh_index import sample_rule
from vllm_magicpig.projection import Projection

BLOCK_SIZE = 128
MIN_MATCHES = 2
SINK_TOKENS, WINDOW_TOKENS = 4, 64
STORE_TOKENS = 8192  # hashed and stored at a time: bounds the projections held


@dataclass(frozen=True)
class Config:
    """K, L: bits and tables; rows: share of the middle to sample, None for what `MIN_MATCHES` matches
    give."""

    K: int
    L: int
    rows: float | None = None

    @property
    def name(self) -> str:
        budget = "" if self.rows is None else f" at {100 * self.rows:g} %"
        return f"buckets ({self.K},{self.L}){budget}"


BUCKETS = [Config(10, 150), Config(9, 120), Config(8, 75)]


def options_of(config: Config) -> MagicPigOptions:
    """What a server would run it with."""
    return MagicPigOptions(
        index="buckets",
        K=config.K,
        L=config.L,
        min_matches=MIN_MATCHES,
        rows=config.rows,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
    )


def make_index(pages: _C.Pages, config: Config, level: int | None = None) -> _C.LshIndex:
    """The index as it is served, or with segments of one size."""
    levels = list(segment_levels(BLOCK_SIZE)) if level is None else [level]
    return _C.LshIndex(pages, config.K, levels)


# ------------------------------------------------------------------------------------- the layer


@dataclass(frozen=True)
class Placement:
    """Where requests of the same length lie: every block anywhere. seq_lens: the tokens stored."""

    block_tables: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]

    @staticmethod
    def shuffled(num_requests: int, num_tokens: int, seed: int = 0) -> Placement:
        width = -(-num_tokens // BLOCK_SIZE)
        order = np.random.default_rng(seed).permutation(num_requests * width)
        return Placement(
            order.reshape(num_requests, width).astype(np.int32),
            np.full(num_requests, num_tokens, np.int32),
        )

    @property
    def num_blocks(self) -> int:
        return self.block_tables.size

    def slots(self, request: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        tokens = np.arange(start, stop)
        blocks = self.block_tables[request].astype(np.int64)
        return blocks[tokens // BLOCK_SIZE] * BLOCK_SIZE + tokens % BLOCK_SIZE


def page_memory(num_bytes: int, native: ModuleType) -> npt.NDArray[np.uint8]:
    """Untouched memory that asks for huge pages: each side of a comparison gets the same kind."""
    memory = np.empty(num_bytes, np.uint8)
    native.advise_huge_pages(memory)
    return memory


@dataclass(frozen=True)
class Counted:
    """Sampled steps of a decoder together. rows: sampled by all query heads; lookup_ns, attend_ns:
    summed over threads."""

    steps: int
    rows: int
    lookup_ns: int
    attend_ns: int


class SampledLayer:
    """Pages, codes and index of one config over `requests`, all of the same length and heads."""

    def __init__(
        self,
        config: Config,
        requests: Sequence[AttentionLayer],
        placement: Placement,
        native: ModuleType,
        isa: _C.Isa,
        pool: _C.ThreadPool,
        num_stored: int | None = None,
    ) -> None:
        """num_stored: tokens of each request to store now, all by default."""
        self.config, self.requests, self.placement = config, requests, placement
        self.head_size = requests[0].keys.shape[2]
        self.num_kv_heads = requests[0].keys.shape[0]
        self.scale = self.head_size**-0.5
        self.chunk_bytes = _C.Pages.chunk_bytes("bfloat16", BLOCK_SIZE, self.head_size, config.L)
        shape = (placement.num_blocks, self.num_kv_heads, self.chunk_bytes)
        self._memory = page_memory(int(np.prod(shape)), native).reshape(shape)
        self.pages = _C.Pages(self._memory, "bfloat16", BLOCK_SIZE, self.head_size, config.L)
        # One centre for all requests, as in a server.
        self.center = requests[0].center
        projection = self.projection(isa, pool)
        for number, request in enumerate(requests):
            num_tokens = request.num_tokens if num_stored is None else num_stored
            for start in range(0, num_tokens, STORE_TOKENS):
                stop = min(start + STORE_TOKENS, num_tokens)
                self.store(number, start, stop, request, projection, pool)
        self.index = make_index(self.pages, config)
        if num_stored is None:
            self.index.seal(placement.block_tables, placement.seq_lens, pool)

    def projection(self, isa: _C.Isa, pool: _C.ThreadPool) -> Projection:
        return Projection(options_of(self.config), 0, self.head_size, isa, pool)

    def store(
        self,
        request: int,
        start: int,
        stop: int,
        rows: AttentionLayer,
        projection: Projection,
        pool: _C.ThreadPool,
    ) -> None:
        """Rows and codes of these tokens."""
        keys = rows.keys[:, start:stop].transpose(0, 1).bfloat16()
        values = rows.values[:, start:stop].transpose(0, 1).bfloat16()
        slots = self.placement.slots(request, start, stop)
        self.pages.store_rows(row_bits(keys), row_bits(values), slots, pool)
        self.pages.store_codes(projection.hash_keys(keys, self.center), slots, pool)

    @property
    def row_bytes(self) -> int:
        """K and V of one token and kv head."""
        return 2 * 2 * self.head_size

    @property
    def code_bytes(self) -> int:
        return 2 * self.config.L

    def index_bytes_per_token(self) -> float:
        """Per token and kv head, of the tokens stored."""
        return self.index.num_bytes / (int(self.placement.seq_lens.sum()) * self.num_kv_heads)


def kernel_pool(cpus: Sequence[int]) -> _C.ThreadPool:
    """As a worker of the CPU platform makes it, once `use_cpus` has bound torch's threads to these."""
    return _C.ThreadPool.of_openmp(len(cpus)) if len(cpus) > 1 else _C.ThreadPool(list(cpus))


class Decoder:
    """Decode steps of a SampledLayer with one instruction set and one set of threads."""

    def __init__(
        self,
        layer: SampledLayer,
        isa: _C.Isa,
        pool: _C.ThreadPool,
        config: Config | None = None,
    ) -> None:
        """config: the layer's with another share of rows, the layer's own by default."""
        self.layer = layer
        self.projection = layer.projection(isa, pool)
        rule = sample_rule(options_of(config or layer.config))
        settings = {"scale": layer.scale, "exact_below": 1, "isa": isa, "pool": pool}
        self._exact = _C.DecodeLayer(layer.pages, None, None, None, **settings)
        self._sampled = _C.DecodeLayer(
            layer.pages, rule, layer.index, self.projection.native, **settings
        )
        self._sampled.set_center(layer.center.numpy())
        # A step's, as vLLM's op has its scheduler's metadata.
        placement = layer.placement
        self._batch = _C.DecodeBatch(layer.pages, placement.block_tables, placement.seq_lens)
        self._counted = self._sampled.counters

    def hash_queries(self, query: torch.Tensor) -> npt.NDArray[np.uint16]:
        return self.projection.hash_queries(query.float())

    def decode(
        self, query: torch.Tensor, exact: bool = False, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What a decode step of this layer does (vllm_magicpig/decode.py), from the query to the output
        in the model's dtype; storing the new token, cheap on either side, aside.

        query: bfloat16 [num_reqs, num_q_heads, head_size]; into `output` if given, as by vLLM.
        """
        out = torch.empty_like(query) if output is None else output
        (self._exact if exact else self._sampled).attend(query, self._batch, out)
        return out

    def counted(self) -> Counted | None:
        """The sampled steps since the last call, None without one."""
        before, now = self._counted, self._sampled.counters
        self._counted = now
        if now.decode_steps == before.decode_steps:
            return None
        return Counted(
            now.decode_steps - before.decode_steps,
            now.sampled_rows - before.sampled_rows,
            now.lookup_ns - before.lookup_ns,
            now.attend_ns - before.attend_ns,
        )


class DenseLayer:
    """vLLM's CPU_ATTN over the same rows, called as its backend calls it (vLLM 0.32,
    v1/attention/backends/cpu_attn.py): the views and the op are per layer, the scheduler's metadata is
    made once a step."""

    def __init__(
        self, requests: Sequence[AttentionLayer], placement: Placement, native: ModuleType
    ) -> None:
        # The module registers the ops that fit this CPU.
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self._ops, self._placement = ops, placement
        num_kv_heads, _, head_size = requests[0].keys.shape
        self.scale = head_size**-0.5
        self._isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, head_size)
        self._num_kv_heads, self._head_size = num_kv_heads, head_size
        shape = (placement.num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size)
        memory = page_memory(2 * int(np.prod(shape)), native)
        self._kv_cache = torch.from_numpy(memory).view(torch.bfloat16).view(shape)
        key_cache, value_cache = self._halves()
        for number, request in enumerate(requests):
            for start in range(0, request.num_tokens, STORE_TOKENS):
                stop = min(start + STORE_TOKENS, request.num_tokens)
                ops.cpu_attn_reshape_and_cache(
                    request.keys[:, start:stop].transpose(0, 1).bfloat16().contiguous(),
                    request.values[:, start:stop].transpose(0, 1).bfloat16().contiguous(),
                    key_cache,
                    value_cache,
                    torch.from_numpy(placement.slots(number, start, stop)),
                    self._isa,
                )
        num_requests = len(requests)
        self._query_start_loc = torch.arange(num_requests + 1, dtype=torch.int32)
        self._seq_lens = torch.from_numpy(placement.seq_lens)
        self._block_table = torch.from_numpy(placement.block_tables)
        self._metadata: torch.Tensor | None = None

    def start_step(self, num_q_heads: int) -> None:
        """Once a step, and again after the number of threads has changed."""
        from vllm import envs

        self._metadata = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self._seq_lens),
            num_heads=num_q_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_size,
            seq_lens=self._seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=self._query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def decode(self, query: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """bfloat16 [num_reqs, num_q_heads, head_size], like the query; into `output` if given."""
        assert self._metadata is not None, "start_step comes first"
        output = torch.empty_like(query) if output is None else output
        key_cache, value_cache = self._halves()
        self._ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=self._query_start_loc,
            seq_lens=self._seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._block_table,
            softcap=0,
            scheduler_metadata=self._metadata,
            s_aux=None,
        )
        return output

    def _halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        num_blocks, num_kv_heads, block_size, _ = self._kv_cache.size()
        halves = self._kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1)).chunk(2, dim=2)
        return halves[0], halves[1]


@dataclass(frozen=True)
class Looked:
    """ids: of each request and query head, ascending positions; entries: bucket entries read;
    busy_s: summed over threads, without starting them."""

    ids: list[list[npt.NDArray[np.int32]]]
    entries: int
    busy_s: float


class ReferenceLayer:
    """The reference layout over the middle of each request."""

    def __init__(self, layer: SampledLayer, native: ModuleType) -> None:
        config = layer.config
        self._indexes = []
        for request, length in enumerate(layer.placement.seq_lens.tolist()):
            slots = layer.placement.slots(request, SINK_TOKENS, length - WINDOW_TOKENS)
            codes = layer.pages.load_codes(slots)
            self._indexes.append(native.ReferenceIndex(codes, config.K))

    @property
    def num_bytes(self) -> int:
        return sum(index.num_bytes for index in self._indexes)

    def lookup(
        self, query_codes: npt.NDArray[np.uint16], cpus: Sequence[int], positions: bool = False
    ) -> Looked:
        """query_codes: uint16 [num_reqs, num_q_heads, L]; positions: whether to sort and shift the ids
        to positions, which the reference has no need for."""
        found = [
            index.lookup(codes, list(cpus))
            for index, codes in zip(self._indexes, query_codes, strict=True)
        ]
        ids = [[np.sort(one) + SINK_TOKENS for one in part[0]] for part in found if positions]
        return Looked(ids, sum(part[1] for part in found), sum(part[2] for part in found))


def load_native() -> ModuleType:
    return bench_build.load()
