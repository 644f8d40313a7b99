"""Time per output token of FLASH_ATTN and of magicpig on a card and a host, term by term.

Pure arithmetic over plain data: imports neither torch nor vLLM. Every term is a number of bytes over
a bandwidth, a number of operations over a rate, or a fixed cost; a decode step is their sum, because
the layers of one token run one after another and magicpig's GPU waits for the CPU within each.

NO FIGURE OF A GPU HAS BEEN MEASURED YET. Each constant says where it comes from (its `source`, which
examples/cost_model.py prints): "measured" ones by throwaway runs of the decode kernel on one thread
of a shared AMD EPYC (Zen 3, AVX2, 2 cores, November 2026), K = 10, L = 150; all others are
assumptions, data sheets or goals, to be replaced by what `make gpu-check` measures. Not modelled:
compute-bound batches (far beyond those that fit at long contexts), tensor parallelism, prefill,
requests that share a prefix.

Times are in us, bandwidths in GB/s (10**9 bytes), memory in GiB (2**30).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from vllm_magicpig import capacity
from vllm_magicpig.config import MagicPigOptions

BLOCK_SIZE = 128
"""Tokens of a block where nothing else is said: vLLM's on the CPU platform and the plugin's advice."""

_LINE_BYTES = 64
_IDS_PER_LINE = _LINE_BYTES // 2  # uint16
_CODE_BYTES = 2
_PROJECTION_BYTES = 4  # a hyperplane's element: two float16 parts


def _is_number(value: Any) -> bool:
    """Infinity is one: it turns a term off."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _check_positive(hardware: object, *names: str) -> None:
    for name in names:
        value = getattr(hardware, name)
        if not _is_number(value) or value <= 0:
            raise ValueError(
                f"{name} of a {type(hardware).__name__.lower()} is {value!r}, but must be a number "
                "above 0; correct it."
            )


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder: gated MLP, no biases, two norms a layer."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    head_norms: bool = False  # Qwen3 normalises queries and keys
    itemsize: int = 2

    @property
    def num_parameters(self) -> int:
        """Input embedding and output matrix are two (untied) in every preset."""
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_size
        norms = 2 * self.hidden_size + 2 * self.head_size * self.head_norms
        layer = attention + 3 * self.hidden_size * self.intermediate_size + norms
        embeddings = 2 * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * layer + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.itemsize

    @property
    def streamed_weight_bytes(self) -> int:
        """Read by every step: all but the input embedding, of which it reads a row a request."""
        return self.weight_bytes - self.vocab_size * self.hidden_size * self.itemsize

    @property
    def row_bytes(self) -> int:
        """K and V of one token and kv head."""
        return 2 * self.head_size * self.itemsize

    def shard(self, tensor_parallel: int) -> ModelShape:
        """What one of tensor_parallel ranks holds; kv heads are replicated once there are too few."""
        if tensor_parallel < 1 or self.num_heads % tensor_parallel:
            raise ValueError(
                f"tensor parallel size is {tensor_parallel}, but must divide the {self.num_heads} "
                f"query heads of {self.name}; choose another --tp."
            )
        return replace(
            self,
            intermediate_size=self.intermediate_size // tensor_parallel,
            num_heads=self.num_heads // tensor_parallel,
            num_kv_heads=max(1, self.num_kv_heads // tensor_parallel),
            vocab_size=self.vocab_size // tensor_parallel,
        )


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, head_norms=True),
    )
}
"""Shapes of the published config.json files."""


@dataclass(frozen=True)
class Gpu:
    """hbm_gbs and pcie_gbs (one direction): peak of the data sheet."""

    name: str
    memory_gib: float
    hbm_gbs: float
    pcie_gbs: float

    def __post_init__(self) -> None:
        _check_positive(self, "memory_gib", "hbm_gbs", "pcie_gbs")


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 4090", 24, 1008, 32),
        Gpu("L20", 48, 864, 32),
        Gpu("A100-40", 40, 1555, 32),
        Gpu("A100-80", 80, 2039, 32),
        Gpu("H100", 80, 3350, 64),
        Gpu("H200", 141, 4800, 64),
    )
}
"""NVIDIA's data sheets (SXM where there are several; PCIe 4.0 or 5.0 x16)."""


