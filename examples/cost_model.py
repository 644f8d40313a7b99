"""What to expect of magicpig beside FLASH_ATTN on a card and a host, before buying or renting either.

    python examples/cost_model.py                          tables for common cards and hosts
    python examples/cost_model.py --cards L20 --hosts 250:40 --contexts 65536 --terms
    python examples/cost_model.py --plot ratio.png         the same as a picture (needs matplotlib)
    python examples/cost_model.py --fit report.json        predictions against measurements

The model is vllm_magicpig/cost_model.py. A report for --fit is a JSON object:

    gpu         name, memory_gib, hbm_gbs, pcie_gbs: peaks, or measured with efficiencies of 1 below
    host        sequential_gbs, threads, memory_gib; row_gather_gbs and line_gather_gbs if measured
    constants   optional: any field of vllm_magicpig.cost_model.Constants by name, if measured
    runs        a list of objects:
      backend         "dense" (FLASH_ATTN) or "magicpig"
      model           a preset of --model; num_layers: optional, where fewer layers were run
      batch, context  requests, tokens of each
      measured_us     per decode step: "total" (time per output token), and any of the model's terms:
                      weights, kv, other, hashing, transfer, callback, kernel, lookup_lines,
                      lookup_counts, lookup_scan, rows, or the sums gpu, lookup and host. Times that
                      magicpig_stats sums over threads are divided by their number.
      sampled_fraction, options, segment_tokens       of magicpig only: sampled rows / middle (its
                      statistics have it), the object given as additional_config's "magicpig", and
                      the tokens of an index segment, of the largest where there are sizes
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_magicpig import cost_model
from vllm_magicpig.capacity import MAX_SEGMENT_TOKENS
from vllm_magicpig.config import MagicPigOptions, parse_options
from vllm_magicpig.cost_model import (
    GPUS,
    MODELS,
    Comparison,
    Constants,
    Gpu,
    Host,
    ModelShape,
    StepTime,
)

SAMPLED_FRACTION = 0.021
"""Of the middle at K = 10, L = 150: mean over simulated attention geometries."""
HOSTS = "100:16,200:32,300:48,400:64,500:64"
CONTEXTS = "32768,98304,131072"
BAR = 0.2
"""The error that the model is meant to keep once it is fitted; nearer than that is no difference."""
SUMS = ("gpu", "lookup", "host", "total")


@dataclass(frozen=True)
class Question:
    """What is asked of the model; the card, the host and the context vary."""

    model: ModelShape
    options: MagicPigOptions
    fraction: float
    segment_tokens: int
    constants: Constants

    def compare(self, gpu: Gpu, host: Host, context: int) -> Comparison:
        return cost_model.compare(
            self.model,
            self.options,
            gpu,
            host,
            context,
            self.fraction,
            self.segment_tokens,
            self.constants,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        if args.fit is not None:
            print(fit_report(read_report(args.fit)))
            return
        question = Question(
            model=chosen("model", args.model, MODELS),
            options=options_of(args.options),
            fraction=args.sampled_fraction,
            segment_tokens=segment_tokens_of(args.segment_tokens),
            constants=Constants(),
        )
        gpus = [chosen("card", name, GPUS) for name in args.cards.split(",")]
        hosts = [parse_host(text, args.host_memory_gib) for text in args.hosts.split(",")]
        contexts = [parse_context(text) for text in args.contexts.split(",")]
        rows = [question.compare(g, h, c) for c in contexts for g in gpus for h in hosts]
        print(heading(question, args.host_memory_gib), table(rows), sep="\n\n")
        if args.terms:
            print("", terms_table(rows), sep="\n")
        print("", "\n".join(verdicts(rows)), "", paper_check(question), "", sep="\n")
        print(sources(question.constants))
        if args.plot is not None:
            plot(rows, args.plot)
    except ValueError as error:
        sys.exit(f"cost_model: {error}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time per output token and throughput of FLASH_ATTN and magicpig, predicted.",
    )
    parser.add_argument("--model", default="llama-3.1-8b", help=", ".join(MODELS))
    parser.add_argument("--cards", default=",".join(GPUS), help="names, separated by commas")
    parser.add_argument("--hosts", default=HOSTS, help="GB/s:threads, separated by commas")
    parser.add_argument("--contexts", default=CONTEXTS, help="tokens, separated by commas")
    parser.add_argument("--host-memory-gib", type=float, default=256, help="free RAM")
    parser.add_argument("--sampled-fraction", type=float, default=SAMPLED_FRACTION)
    parser.add_argument("--options", default="{}", help='magicpig options, such as {"K": 9}')
    parser.add_argument(
        "--segment-tokens", type=int, help="one size for all; default: the package's sizes"
    )
    parser.add_argument("--terms", action="store_true", help="also print every term")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw throughput ratios")
    parser.add_argument("--fit", type=Path, metavar="JSON", help="compare with measurements")
    return parser.parse_args(arguments)


def options_of(text: str) -> MagicPigOptions:
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'options {text} are not a JSON object ({error}); write, for example, {{"K": 9}}.'
        ) from error
    if isinstance(given, dict):  # the model is of buckets
        given = {"index": "buckets", **given}
    return parse_options({"magicpig": given})


def segment_tokens_of(given: int | None) -> int:
    if given is None:
        return MAX_SEGMENT_TOKENS
    if not 1 <= given <= MAX_SEGMENT_TOKENS:
        raise ValueError(
            f"segment tokens are {given}, but must be 1 to {MAX_SEGMENT_TOKENS:,}; correct "
            "--segment-tokens."
        )
    return given


def chosen(kind: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown; choose from {', '.join(known)}.")
    return known[name]


def parse_host(text: str, memory_gib: float) -> Host:
    bandwidth, _, threads = text.partition(":")
    try:
        gbs, count = float(bandwidth), int(threads)
    except ValueError:
        gbs, count = 0.0, 0
    if memory_gib == math.inf:
        raise ValueError("--host-memory-gib is inf, but must be a number of GiB; correct it.")
    if not 0 < gbs < math.inf or count < 1:
        raise ValueError(
            f"host {text!r} is not of the form GB/s:threads with both above 0; write, for example, "
            "300:48."
        )
    return Host.assumed(gbs, count, memory_gib)


def parse_context(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"context {text!r} is not a number of tokens; write, for example, 98304.")
    return int(text)


# ------------------------------------------------------------------------------------------- tables


def segment_sizes_text(segment_tokens: int) -> str:
    return ", ".join(f"{size:,}" for size in cost_model.segment_sizes(segment_tokens))


def heading(question: Question, memory_gib: float) -> str:
    o = question.options
    return (
        f"{question.model.name}, K = {o.K}, L = {o.L}, {question.fraction:.1%} of the middle sampled, "
        f"index segments of {segment_sizes_text(question.segment_tokens)} tokens, hosts with "
        f"{memory_gib:g} GiB of free RAM. Each side runs as many requests of the context's length as "
        "it holds. TPOT: time per output token. PREDICTED, not measured: see the sources at the end."
    )


def table(rows: Iterable[Comparison]) -> str:
    lines = [
        "| context | card | host GB/s (threads) | FLASH_ATTN requests | its TPOT ms | its tokens/s | "
        "magicpig requests | its TPOT ms | its tokens/s | with one request, ms | throughput ratio |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            f"{row.context:,}",
            row.gpu.name,
            f"{row.host.sequential_gbs:g} ({row.host.threads})",
            *step_cells(row.dense),
            *step_cells(row.sampled),
            milliseconds(row.single.total) if row.single else "-",
            f"{row.ratio:.2f}" if row.ratio is not None else "-",
        ]
        lines.append(markdown(cells))
    return "\n".join(lines)


def step_cells(step: StepTime | None) -> tuple[str, str, str]:
    if step is None:
        return "0", "-", "-"
    return str(step.batch), milliseconds(step.total), f"{step.tokens_per_s:.0f}"


def terms_table(rows: Iterable[Comparison]) -> str:
    """Every term of magicpig with one request."""
    names = [term.name for term in fields(StepTime)[1:]]
    lines = [
        "Terms of magicpig's step with one request, ms:",
        "",
        markdown(["context", "card", "host GB/s", *names, "total"]),
        markdown(["--:", "---", "--:", *["--:"] * (len(names) + 1)]),
    ]
    for row in rows:
        if row.single is not None:
            times = [f"{value / 1e3:.2f}" for value in row.single.terms().values()]
            place = [f"{row.context:,}", row.gpu.name, f"{row.host.sequential_gbs:g}"]
            lines.append(markdown([*place, *times, f"{row.single.total / 1e3:.2f}"]))
    return "\n".join(lines)


def verdicts(rows: Sequence[Comparison]) -> list[str]:
    """A sentence per context and card over all hosts, in the order of the rows."""
    groups: dict[tuple[int, str], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((row.context, row.gpu.name), []).append(row)
    return [
        f"- {context:,} tokens, {name}: {verdict(group)}"
        for (context, name), group in groups.items()
    ]


def verdict(group: Sequence[Comparison]) -> str:
    """Of one card and context beside several hosts."""
    if all(row.sampled is None for row in group):
        held = "neither holds" if group[0].dense is None else "magicpig does not hold"
        return f"{held} one request."
    if group[0].dense is None:
        speeds = [row.sampled.tokens_per_s for row in group if row.sampled]
        single = [row.single.total for row in group if row.single]
        return (
            "FLASH_ATTN does not hold one request; magicpig runs "
            f"{max(row.sampled.batch for row in group if row.sampled)} at {min(speeds):.0f} to "
            f"{max(speeds):.0f} tokens/s, or one at {milliseconds(min(single))} to "
            f"{milliseconds(max(single))} ms per token."
        )
    rated = [(row, row.ratio) for row in group if row.ratio is not None]
    pays = [row for row, ratio in rated if ratio >= 1 + BAR]
    loses = [row for row, ratio in rated if ratio <= 1 / (1 + BAR)]
    best, best_ratio = max(rated, key=lambda pair: pair[1])
    assert best.sampled is not None
    share = best.sampled.host / best.sampled.total
    why = (
        f"beside {best.host.sequential_gbs:g} GB/s it reaches {best_ratio:.2f} times FLASH_ATTN's "
        f"throughput, and {share:.0%} of its step is the CPU's"
    )
    if len(loses) == len(rated):
        return f"magicpig DOES NOT PAY: even {why}; take FLASH_ATTN."
    if pays:
        return f"magicpig pays beside {bandwidths(pays)}{except_for(loses)}: {why}."
    return f"magicpig makes no clear difference{except_for(loses)}: {why}."


def bandwidths(rows: Sequence[Comparison]) -> str:
    *others, last = (f"{row.host.sequential_gbs:g}" for row in rows)
    return f"{', '.join(others)} and {last} GB/s" if others else f"{last} GB/s"


def except_for(losing: Sequence[Comparison]) -> str:
    return f", and does not pay beside {bandwidths(losing)}" if losing else ""


def paper_check(question: Question) -> str:
    """An order of magnitude: the paper's code, host and baseline are not these."""
    model, host = MODELS["llama-3.1-8b"], Host.assumed(300, 48, 256)
    step = cost_model.sampled_step(
        model,
        MagicPigOptions(index="buckets"),
        GPUS["RTX 4090"],
        host,
        1,
        98304,
        SAMPLED_FRACTION,
        question.segment_tokens,
        question.constants,
    )
    return (
        "Order of magnitude only: the paper (arXiv 2410.16179) reports 54 ms per token for one "
        "request of 96K tokens, Llama-3.1-8B, on a simulated RTX 4090; this model gives "
        f"{milliseconds(step.total)} ms beside an assumed host of 300 GB/s and 48 threads."
    )


