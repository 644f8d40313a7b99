"""The index: what it costs to build, to have and to be without, and what its settings give for it.

    python examples/bench_index.py
    python examples/bench_index.py --quick
    python examples/bench_index.py --parts build,generation

build       time to build segments of each size, per token, kv head and core; bytes
encode      time to encode signatures of 1, 2 and 4 bits, per token, kv head and core; bytes
background  decode steps at 32K tokens with and without threads that build 64K segments meanwhile
tradeoff    rows, error, time and memory of settings side by side, over all geometries
generation  one request from 2K to 34K tokens, token by token: store, hash, ask for segments, attend;
            time per token and rows read against context length
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from argument_types import positive, positive_number, positives
from bench_geometries import (
    GEOMETRIES,
    GROUP,
    NUM_KV_HEADS,
    AttentionLayer,
    exact_attention,
    generate,
    relative_error,
)
from bench_layer import (
    BLOCK_SIZE,
    BUCKETS,
    SINK_TOKENS,
    WINDOW_TOKENS,
    Config,
    Decoder,
    Placement,
    SampledLayer,
    kernel_pool,
    load_native,
    make_index,
)
from bench_report import (
    Evictor,
    Report,
    Timing,
    cores,
    interleave,
    parser,
    tokens_name,
    use_cpus,
)
from bench_stream import GrowingRequest

from vllm_magicpig import _C
from vllm_magicpig.capacity import segment_levels
from vllm_magicpig.signature_blocks import block_bytes
from vllm_magicpig.signature_reference import BLOCK_TOKENS, rotation_signs

PARTS = ("build", "encode", "background", "tradeoff", "generation")
NUM_Q_HEADS = NUM_KV_HEADS * GROUP
BUDGETS = (0.005, 0.01, 0.02)
PHASE_STEPS = 200
BIN_TOKENS = 512  # a point of the generation plot


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--parts", type=_parts, default=list(PARTS), help=",".join(PARTS))
    options.add_argument("--threads", type=positive, help="default: all cores")
    options.add_argument("--repeats", type=positive, default=9)
    options.add_argument("--build-tokens", type=positive, default=65536)
    options.add_argument("--decode-tokens", type=positive, default=32768, help="of `background`")
    options.add_argument(
        "--decode-steps", type=positive, default=800, help="of `background`, each side"
    )
    options.add_argument("--lengths", type=positives, default=[8192, 32768, 131072])
    options.add_argument(
        "--error-steps", type=positive, default=8, help="decode steps behind an error"
    )
    options.add_argument(
        "--generate", type=positives, default=[2048, 34816], help="from, to tokens"
    )
    options.add_argument("--budget-s", type=positive_number, default=180.0, help="of `generation`")
    given = options.parse_args(argv)
    if len(given.generate) != 2 or given.generate[0] >= given.generate[1]:
        options.error("--generate takes two ascending numbers of tokens, such as 2048,34816")
    if given.quick:
        given.build_tokens, given.decode_tokens = 8192, 4096
        given.decode_steps, given.repeats, given.lengths = PHASE_STEPS, 3, [4096]
        given.error_steps, given.generate = 2, [2048, 3072]
    cpus = cores()
    if (given.threads or 1) > len(cpus):
        options.error(f"--threads is {given.threads}, but there are {len(cpus)} cores.")
    cpus = cpus[: given.threads or len(cpus)]
    report = Report("bench_index", given.output, argv, [len(cpus)])
    use_cpus(cpus)
    native = load_native()
    run = {
        "build": part_build,
        "encode": part_encode,
        "background": part_background,
        "tradeoff": part_tradeoff,
        "generation": part_generation,
    }
    for name in given.parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        run[name](given, report, cpus, native)
    report.finish()
    return 0


def _parts(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}.")
    return chosen


def _layer(
    config: Config,
    rows: AttentionLayer,
    cpus: Sequence[int],
    native: ModuleType,
    num_stored: int | None = None,
) -> SampledLayer:
    placement = Placement.shuffled(1, rows.num_tokens)
    isa, pool = _C.resolve_isa("auto"), kernel_pool(cpus)
    return SampledLayer(config, [rows], placement, native, isa, pool, num_stored)


# ------------------------------------------------------------------------------------------ build


@dataclass(frozen=True)
class Build:
    """us: per token, kv head and core; index_bytes: per token and kv head."""

    config: str
    level: int
    us: float
    us_p25: float
    index_bytes: float


def part_build(given: Any, report: Report, cpus: Sequence[int], native: ModuleType) -> None:
    rows = generate("mixed", given.build_tokens)
    pool = _C.ThreadPool(list(cpus[:1]))
    builds = []
    levels = [level for level in segment_levels(BLOCK_SIZE) if level <= given.build_tokens]
    for config in BUCKETS[: 1 if given.quick else None]:
        layer = _layer(config, rows, cpus, native)
        placement = layer.placement
        num_bytes: dict[int, int] = {}

        def build(level: int, of: SampledLayer, sizes: dict[int, int]) -> None:
            index = make_index(of.pages, of.config, level)
            index.seal(of.placement.block_tables, of.placement.seq_lens, pool)
            sizes[level] = index.num_bytes

        def side(level: int, of: SampledLayer, sizes: dict[int, int]) -> Callable[[int], None]:
            return lambda _: build(level, of, sizes)

        sides = {str(level): side(level, layer, num_bytes) for level in levels}
        seconds = interleave(sides, given.repeats, Evictor())
        stored = int(placement.seq_lens.sum()) * NUM_KV_HEADS
        for level in levels:
            timing = Timing.of(seconds[str(level)])
            builds.append(
                Build(
                    config.name,
                    level,
                    1e3 * timing.median_ms / stored,
                    1e3 * timing.p25_ms / stored,
                    num_bytes[level] / stored,
                )
            )
    report.add("build", builds)
    report.print_table(
        "Building segments, one thread: us per token and kv head; index bytes per token and kv head",
        ("config", "segment tokens", "us (median)", "us (p25)", "bytes"),
        [
            (b.config, str(b.level), f"{b.us:.3f}", f"{b.us_p25:.3f}", f"{b.index_bytes:.0f}")
            for b in builds
        ],
    )


# ----------------------------------------------------------------------------------------- encode


@dataclass(frozen=True)
class Encoding:
    """ns: per token, kv head and core; signature_bytes: per token and kv head."""

    bits: int
    ns: float
    ns_p25: float
    signature_bytes: float


def part_encode(given: Any, report: Report, cpus: Sequence[int], native: ModuleType) -> None:
    num_tokens = -(-given.build_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
    head = generate("mixed", num_tokens).keys[0].bfloat16()
    keys = head.view(torch.uint16).numpy()
    signs = rotation_signs(head.shape[1], 0).numpy()
    isa, pool = _C.resolve_isa("auto"), _C.ThreadPool(list(cpus[:1]))

    def side(bits: int) -> Callable[[int], None]:
        return lambda _: _C.encode_signatures(keys, "bfloat16", signs, bits, isa, pool)

    seconds = interleave({str(bits): side(bits) for bits in (1, 2, 4)}, given.repeats, Evictor())
    encodings = []
    for bits in (1, 2, 4):
        timing = Timing.of(seconds[str(bits)])
        encodings.append(
            Encoding(
                bits,
                1e6 * timing.median_ms / num_tokens,
                1e6 * timing.p25_ms / num_tokens,
                block_bytes(head.shape[1], bits) / BLOCK_TOKENS,
            )
        )
    report.add("encode", encodings)
    report.print_table(
        f"Encoding signatures of bfloat16 keys of {head.shape[1]} dimensions, {isa.name}, one "
        "thread: ns and bytes per token and kv head",
        ("bits", "ns (median)", "ns (p25)", "bytes"),
        [
            (str(e.bits), f"{e.ns:.0f}", f"{e.ns_p25:.0f}", f"{e.signature_bytes:.1f}")
            for e in encodings
        ],
    )


# ------------------------------------------------------------------------------------- background


@dataclass(frozen=True)
class Steps:
    """Of decode steps beside a builder that does this; segments: built meanwhile."""

    builder: str
    p50_ms: float
    p99_ms: float
    steps: int
    segments: int


BUILDERS = ("idle", "merges", "builds what is missing")


def part_background(given: Any, report: Report, cpus: Sequence[int], native: ModuleType) -> None:
    """Phases of what the builder does take turns. Its threads are on the CPUs of the kernel, as in a
    worker, and niced; where it merges segments that serve, they rest while a step runs. They get on
    while the caches are emptied between two steps, in the place of a model's other layers. Each kind
    of work is done twice before, so that segments find the memory of dropped ones: a thread that takes
    fresh memory from the system cannot give way meanwhile."""
    config = BUCKETS[0]
    isa, pool = _C.resolve_isa("auto"), kernel_pool(cpus)
    rows = generate("mixed", given.decode_tokens)
    decoder = Decoder(_layer(config, rows, cpus, native), isa, pool)
    queries = rows.queries(len(BUILDERS) * given.decode_steps, seed=1).bfloat16()[:, None]
    levels = segment_levels(BLOCK_SIZE)
    level = levels[-1] if given.decode_tokens >= levels[-2] else levels[1]
    work = Building(_layer(config, generate("mixed", level, seed=1), cpus, native), level, pool)
    builder = _C.SegmentBuilder(list(cpus), pool)
    times: dict[str, list[float]] = {name: [] for name in BUILDERS}
    built = dict.fromkeys(BUILDERS, 0)
    evict = Evictor(alone=True)
    for phase in BUILDERS[1:] * 2:
        work.ask(builder, merges=phase == "merges")
        builder.drain()
    for number, query in enumerate(queries):
        phase = BUILDERS[number // PHASE_STEPS % len(BUILDERS)]
        if number % PHASE_STEPS == 0:
            builder.drain()
            before = work.large_segments
        if phase != "idle" and builder.pending == 0:
            built[phase] += work.large_segments - before
            work.ask(builder, merges=phase == "merges")
            before = work.large_segments
        evict()
        started = time.perf_counter()
        decoder.decode(query)
        times[phase].append(time.perf_counter() - started)
        if (number + 1) % PHASE_STEPS == 0:
            built[phase] += work.large_segments - before
    builder.drain()
    builder.raise_error()
    found = []
    for phase, seconds in times.items():
        p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
        found.append(Steps(phase, float(p50), float(p99), len(seconds), built[phase]))
    idle = found[0]
    report.add("background", {"tokens": given.decode_tokens, "segment": level, "steps": found})
    report.print_table(
        f"Decode steps at {tokens_name(given.decode_tokens)} tokens, {config.name}, {len(cpus)} "
        f"threads, while segments of {tokens_name(level)} are built",
        (
            *("builder", "p50 ms", "p99 ms", "p50 / idle p50", "p99 / idle p50"),
            *("p99 / idle p99", "steps", "segments built"),
        ),
        [
            (
                *(s.builder, f"{s.p50_ms:.3f}", f"{s.p99_ms:.3f}"),
                *(f"{s.p50_ms / idle.p50_ms:.2f}", f"{s.p99_ms / idle.p50_ms:.2f}"),
                *(f"{s.p99_ms / idle.p99_ms:.2f}", str(s.steps), str(s.segments)),
            )
            for s in found
        ],
    )


class Building:
    """A layer whose segments of `level` tokens a builder is asked for again and again."""

    def __init__(self, layer: SampledLayer, level: int, pool: _C.ThreadPool) -> None:
        num_tokens = int(layer.placement.seq_lens[0])
        self._layer, self._level, self._pool = layer, level, pool
        self._index = _C.LshIndex(layer.pages, layer.config.K, [level // 2, level])
        self._slots = layer.placement.slots(0, 0, num_tokens)
        self._tables = layer.placement.block_tables[:1].copy()
        self._lens = np.array([num_tokens], np.int32)

    @property
    def large_segments(self) -> int:
        """Now; `ask` sets out from none."""
        return len(
            [b for b, e in self._index.find(self._tables[0], self._lens[0]) if e - b == self._level]
        )

    def ask(self, builder: _C.SegmentBuilder, merges: bool) -> None:
        """merges: of two smaller ones, which are there already."""
        self._index.clear()
        self._layer.pages.note_writes(self._slots)
        if merges:
            halves = self._tables.reshape(-1, self._level // 2 // BLOCK_SIZE)
            lens = np.full(len(halves), self._level // 2, np.int32)
            self._index.seal(np.ascontiguousarray(halves), lens, self._pool)
        builder.ask(self._index, self._tables, self._lens)


# --------------------------------------------------------------------------------------- tradeoff


@dataclass(frozen=True)
class Tradeoff:
    """errors: relative output error (median, p90) per geometry; bytes per token and kv head beside the
    rows themselves."""

    num_tokens: int
    config: str
    sampled_fraction: float
    timing: Timing
    error_median: float
    error_p90: float
    errors: dict[str, tuple[float, float]]
    code_bytes: int
    index_bytes: float


def tradeoff_configs() -> list[Config]:
    return [
        *BUCKETS,
        *(Config(BUCKETS[0].K, BUCKETS[0].L, rows) for rows in BUDGETS),
    ]


def part_tradeoff(given: Any, report: Report, cpus: Sequence[int], native: ModuleType) -> None:
    """kv head h of the mixed layer has geometry h, so that one layer gives all errors and the time."""
    configs = tradeoff_configs()
    isa, pool = _C.resolve_isa("auto"), kernel_pool(cpus)
    found = []
    for num_tokens in given.lengths:
        rows = generate("mixed", num_tokens)
        steps = max(given.error_steps, given.repeats + 1)
        queries = rows.queries(steps, seed=1).bfloat16()
        exact = _exact_steps(queries[: given.error_steps].float(), rows)
        layers = {c: _layer(c, rows, cpus, native) for c in {Config(c.K, c.L) for c in configs}}
        decoders = {
            config.name: Decoder(layers[Config(config.K, config.L)], isa, pool, config)
            for config in configs
        }

        def side(decoder: Decoder, all_steps: torch.Tensor) -> Callable[[int], None]:
            return lambda repeat: decoder.decode(all_steps[repeat][None])

        sides = {name: side(decoder, queries) for name, decoder in decoders.items()}
        seconds = interleave(sides, given.repeats, Evictor())
        for config in configs:
            layer = layers[Config(config.K, config.L)]
            decoder = decoders[config.name]
            decoder.counted()  # from here on
            estimate = torch.cat([decoder.decode(q[None]) for q in queries[: given.error_steps]])
            counted = decoder.counted()
            assert counted is not None
            error = relative_error(estimate, exact).view(-1, NUM_KV_HEADS, GROUP)
            middle = num_tokens - SINK_TOKENS - WINDOW_TOKENS
            found.append(
                Tradeoff(
                    num_tokens,
                    config.name,
                    counted.rows / (counted.steps * error[0].numel() * middle),
                    Timing.of(seconds[config.name]),
                    *_median_p90(error),
                    {name: _median_p90(error[:, h]) for h, name in enumerate(GEOMETRIES)},
                    layer.code_bytes,
                    layer.index_bytes_per_token(),
                )
            )
        report.add("tradeoff", found)
    report.print_table(
        f"Buckets, {len(cpus)} threads: relative output error over {given.error_steps} steps "
        "of all geometries (median / p90), time of a step of one layer, bytes per token and kv head",
        ("tokens", "config", "sampled %", "error", "ms", "code B", "index B"),
        [
            (
                tokens_name(t.num_tokens),
                t.config,
                f"{100 * t.sampled_fraction:.2f}",
                f"{t.error_median:.3f} / {t.error_p90:.3f}",
                f"{t.timing.median_ms:.3f}",
                str(t.code_bytes),
                f"{t.index_bytes:.0f}",
            )
            for t in found
        ],
    )
    report.print_table(
        "The same errors by geometry (median / p90)",
        ("tokens", "config", *GEOMETRIES),
        [
            (
                tokens_name(t.num_tokens),
                t.config,
                *(f"{a:.3f} / {b:.3f}" for a, b in t.errors.values()),
            )
            for t in found
        ],
    )
    report.plot("bench_index_tradeoff", 11, lambda axes: draw_tradeoff(axes, found), panels=2)


def _exact_steps(queries: torch.Tensor, rows: AttentionLayer) -> torch.Tensor:
    """float64 like queries [steps, num_q_heads, head_size]; all steps at once, as one larger group."""
    steps, _, size = queries.shape
    grouped = queries.view(steps, NUM_KV_HEADS, GROUP, size).transpose(0, 1)
    out = exact_attention(grouped.reshape(-1, size), rows.keys, rows.values)
    return out.view(NUM_KV_HEADS, steps, GROUP, size).transpose(0, 1).reshape(queries.shape)


def _median_p90(error: torch.Tensor) -> tuple[float, float]:
    median, p90 = np.percentile(error.numpy(), [50, 90])
    return float(median), float(p90)


def draw_tradeoff(axes: Any, found: Sequence[Tradeoff]) -> None:
    """Error against rows, and against time, at the longest context."""
    longest = max(t.num_tokens for t in found)
    for colour, t in enumerate(t for t in found if t.num_tokens == longest):
        style = {"color": f"C{colour % 10}", "marker": "os^D"[colour // 10 % 4], "label": t.config}
        for axis, x in zip(axes, (100 * t.sampled_fraction, t.timing.median_ms), strict=True):
            axis.plot([x], [t.error_median], linestyle="none", **style)
    for axis, label in zip(axes, ("rows sampled, %", "ms per layer and step"), strict=True):
        axis.set(xlabel=label, ylabel="relative output error, median")
        axis.set_title(f"{tokens_name(longest)} tokens")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")


# ------------------------------------------------------------------------------------- generation


@dataclass(frozen=True)
class Bin:
    """Steps whose context is [num_tokens, num_tokens + BIN_TOKENS); rows: read per step, all query
    heads."""

    num_tokens: int
    median_ms: float
    p99_ms: float
    rows: float


@dataclass(frozen=True)
class Generation:
    """time_growth, rows_growth: last bin against first, medians and rows."""

    config: str
    tokens: int
    seconds: float
    bins: list[Bin]
    time_growth: float
    rows_growth: float
    segments: int


def part_generation(given: Any, report: Report, cpus: Sequence[int], native: ModuleType) -> None:
    g = _generate(given, BUCKETS[0], cpus, native)
    report.add("generation", g)
    every = max(len(g.bins) // 12, 1)
    report.print_table(
        f"Generating {g.tokens} tokens one by one, {g.config}, {len(cpus)} threads, "
        f"{g.seconds:.0f} s",
        ("context", "ms per token (median)", "p99", "rows read, all heads"),
        [
            (str(b.num_tokens), f"{b.median_ms:.3f}", f"{b.p99_ms:.3f}", f"{b.rows:.0f}")
            for b in g.bins[::every]
        ],
    )
    verdict = "no faster" if g.time_growth <= g.rows_growth else "FASTER"
    print(
        f"\nfrom the first to the last {BIN_TOKENS} tokens, time per token grew "
        f"{g.time_growth:.2f}-fold and rows read {g.rows_growth:.2f}-fold: time grew {verdict} "
        f"than rows; {g.segments} segments built"
    )
    report.plot("bench_index_generation", 11, lambda axes: draw_generation(axes, g), panels=2)


def _generate(given: Any, config: Config, cpus: Sequence[int], native: ModuleType) -> Generation:
    first, last = given.generate
    rows = generate("mixed", last)
    layer = _layer(config, rows, cpus, native, num_stored=first)
    isa, pool = _C.resolve_isa("auto"), kernel_pool(cpus)
    builder = _C.SegmentBuilder(list(cpus), pool)
    growing = GrowingRequest(layer, native, isa, pool, builder, NUM_Q_HEADS)
    growing.note_stored(first)
    keys, values = (part.transpose(0, 1).bfloat16() for part in (rows.keys, rows.values))
    times: list[float] = []
    read: list[int] = []
    began = time.monotonic()
    for token in range(first, last):
        if (token - first) % BIN_TOKENS == 0:
            if time.monotonic() - began > given.budget_s:
                print(f"{config.name}: stopped at {token} tokens by --budget-s", file=sys.stderr)
                break
            queries = rows.queries(BIN_TOKENS, seed=token).bfloat16()
        query = queries[(token - first) % BIN_TOKENS]
        started = time.perf_counter()
        growing.decode(query, keys[token], values[token])
        times.append(time.perf_counter() - started)
        read.append(growing.sampled_rows)
    seconds = time.monotonic() - began
    builder.drain()
    builder.raise_error()
    static = NUM_Q_HEADS * (SINK_TOKENS + WINDOW_TOKENS)
    per_step = np.diff(read, prepend=0) + static
    bins = []
    for start in range(0, len(times), BIN_TOKENS):
        ms = 1e3 * np.array(times[start : start + BIN_TOKENS])
        bins.append(
            Bin(
                first + start,
                float(np.median(ms)),
                float(np.percentile(ms, 99)),
                float(per_step[start : start + BIN_TOKENS].mean()),
            )
        )
    return Generation(
        config.name,
        len(times),
        seconds,
        bins,
        bins[-1].median_ms / bins[0].median_ms,
        bins[-1].rows / bins[0].rows,
        layer.index.segments_built,
    )


def draw_generation(axes: Any, g: Generation) -> None:
    at = [b.num_tokens / 1024 for b in g.bins]
    axes[0].plot(at, [b.median_ms for b in g.bins], color="C0", label=g.config)
    axes[0].plot(at, [b.p99_ms for b in g.bins], color="C0", linestyle=":", alpha=0.6)
    axes[1].plot(at, [b.rows / 1000 for b in g.bins], color="C0", label=g.config)
    titles = ("ms per token, median (p99 dotted)", "thousand rows read per token, all heads")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="context, thousand tokens (1,024)", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


if __name__ == "__main__":
    sys.exit(main())