@dataclass(frozen=True)
class Host:
    """What the decode kernel's threads reach together, on the memory that the pool lies in.

    sequential_gbs: reading, as STREAM would; row_gather_gbs: random rows of 512 bytes;
    line_gather_gbs: random cache lines of 64 bytes; threads: of the kernel, one a core; memory_gib:
    free RAM.
    """

    sequential_gbs: float
    row_gather_gbs: float
    line_gather_gbs: float
    threads: int
    memory_gib: float

    def __post_init__(self) -> None:
        _check_positive(self, *(quantity.name for quantity in fields(self)))

    @staticmethod
    def assumed(sequential_gbs: float, threads: int, memory_gib: float) -> Host:
        """Gather bandwidths from shares that are assumptions, see ROW_SHARE and LINE_SHARE."""
        row, line = ROW_SHARE * sequential_gbs, LINE_SHARE * sequential_gbs
        return Host(sequential_gbs, row, line, threads, memory_gib)


ROW_SHARE = 0.7
"""Random 512-byte rows over sequential reading, all cores. Assumed; measured on one thread, which
waits for latency rather than bandwidth: 0.45."""
LINE_SHARE = 0.4
"""Random 64-byte lines over sequential reading, all cores. Assumed; on one thread: 0.28."""


def _constant(default: float, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Constants:
    """Costs and efficiencies; `unit` and `source` of each are its field's metadata."""

    hbm_efficiency: float = _constant(
        0.85, "share", "assumption: of the data sheet's bandwidth, for weights and KV"
    )
    pcie_efficiency: float = _constant(0.8, "share", "assumption: of the data sheet's bandwidth")
    gpu_layer_us: float = _constant(
        12, "us a layer", "assumption: norms, rotary embedding, gaps between kernels"
    )
    gpu_step_us: float = _constant(
        600, "us a step", "assumption: sampler and the gap between two steps"
    )
    hash_launches: float = _constant(2, "launches", "design: one kernel for queries, one for keys")
    launch_us: float = _constant(4, "us a launch", "assumption: shortest kernel, start to end")
    copies: float = _constant(
        4, "copies a layer", "design: q; codes; new row with its codes; the result back"
    )
    copy_us: float = _constant(6, "us a copy", "assumption: latency of a small pinned copy")
    callback_us: float = _constant(
        20, "us a layer", "assumption: cuLaunchHostFunc's start and the stream's return"
    )
    kernel_us: float = _constant(
        10, "us a layer", "assumption: waking the threads, and the last one's wait"
    )
    row_efficiency: float = _constant(
        0.6,
        "share",
        "the project's bar: of the row gather bandwidth (one thread reached 0.57 to 0.7)",
    )
    row_ns: float = _constant(
        105, "ns a row and thread", "measured: 512-byte rows in the attention kernel, 87 to 131"
    )
    line_ns: float = _constant(
        10.5, "ns a line and thread", "measured: lookup at 8K-128K, segments of 2K-64K, within 32 %"
    )
    collision_ns: float = _constant(2.5, "ns a collision and thread", "measured: the same fit")
    scan_gbs: float = _constant(
        10.7, "GB/s a thread", "measured: comparing the codes of unsealed tokens, group of 4"
    )

    def __post_init__(self) -> None:
        for constant in fields(self):
            value = getattr(self, constant.name)
            if not _is_number(value) or value < 0:
                raise ValueError(
                    f"constant {constant.name} is {value!r}, but must be a number of "
                    f"{constant.metadata['unit']}, 0 or more; correct it."
                )


@dataclass(frozen=True)
class StepTime:
    """One decode step in us, term by term, each summed over layers.

    GPU, both backends: weights; kv (of dense layers); other (gpu_layer_us, gpu_step_us).
    magicpig's sampled layers: hashing (launches, projection matrix); transfer (copies, PCIe);
    callback; kernel (fixed cost of the CPU step); lookup_lines (bucket offsets and id runs);
    lookup_counts (one increment a collision); lookup_scan (codes of tokens without a segment); rows.
    """

    batch: int
    weights: float
    kv: float
    other: float
    hashing: float = 0.0
    transfer: float = 0.0
    callback: float = 0.0
    kernel: float = 0.0
    lookup_lines: float = 0.0
    lookup_counts: float = 0.0
    lookup_scan: float = 0.0
    rows: float = 0.0

    def terms(self) -> dict[str, float]:
        return {term.name: getattr(self, term.name) for term in fields(self)[1:]}

    @property
    def gpu(self) -> float:
        return self.weights + self.kv + self.other

    @property
    def lookup(self) -> float:
        return self.lookup_lines + self.lookup_counts + self.lookup_scan

    @property
    def host(self) -> float:
        return self.kernel + self.lookup + self.rows

    @property
    def total(self) -> float:
        return sum(self.terms().values())

    @property
    def tokens_per_s(self) -> float:
        return self.batch * 1e6 / self.total


def dense_step(
    model: ModelShape, gpu: Gpu, batch: int, context: int, constants: Constants
) -> StepTime:
    """A step of the platform's own backend: batch requests, each over context tokens.

    Also the GPU's part of magicpig: see sampled_step.
    """
    return _gpu_step(model, model.num_layers, gpu, batch, context, constants)


def sampled_step(
    model: ModelShape,
    options: MagicPigOptions,
    gpu: Gpu,
    host: Host,
    batch: int,
    context: int,
    fraction: float,
    segment_tokens: int,
    constants: Constants,
) -> StepTime:
    """A step of magicpig: batch requests, each over context tokens; fraction: sampled rows / middle.

    Rows: every query head gathers its own, as the kernel does; what the heads of a group share is
    found in the cache and costs less than is said here. Sink and window are read once a group.
    Tokens past the last full segment, half of the smallest on average, are compared by code.
    """
    if options.has_signatures:
        raise ValueError(
            'the cost model is of index "buckets", but the options have index "signatures", whose '
            "terms nobody has measured on a GPU; ask for buckets."
        )
    _check_fraction(fraction)
    if not options.samples(context):
        raise ValueError(
            f"a context of {context:,} tokens with K = {options.K} and exact_below = "
            f"{options.exact_below:,} is attended exactly, but the model covers sampled decoding; "
            "ask for a longer context, or K of 2 to 15."
        )
    num_sparse = _num_sparse_layers(model, options)
    step = _gpu_step(model, model.num_layers - num_sparse, gpu, batch, context, constants)
    hbm = gpu.hbm_gbs * constants.hbm_efficiency
    pcie = gpu.pcie_gbs * constants.pcie_efficiency
    threads = host.threads
    num_requests = num_sparse * batch  # a request of a layer is the kernel's unit

    static = options.sink_tokens + options.window_tokens
    sampled = model.num_heads * fraction * (context - static) + model.num_kv_heads * static
    rows_bytes = num_requests * sampled * model.row_bytes
    # The per-thread rate was measured on 512-byte rows and both of its causes scale with bytes.
    row_us = constants.row_ns / 1e3 / 512 * rows_bytes / threads
    rows = max(_us(rows_bytes, host.row_gather_gbs * constants.row_efficiency), row_us)

    smallest, *larger = segment_sizes(segment_tokens)
    unsealed = min(context, smallest / 2)
    sealed = context - unsealed
    lookup = BucketLookup(0, 0)
    for size in reversed(larger):
        lookup += bucket_lookup(sealed // size * size, size, fraction, options)
        sealed %= size
    lookup += bucket_lookup(sealed, smallest, fraction, options)
    heads = num_requests * model.num_heads
    lines_us = max(
        _us(heads * lookup.lines * _LINE_BYTES, host.line_gather_gbs),
        heads * lookup.lines * constants.line_ns / 1e3 / threads,
    )
    counts_us = heads * lookup.collisions * constants.collision_ns / 1e3 / threads
    scan_bytes = num_requests * model.num_kv_heads * unsealed * options.L * _CODE_BYTES
    scan_gbs = min(host.sequential_gbs, constants.scan_gbs * threads)

    projection = model.head_size * options.L * options.K * _PROJECTION_BYTES
    hashing = constants.hash_launches * constants.launch_us + _us(projection, hbm)
    transfer = constants.copies * constants.copy_us + _us(batch * copy_bytes(model, options), pcie)
    return replace(
        step,
        hashing=num_sparse * hashing,
        transfer=num_sparse * transfer,
        callback=num_sparse * constants.callback_us,
        kernel=num_sparse * constants.kernel_us,
        lookup_lines=lines_us,
        lookup_counts=counts_us,
        lookup_scan=_us(scan_bytes, scan_gbs),
        rows=rows,
    )


def copy_bytes(model: ModelShape, options: MagicPigOptions) -> int:
    """Over PCIe for one request and layer: q, its codes, the new row and its codes; the output."""
    query = model.num_heads * model.head_size * model.itemsize
    query_codes = model.num_heads * options.L * _CODE_BYTES
    new = model.num_kv_heads * (model.row_bytes + options.L * _CODE_BYTES)
    return query + query_codes + new + query


@dataclass(frozen=True)
class BucketLookup:
    """What one query head's lookup touches: cache lines, and ids (collisions) counted."""

    lines: float
    collisions: float

    def __add__(self, other: BucketLookup) -> BucketLookup:
        return BucketLookup(self.lines + other.lines, self.collisions + other.collisions)


def segment_sizes(segment_tokens: int) -> list[int]:
    """All sizes, ascending, where that is the largest: those of the plugin, or a single one."""
    levels = capacity.segment_levels(BLOCK_SIZE)
    return levels if segment_tokens == levels[-1] else [segment_tokens]


def bucket_lookup(
    sealed_tokens: float, segment_tokens: int, fraction: float, options: MagicPigOptions
) -> BucketLookup:
    """Expected work of one query head over the sealed segments of one request and layer.

    Each segment has L tables; a probe of one reads two adjacent uint16 offsets and a run of r uint16
    ids, in places that nothing predicts. The offsets touch 1 + 1/32 lines: two neighbours straddle a
    line in one of 32 positions. r ids from a random start touch 1 + (r - 1)/32 lines, and an empty
    run still one, since the kernel fetches its first line anyway. With runs of Poisson length,
    E[max(r - 1, 0)] = m - 1 + exp(-m), where m = segment_tokens * collisions_per_token / L.
    """
    collisions = collisions_per_token(fraction, options)
    probes = sealed_tokens / segment_tokens * options.L
    mean_run = segment_tokens * collisions / options.L
    beyond_first = mean_run - 1 + math.exp(-mean_run)
    lines = 2 + 1 / _IDS_PER_LINE + beyond_first / _IDS_PER_LINE
    return BucketLookup(probes * lines, sealed_tokens * collisions)


@cache
def collisions_per_token(fraction: float, options: MagicPigOptions) -> float:
    """Expected matching tables per token, given the sampled fraction that they lead to.

    A token whose key has cosine c with the query matches in Binomial(L, p**K) tables, p = 1 -
    acos(c)/pi, so it adds L p**K collisions and is sampled with u(p). Buckets are skewed, and both
    follow from how the cosines spread: keys are centred, so the cosines average 0; take them as
    normal with the one spread s at which the mean of u is `fraction`. Evidence for that: s = 0.116,
    which gives 2.1 % at (K, L) = (10, 150), gives 4.1 % at (9, 120) and 5.4 % at (8, 75), where eight
    simulated attention geometries had 2.1, 4.2 and 5.4 %. Below what s = 0 gives (1.0 % at (10, 150):
    orthogonal keys collide too), all tokens are taken to have one cosine.
    """
    _check_fraction(fraction)
    if fraction == 0:
        return 0.0
    even = _mean_over_cosines(0.0, options)
    if fraction <= even.sampled:
        rate = _bisect(lambda x: _inclusion(x, options), fraction, 0.5**options.K)
        return options.L * rate
    most = _mean_over_cosines(1.0, options)
    if fraction >= most.sampled:
        raise ValueError(
            f"sampled fraction is {fraction}, but centred keys with K = {options.K} and L = "
            f"{options.L} sample at most {most.sampled:.2f} of the tokens; lower it."
        )
    spread = _bisect(lambda s: _mean_over_cosines(s, options).sampled, fraction, 1.0)
    return _mean_over_cosines(spread, options).collisions


@dataclass(frozen=True)
class Comparison:
    """Both backends with as many requests as each holds; None where it does not hold one.

    single: magicpig with one request, None where it holds none.
    """

    gpu: Gpu
    host: Host
    context: int
    dense: StepTime | None
    sampled: StepTime | None
    single: StepTime | None

    @property
    def ratio(self) -> float | None:
        """magicpig's decode throughput over the dense backend's; None unless both hold requests."""
        if self.dense is None or self.sampled is None:
            return None
        return self.sampled.tokens_per_s / self.dense.tokens_per_s


@dataclass(frozen=True)
class Held:
    """Concurrent requests of one length."""

    dense: int
    sampled: int


def held_requests(
    model: ModelShape,
    options: MagicPigOptions,
    gpu: Gpu,
    host: Host,
    context: int,
    block_size: int = BLOCK_SIZE,
) -> Held:
    """From capacity.py: default shares of device memory and of the host's free RAM."""
    num_sparse = _num_sparse_layers(model, options)
    heads, head_size, itemsize = model.num_kv_heads, model.head_size, model.itemsize
    device = capacity.device_kv_bytes(int(gpu.memory_gib * capacity.GIB), model.weight_bytes)
    plan = capacity.plan_blocks(
        capacity.default_host_bytes(int(host.memory_gib * capacity.GIB), local_ranks=1),
        device,
        capacity.host_block_bytes(
            num_sparse, heads, head_size, itemsize, options.num_tables, block_size
        ),
        capacity.index_bytes_per_block(
            num_sparse, heads, options.K, options.num_tables, block_size
        ),
        capacity.device_block_bytes(
            model.num_layers - num_sparse, num_sparse, heads, head_size, itemsize, block_size
        ),
        index_spare_bytes=capacity.index_spare_bytes(
            num_sparse, heads, options.K, options.num_tables, block_size, context
        ),
        signature_block_bytes=capacity.signature_block_bytes(
            num_sparse, heads, head_size, options.signature_bits, block_size
        ),
    )
    dense_block = capacity.dense_block_bytes(
        model.num_layers, heads, head_size, itemsize, block_size
    )
    return Held(
        dense=capacity.concurrent_requests(device // dense_block, block_size, context),
        sampled=plan.requests(block_size, context),
    )


def compare(
    model: ModelShape,
    options: MagicPigOptions,
    gpu: Gpu,
    host: Host,
    context: int,
    fraction: float,
    segment_tokens: int,
    constants: Constants,
) -> Comparison:
    """Throughput grows with the batch on both sides, so each runs as many requests as it holds."""
    held = held_requests(model, options, gpu, host, context)

    def sampled(batch: int) -> StepTime | None:
        if held.sampled == 0:
            return None
        return sampled_step(
            model, options, gpu, host, batch, context, fraction, segment_tokens, constants
        )

    return Comparison(
        gpu=gpu,
        host=host,
        context=context,
        dense=dense_step(model, gpu, held.dense, context, constants) if held.dense else None,
        sampled=sampled(held.sampled),
        single=sampled(1),
    )


def _gpu_step(
    model: ModelShape,
    num_dense_layers: int,
    gpu: Gpu,
    batch: int,
    context: int,
    constants: Constants,
) -> StepTime:
    if batch < 1 or context < 1:
        raise ValueError(
            f"a step of {batch} requests over {context} tokens was asked for, but both must be 1 or "
            "more; correct them."
        )
    hbm = gpu.hbm_gbs * constants.hbm_efficiency
    kv_bytes = batch * context * num_dense_layers * model.num_kv_heads * model.row_bytes
    return StepTime(
        batch=batch,
        weights=_us(model.streamed_weight_bytes, hbm),
        kv=_us(kv_bytes, hbm),
        other=model.num_layers * constants.gpu_layer_us + constants.gpu_step_us,
    )


def _num_sparse_layers(model: ModelShape, options: MagicPigOptions) -> int:
    return sum(not options.is_dense(layer) for layer in range(model.num_layers))


@dataclass(frozen=True)
class _Means:
    sampled: float
    collisions: float


_NODES = 801
_REACH = 8.0  # standard deviations; what lies beyond weighs 1e-15


def _mean_over_cosines(spread: float, options: MagicPigOptions) -> _Means:
    """Means of u and of L p**K over cosines that are normal (0, spread), cut at -1 and 1."""
    sampled = collisions = total = 0.0
    for i in range(_NODES):
        z = _REACH * (2 * i / (_NODES - 1) - 1)
        weight = math.exp(-z * z / 2)
        p = 1 - math.acos(min(max(spread * z, -1.0), 1.0)) / math.pi
        rate = p**options.K
        total += weight
        sampled += weight * _inclusion(rate, options)
        collisions += weight * options.L * rate
    return _Means(sampled / total, collisions / total)


def _inclusion(rate: float, options: MagicPigOptions) -> float:
    """u = P[Binomial(L, rate) >= min_matches]; reference.log_inclusion_probability has more digits
    than a cost needs."""
    misses = sum(
        math.comb(options.L, k) * rate**k * (1 - rate) ** (options.L - k)
        for k in range(options.min_matches)
    )
    return 1 - misses


def _bisect(increasing: Callable[[float], float], target: float, high: float) -> float:
    """Where a function that increases over [0, high] takes a value that it takes there."""
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        if increasing(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _check_fraction(fraction: float) -> None:
    if not _is_number(fraction) or not 0 <= fraction < 1:
        raise ValueError(
            f"sampled fraction is {fraction!r}, but must be 0 or more and below 1; give it as a "
            "share, such as 0.021 for 2.1 %."
        )


def _us(num_bytes: float, gbs: float) -> float:
    """GB/s is 1,000 bytes a microsecond."""
    return num_bytes / (gbs * 1e3)