def sources(constants: Constants) -> str:
    lines = [
        "Where the constants come from (no figure of a GPU has been measured yet):",
        "",
        "| constant | value | unit | source |",
        "|---|--:|---|---|",
    ]
    for constant in fields(constants):
        value = f"{getattr(constants, constant.name):g}"
        lines.append(
            markdown([constant.name, value, constant.metadata["unit"], constant.metadata["source"]])
        )
    shares = (("row gather", cost_model.ROW_SHARE), ("line gather", cost_model.LINE_SHARE))
    for name, share in shares:
        lines.append(
            markdown([f"{name} bandwidth", f"{share:g}", "of sequential", "assumption, all cores"])
        )
    return "\n".join(lines)


def milliseconds(us: float) -> str:
    return f"{us / 1e3:.1f}"


def markdown(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(rows: Sequence[Comparison], path: Path) -> None:
    """Throughput ratio over host bandwidth, a panel per context and a line per card."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, which is not installed; pip install matplotlib, or drop --plot."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = list(dict.fromkeys(row.context for row in rows))
    names = list(dict.fromkeys(row.gpu.name for row in rows))
    figure, axes = pyplot.subplots(
        1, len(contexts), figsize=(4.5 * len(contexts), 4.5), sharey=True, squeeze=False
    )
    for axis, context in zip(axes[0], contexts, strict=True):
        without = []
        for number, name in enumerate(names):
            line = [row for row in rows if (row.context, row.gpu.name) == (context, name)]
            points = [(row.host.sequential_gbs, row.ratio) for row in line if row.ratio is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=name)
            elif any(row.sampled for row in line):
                without.append(name)
        axis.axhspan(1 / (1 + BAR), 1 + BAR, color="0.9")
        axis.axhline(1, color="0.5", linewidth=1)
        axis.set_yscale("log")
        note = f"\nFLASH_ATTN holds no request: {', '.join(without)}" if without else ""
        axis.set_title(f"{context:,} tokens{note}", fontsize=9)
        axis.set_xlabel("host memory bandwidth, GB/s")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("decode throughput, magicpig / FLASH_ATTN (predicted)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Run:
    """A measurement and what the model says of it."""

    name: str
    predicted: StepTime
    measured_us: dict[str, float]

    def errors(self) -> dict[str, float]:
        """(predicted - measured) / measured, by term."""
        return {
            term: getattr(self.predicted, term) / measured - 1
            for term, measured in self.measured_us.items()
        }


def read_report(path: Path) -> list[Run]:
    """Runs of a report (see the top of this file); ValueError in one sentence where it is wrong."""
    try:
        report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({error}); pass a report of measurements."
        ) from error
    report = taken(report, "the report", ("gpu", "host", "runs"), ("constants",))
    gpu = Gpu(**taken(report["gpu"], "gpu", names_of(Gpu)))
    constants = Constants(
        **taken(report.get("constants", {}), "constants", (), names_of(Constants))
    )
    host = measured_host(report["host"])
    if not isinstance(report["runs"], list) or not report["runs"]:
        raise ValueError(
            f"runs of {path} must be a list of one run or more; add what was measured."
        )
    return [read_run(given, i, gpu, host, constants) for i, given in enumerate(report["runs"])]


def measured_host(given: Any) -> Host:
    """Gather bandwidths that were not measured are taken for the assumed shares."""
    gathers = ("row_gather_gbs", "line_gather_gbs")
    others = tuple(name for name in names_of(Host) if name not in gathers)
    given = taken(given, "host", others, gathers)
    assumed = Host.assumed(**{name: given[name] for name in others})
    return replace(assumed, **{name: given[name] for name in gathers if name in given})


def read_run(given: Any, index: int, gpu: Gpu, host: Host, constants: Constants) -> Run:
    where = f"run {index}"
    common = ("backend", "model", "batch", "context", "measured_us")
    own = ("sampled_fraction", "options", "segment_tokens")
    backend = given.get("backend") if isinstance(given, dict) else None
    if backend not in ("dense", "magicpig"):
        raise ValueError(
            f'{where} has backend {backend!r}, but must have "dense" or "magicpig"; name one.'
        )
    sampled = backend == "magicpig"
    given = taken(given, where, common + own * sampled, ("num_layers",))
    model = chosen("model", given["model"], MODELS)
    batch, context = given["batch"], given["context"]
    counts = ("batch", "context", "num_layers", "segment_tokens")
    for count in (name for name in counts if name in given):
        if type(given[count]) is not int or given[count] < 1:
            raise ValueError(
                f"{where} has {count} {given[count]!r}, but must have a number from 1; correct it."
            )
    model = replace(model, num_layers=given.get("num_layers", model.num_layers))
    if sampled:
        predicted = cost_model.sampled_step(
            model,
            parse_options({"magicpig": given["options"]}),
            gpu,
            host,
            batch,
            context,
            given["sampled_fraction"],
            given["segment_tokens"],
            constants,
        )
    else:
        predicted = cost_model.dense_step(model, gpu, batch, context, constants)
    terms = (*predicted.terms(), *SUMS)
    measured = taken(given["measured_us"], f"measured_us of {where}", ("total",), terms)
    for term, value in measured.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(
                f"measured_us of {where} has {term} {value!r}, but must have a time above 0; leave "
                "out what was not measured."
            )
    name = f"{backend}, {model.name}, {model.num_layers} layers, {batch} x {context:,}"
    return Run(name, predicted, measured)


def taken(
    given: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """An object with exactly these keys."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}, but must be an object; see --fit's format.")
    for name in required:
        if name not in given:
            raise ValueError(f"{where} lacks {name}; add it.")
    for name in given:
        if name not in (*required, *optional):
            allowed = ", ".join((*required, *optional))
            raise ValueError(f"{where} has the unknown key {name!r}; allowed are {allowed}.")
    return given


def names_of(cls: type) -> tuple[str, ...]:
    return tuple(one.name for one in fields(cls))


def fit_report(runs: Sequence[Run]) -> str:
    lines = ["| run | term | predicted ms | measured ms | error |", "|---|---|--:|--:|--:|"]
    for run in runs:
        for term, error in run.errors().items():
            predicted, measured = getattr(run.predicted, term), run.measured_us[term]
            cells = [run.name, term, f"{predicted / 1e3:.3f}", f"{measured / 1e3:.3f}"]
            lines.append(markdown([*cells, f"{error:+.0%}"]))
    totals = [abs(run.errors()["total"]) for run in runs]
    within = sum(error <= BAR for error in totals)
    lines += [
        "",
        f"Time per output token is predicted within {BAR:.0%} in {within} of {len(runs)} runs; the "
        f"largest error is {max(totals):.0%}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
