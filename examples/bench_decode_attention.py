"""Decode attention of one layer, 8B-shaped: the sample against vLLM's CPU_ATTN, our exact mode and the
reference layout.

    python examples/bench_decode_attention.py                 2K to 256K tokens, batch 1, 4 and 16
    python examples/bench_decode_attention.py --quick
    python examples/bench_decode_attention.py --lengths 32768 --batches 1 --threads 1

32 query heads, 8 kv heads, head size 128, bfloat16, blocks of 128 tokens anywhere in memory. All sides
hold the same rows in their own layout on the same kind of memory, and take turns in one process: each
repeat has a query that no side has seen, and something else is read before each call, so that a call
finds its memory cold as it would in a model of many layers. Our side includes hashing the query and
both conversions; `exact_below` is 1, so that short contexts are sampled, too.

Before anything is timed, vLLM's output is compared with that of our exact mode.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from argument_types import positive, positives
from bench_geometries import GROUP, HEAD_DIM, NUM_KV_HEADS, AttentionLayer, generate
from bench_layer import (
    BUCKETS,
    SINK_TOKENS,
    WINDOW_TOKENS,
    Config,
    Counted,
    Decoder,
    DenseLayer,
    Placement,
    ReferenceLayer,
    SampledLayer,
    kernel_pool,
    load_native,
    page_memory,
)
from bench_report import (
    Clock,
    Evictor,
    Report,
    Timing,
    available_bytes,
    cores,
    interleave,
    parser,
    tokens_name,
    upper_quartile,
    use_cpus,
)

from vllm_magicpig import _C

NUM_Q_HEADS = NUM_KV_HEADS * GROUP
MAX_TOKENS = 1 << 18
"""Of all requests of a case: a layer of them takes about 5 GiB with all of its sides."""
BYTES_PER_TOKEN = 24 << 10
"""Generous for what a case holds per token: float32 rows, three layouts of them, codes and indexes."""
AGREEMENT = 2.0**-7
"""Relative difference allowed between two bfloat16 results: each output is rounded (2**-9), and kernels
for some CPUs may round the softmax weights as well."""
ISA_MAX_TOKENS = 1 << 15
GATHER_BUFFER_BYTES = 2 << 30
GATHER_DENSITY = 0.02
ISAS = ("avx512_vpopcnt", "avx512", "avx2", "portable")


@dataclass(frozen=True)
class Case:
    num_tokens: int
    batch: int

    @property
    def name(self) -> str:
        return f"{tokens_name(self.num_tokens)} x {self.batch}"


class Prefetch(NamedTuple):
    """How far ahead rows are fetched, and to which cache."""

    distance: int
    cache_level: int

    def __str__(self) -> str:
        return f"{self.distance}, L{self.cache_level}"


PREFETCHES = tuple(Prefetch(distance, level) for level in (1, 2) for distance in (8, 16, 32, 64))


@dataclass(frozen=True)
class Bandwidth:
    """GB/s of this machine's memory, in the same run: best of several prefetch distances into L1 and
    L2, upper quartiles of the repeats as lower quartiles are of times."""

    threads: int
    sequential: float
    sorted_gather: float
    random_gather: float
    sorted_prefetch: Prefetch
    random_prefetch: Prefetch

    @property
    def gather(self) -> float:
        """What shares are of: either may be disturbed by other jobs, neither exceeds the memory."""
        return max(self.sorted_gather, self.random_gather)


@dataclass(frozen=True)
class Measurement:
    """One config in one case.

    lookup_ms, attend_ms, reference_lookup_ms: lower quartiles of wall time summed over threads, the
    same on both sides whatever the clock of the other columns; sampled_fraction: rows per query
    head / rows of the middle; row_reads: rows that query heads read in a step, each its own;
    distinct_rows: the same with rows that heads of a group share counted once, None where that is not
    known; lookup_bytes: ids and codes; page_bytes to reference_bytes: per token and kv head.
    """

    case: Case
    config: str
    threads: int
    ours: Timing
    dense: Timing
    exact: Timing
    lookup_ms: float
    attend_ms: float
    reference_lookup_ms: float | None
    sampled_fraction: float
    row_reads: float
    distinct_rows: float | None
    row_bytes: int
    lookup_bytes: float
    page_bytes: int
    code_bytes: int
    index_bytes: float
    reference_bytes: float | None
    agreement: float

    @property
    def bytes_moved(self) -> float:
        """What comes from memory if each distinct row comes once."""
        rows = self.row_reads if self.distinct_rows is None else self.distinct_rows
        return rows * self.row_bytes + self.lookup_bytes

    @property
    def attend_rate(self) -> float:
        """GB/s of distinct rows while attention runs on `threads` threads."""
        rows = self.row_reads if self.distinct_rows is None else self.distinct_rows
        return rows * self.row_bytes * self.threads / self.attend_ms / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--lengths", type=positives, default=[2048, 8192, 32768, 131072, 262144])
    options.add_argument("--batches", type=positives, default=[1, 4, 16])
    options.add_argument("--threads", type=positives, help="default: 1 to all cores")
    options.add_argument("--repeats", type=positive, default=15)
    options.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, timed by its CPU time: for a machine that others keep busy",
    )
    options.add_argument("--max-tokens", type=positive, default=MAX_TOKENS, help="of all requests")
    given = options.parse_args(argv)
    cpus = cores()
    if given.quick:
        given.lengths = [n for n in given.lengths if n <= 8192] or given.lengths[:1]
        given.batches, given.repeats = given.batches[:1], min(given.repeats, 5)
    threads = [t for t in given.threads or _powers_of_two(len(cpus)) if t <= len(cpus)]
    if given.cpu_time:
        threads = [1]
    if not threads:
        options.error(f"--threads is {given.threads}, but there are {len(cpus)} cores")

    native = load_native()
    report = Report("bench_decode_attention", given.output, argv, threads)
    configs = BUCKETS[: 1 if given.quick else None]
    bandwidths = {
        count: measure_bandwidth(native, cpus[:count], quick=given.quick) for count in threads
    }
    clock = time.thread_time if given.cpu_time else time.perf_counter
    report.add("clock", clock.__name__)
    if given.cpu_time:
        print("times of the sides are CPU time; lookups, attend GB/s and bandwidths are wall time")
    report.add("bandwidth_gb_per_s", list(bandwidths.values()))
    print_bandwidths(report, bandwidths)

    measured: list[Measurement] = []
    skipped: list[str] = []
    for case in cases(given.lengths, given.batches, given.max_tokens, skipped):
        measured += measure_case(case, configs, threads, cpus, given.repeats, native, clock)
        report.add("results", [_with_derived(m, bandwidths) for m in measured])
    report.add("skipped", skipped)
    print_results(report, measured, bandwidths)
    if skipped:
        print("\nskipped: " + "; ".join(skipped))
    isas = measure_isas(given, cpus, native, clock)
    report.add("isas", isas)
    print_isas(report, isas)
    report.plot("bench_decode_attention", 11, lambda axes: draw(axes, measured), panels=2)
    report.finish()
    return 0


def _powers_of_two(most: int) -> list[int]:
    return sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})


def cases(
    lengths: Sequence[int], batches: Sequence[int], max_tokens: int, skipped: list[str]
) -> list[Case]:
    """Those that fit, by number of tokens; `skipped` gets the reasons for the others."""
    kept = []
    for num_tokens in sorted(lengths):
        for batch in sorted(batches):
            case = Case(num_tokens, batch)
            needed = num_tokens * batch * BYTES_PER_TOKEN
            if num_tokens * batch > max(max_tokens, min(lengths)):
                skipped.append(f"{case.name}: more than {max_tokens} tokens")
            elif needed > available_bytes():
                skipped.append(
                    f"{case.name}: needs about {needed / 2**30:.0f} GiB of memory, "
                    f"{available_bytes() / 2**30:.0f} GiB are free"
                )
            else:
                kept.append(case)
    return kept


# ------------------------------------------------------------------------------------- bandwidth


def measure_bandwidth(native: ModuleType, cpus: list[int], quick: bool) -> Bandwidth:
    num_bytes = min(GATHER_BUFFER_BYTES >> (2 * quick), available_bytes() // 4)
    buffer = page_memory(num_bytes, native)
    buffer[::64] = 1
    row_bytes = 2 * 2 * HEAD_DIM
    num_rows = num_bytes // row_bytes - 8
    repeats = 4 if quick else 8
    rng = np.random.default_rng(0)
    num_gathered = int(GATHER_DENSITY * num_rows)
    ascending = np.stack(
        [np.sort(rng.choice(num_rows, num_gathered, replace=False)) for _ in range(repeats)]
    )
    anywhere = rng.integers(num_rows, size=(repeats, num_gathered))
    sequential = upper_quartile(native.sequential_read(buffer, cpus, repeats))

    def best(rows: np.ndarray) -> tuple[float, Prefetch]:
        return max(
            (upper_quartile(native.gather_rows(buffer, rows, row_bytes, *prefetch, cpus)), prefetch)
            for prefetch in PREFETCHES
        )

    (sorted_rate, sorted_prefetch), (random_rate, random_prefetch) = best(ascending), best(anywhere)
    return Bandwidth(
        len(cpus), sequential, sorted_rate, random_rate, sorted_prefetch, random_prefetch
    )


# ----------------------------------------------------------------------------------------- timing


def make_requests(case: Case) -> list[AttentionLayer]:
    return [generate("mixed", case.num_tokens, seed=number) for number in range(case.batch)]


def make_queries(requests: Sequence[AttentionLayer], num: int) -> torch.Tensor:
    """bfloat16 [num, num_reqs, num_q_heads, head_size]: a step each."""
    parts = [request.queries(num, seed=1 + number) for number, request in enumerate(requests)]
    return torch.stack(parts, dim=1).bfloat16()


def measure_case(
    case: Case,
    configs: Sequence[Config],
    threads: Sequence[int],
    cpus: Sequence[int],
    repeats: int,
    native: ModuleType,
    clock: Clock,
) -> list[Measurement]:
    use_cpus(cpus)
    requests = make_requests(case)
    placement = Placement.shuffled(case.batch, case.num_tokens)
    dense = DenseLayer(requests, placement, native)
    found = []
    for config in configs:
        print(f"{case.name}, {config.name}", file=sys.stderr, flush=True)
        use_cpus(cpus)
        isa, pool = _C.resolve_isa("auto"), _C.ThreadPool(list(cpus))
        layer = SampledLayer(config, requests, placement, native, isa, pool)
        reference = ReferenceLayer(layer, native)
        del pool
        for count in threads:
            found.append(
                measure_config(case, layer, dense, reference, cpus[:count], repeats, isa, clock)
            )
        del layer, reference
    return found


def measure_config(
    case: Case,
    layer: SampledLayer,
    dense: DenseLayer,
    reference: ReferenceLayer | None,
    cpus: Sequence[int],
    repeats: int,
    isa: _C.Isa,
    clock: Clock,
) -> Measurement:
    use_cpus(cpus)
    decoder = Decoder(layer, isa, kernel_pool(cpus))
    dense.start_step(NUM_Q_HEADS)
    # One query for each call of all repeats, so that none has been seen by the caches.
    queries = make_queries(layer.requests, repeats + 1)
    agreement = check_agreement(decoder, dense, queries[-1])
    counted: list[Counted] = []
    looked: list[float] = []

    output = torch.empty_like(queries[0])  # vLLM gives it to an attention layer

    def look_up(repeat: int) -> None:
        assert reference is not None
        looked.append(reference.lookup(codes[repeat], cpus).busy_s)

    sides: dict[str, Callable[[int], Any]] = {
        "ours": lambda repeat: decoder.decode(queries[repeat], output=output),
        "dense": lambda repeat: dense.decode(queries[repeat], output),
        "exact": lambda repeat: decoder.decode(queries[repeat], exact=True, output=output),
    }
    distinct_rows, entries = None, 0
    if reference is not None:
        codes = [decoder.hash_queries(query) for query in queries]
        sides["reference"] = look_up
        first = reference.lookup(codes[0], cpus, positions=True)
        entries = first.entries
        distinct_rows = float(_distinct(first.ids))
    evict = Evictor()

    def between() -> None:
        """Before each side: what the one before it counted, if it was ours."""
        if (step := decoder.counted()) is not None:
            counted.append(step)
        evict()

    seconds = interleave(sides, repeats, between, clock)
    between()
    counted = counted[1:]  # without the one that is not timed
    rows = float(np.mean([one.rows for one in counted]))
    middle = case.num_tokens - SINK_TOKENS - WINDOW_TOKENS
    static = NUM_KV_HEADS * case.batch * (SINK_TOKENS + WINDOW_TOKENS)
    config = layer.config
    return Measurement(
        case=case,
        config=config.name,
        threads=len(cpus),
        ours=Timing.of(seconds["ours"]),
        dense=Timing.of(seconds["dense"]),
        exact=Timing.of(seconds["exact"]),
        lookup_ms=Timing.of([one.lookup_ns / 1e9 for one in counted]).p25_ms,
        attend_ms=Timing.of([one.attend_ns / 1e9 for one in counted]).p25_ms,
        reference_lookup_ms=Timing.of(looked[1:]).p25_ms if looked else None,
        sampled_fraction=rows / (NUM_Q_HEADS * case.batch * middle),
        row_reads=rows + static * GROUP,
        distinct_rows=None if distinct_rows is None else distinct_rows + static,
        row_bytes=layer.row_bytes,
        lookup_bytes=lookup_bytes(config, case, entries),
        page_bytes=layer.row_bytes,
        code_bytes=layer.code_bytes,
        index_bytes=layer.index_bytes_per_token(),
        reference_bytes=None
        if reference is None
        else reference.num_bytes / (case.batch * case.num_tokens * NUM_KV_HEADS),
        agreement=agreement,
    )


def check_agreement(decoder: Decoder, dense: DenseLayer, query: torch.Tensor) -> float:
    """Largest relative difference of a head's output between vLLM's op and our exact mode; ends the
    benchmark where it cannot be rounding: times of different results say nothing."""
    ours = decoder.decode(query, exact=True).double()
    # Poisoned: a fresh tensor may lie where our result lay, and then agree with it unwritten.
    theirs = dense.decode(query, torch.full_like(query, math.nan)).double()
    difference = float(((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).max())
    if not difference <= AGREEMENT:
        sys.exit(
            f"CPU_ATTN and our exact mode differ by {difference:.3g} of an output, and bfloat16 "
            f"explains {AGREEMENT:.3g}; nothing was timed."
        )
    return difference


def _distinct(ids: Sequence[Sequence[np.ndarray]]) -> int:
    """Rows of a step, those that heads of one group share counted once."""
    return sum(
        np.unique(np.concatenate(heads[start : start + GROUP])).size
        for heads in ids
        for start in range(0, len(heads), GROUP)
    )


def lookup_bytes(config: Config, case: Case, entries: int) -> float:
    """2 bytes for each entry, and two offsets for each probe (segments of more than one size make it a
    little more)."""
    segments = math.ceil(case.num_tokens / (1 << 16))
    return 2.0 * entries + 4.0 * config.L * NUM_Q_HEADS * case.batch * segments


@dataclass(frozen=True)
class IsaTiming:
    case: Case
    config: str
    isa: str
    timing: Timing


def measure_isas(
    given: Any, cpus: Sequence[int], native: ModuleType, clock: Clock
) -> list[IsaTiming]:
    """Forced instruction sets against one another, one thread, batch 1."""
    isas = {}
    for name in ISAS:
        try:
            isas[name] = _C.resolve_isa(name)
        except ValueError:  # not built, or this CPU lacks it
            continue
    found = []
    lengths = [n for n in sorted(given.lengths) if n <= ISA_MAX_TOKENS]
    for num_tokens in lengths[-2:]:
        case = Case(num_tokens, 1)
        requests = make_requests(case)
        placement = Placement.shuffled(1, num_tokens)
        config = BUCKETS[0]
        use_cpus(cpus[:1])
        pool = _C.ThreadPool(list(cpus[:1]))
        layer = SampledLayer(config, requests, placement, native, _C.resolve_isa("auto"), pool)
        queries = make_queries(requests, given.repeats + 1)

        def side(name: str, of: SampledLayer, steps: torch.Tensor) -> Callable[[int], Any]:
            decoder = Decoder(of, isas[name], _C.ThreadPool(list(cpus[:1])))
            return lambda repeat: decoder.decode(steps[repeat])

        sides = {name: side(name, layer, queries) for name in isas}
        seconds = interleave(sides, given.repeats, Evictor(), clock)
        found += [IsaTiming(case, config.name, name, Timing.of(seconds[name])) for name in isas]
    return found


# ----------------------------------------------------------------------------------------- output


def print_bandwidths(report: Report, bandwidths: dict[int, Bandwidth]) -> None:
    report.print_table(
        f"Memory, GB/s; rows of {2 * 2 * HEAD_DIM} bytes at {100 * GATHER_DENSITY:g} % density, best "
        "prefetch distance and cache in brackets",
        ("threads", "sequential", "gather, ascending", "gather, random"),
        [
            (
                str(b.threads),
                f"{b.sequential:.1f}",
                f"{b.sorted_gather:.1f} [{b.sorted_prefetch}]",
                f"{b.random_gather:.1f} [{b.random_prefetch}]",
            )
            for b in bandwidths.values()
        ],
    )


def _ratio(ours: Timing, other: Timing) -> str:
    return f"{other.median_ms / ours.median_ms:.2f} ({other.p25_ms / ours.p25_ms:.2f})"


def print_results(
    report: Report, measured: Sequence[Measurement], bandwidths: dict[int, Bandwidth]
) -> None:
    report.print_table(
        "One decode step of one layer, ms (medians; ratios of medians, of lower quartiles in brackets; "
        "lookups: lower quartiles, summed over threads)",
        (
            *("tokens x batch", "config", "threads", "ours", "CPU_ATTN", "exact"),
            *("CPU_ATTN/ours", "exact/ours", "lookup", "reference lookup", "reference/lookup"),
        ),
        [
            (
                m.case.name,
                m.config,
                str(m.threads),
                f"{m.ours.median_ms:.3f}",
                f"{m.dense.median_ms:.3f}",
                f"{m.exact.median_ms:.3f}",
                _ratio(m.ours, m.dense),
                _ratio(m.ours, m.exact),
                f"{m.lookup_ms:.3f}",
                *(
                    ("-", "-")
                    if m.reference_lookup_ms is None
                    else (
                        f"{m.reference_lookup_ms:.3f}",
                        f"{m.reference_lookup_ms / m.lookup_ms:.2f}",
                    )
                ),
            )
            for m in measured
        ],
    )
    report.print_table(
        "The same: rows and bytes. MB: distinct rows, ids and codes; shares: GB/s of distinct rows "
        "during attention against the better gather and the "
        "sequential read above; memory per token and kv head",
        (
            *("tokens x batch", "config", "threads", "sampled %", "Mrows/s", "MB", "attend GB/s"),
            *("of gather", "of sequential", "page B", "code B", "index B", "reference B"),
        ),
        [
            (
                m.case.name,
                m.config,
                str(m.threads),
                f"{100 * m.sampled_fraction:.2f}",
                f"{m.row_reads / m.ours.median_ms / 1e3:.1f}",
                f"{m.bytes_moved / 1e6:.2f}",
                f"{m.attend_rate:.1f}",
                f"{100 * m.attend_rate / bandwidths[m.threads].gather:.0f} %",
                f"{100 * m.attend_rate / bandwidths[m.threads].sequential:.0f} %",
                str(m.page_bytes),
                str(m.code_bytes),
                f"{m.index_bytes:.0f}",
                "-" if m.reference_bytes is None else f"{m.reference_bytes:.0f}",
            )
            for m in measured
        ],
    )


def print_isas(report: Report, isas: Sequence[IsaTiming]) -> None:
    best = {(t.case, t.config): t.timing for t in reversed(isas)}
    report.print_table(
        "Forced instruction sets, one thread; against the best of this CPU",
        ("tokens x batch", "config", "isa", "ms", "times the best"),
        [
            (
                t.case.name,
                t.config,
                t.isa,
                f"{t.timing.median_ms:.3f}",
                f"{t.timing.median_ms / best[t.case, t.config].median_ms:.2f}",
            )
            for t in isas
        ],
    )


def _with_derived(m: Measurement, bandwidths: dict[int, Bandwidth]) -> dict[str, Any]:
    """What the tables print, so that the file can be read alone."""
    bandwidth = bandwidths[m.threads]
    lookup = m.reference_lookup_ms
    return {
        **vars(m),
        "dense_over_ours": m.ours.times_faster_than(m.dense),
        "exact_over_ours": m.ours.times_faster_than(m.exact),
        "reference_lookup_over_ours": None if lookup is None else lookup / m.lookup_ms,
        "bytes_moved": m.bytes_moved,
        "attend_gb_per_s": m.attend_rate,
        "share_of_gather": m.attend_rate / bandwidth.gather,
        "share_of_sequential": m.attend_rate / bandwidth.sequential,
    }


def draw(axes: Any, measured: Sequence[Measurement]) -> None:
    """Time and ratio against context length, batch 1, all threads."""
    most = max(m.threads for m in measured)
    batch = min(m.case.batch for m in measured)
    shown = [m for m in measured if m.threads == most and m.case.batch == batch]
    lengths = sorted({m.case.num_tokens for m in shown})
    names = list(dict.fromkeys(m.config for m in shown))
    for colour, name in enumerate(names):
        own = [m for m in shown if m.config == name]
        at = [m.case.num_tokens for m in own]
        style = {"color": f"C{colour + 2}", "marker": "o", "label": name}
        axes[0].plot(at, [m.ours.median_ms for m in own], **style)
        axes[1].plot(at, [m.ours.times_faster_than(m.dense) for m in own], **style)
    first = [m for m in shown if m.config == names[0]]
    at = [m.case.num_tokens for m in first]
    axes[0].plot(at, [m.dense.median_ms for m in first], "C0s--", label="CPU_ATTN")
    axes[0].plot(at, [m.exact.median_ms for m in first], "C1^--", label="exact mode")
    axes[0].set_yscale("log")
    titles = (f"ms per layer and step, batch {batch}, threads {most}", "CPU_ATTN / ours")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [tokens_name(n) for n in lengths])
        axis.minorticks_off()
        axis.set(xlabel="context tokens", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[1].set_ylim(bottom=0)


if __name__ == "__main__":
    sys.exit(main())
