"""Relative output error of sparse attention methods against the rows that they read.

    python examples/estimator_error.py --quick                       # synthetic, under a minute
    python examples/estimator_error.py                               # synthetic, 16K tokens
    python examples/estimator_error.py --trained-here                # and a model trained on the spot
    python examples/estimator_error.py --model NAME --text FILE      # q, k, v of any Hugging Face model
    python examples/estimator_error.py --compare centring,tables

For accuracy only: everything is plain PyTorch. Errors are |out - exact| / |exact| of a decode step,
and percentiles run over queries, query heads and seeds. Methods are those of vllm_magicpig/accuracy:
top-k and oracle-sampling know the true logits and are bounds; "native" is the paper's sample, without a
budget; "B" is what the engine does with the option `rows`; a group of heads shares signatures' rows.

Writes estimator_error.json, a plot of error against rows and one of sample sizes.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from argument_types import positive
from bench_geometries import GEOMETRIES
from bench_report import Report, parser
from estimator_cases import (
    Case,
    captured_cases,
    check_geometries,
    check_length,
    load_model,
    synthetic_cases,
    text_tokens,
)
from estimator_measure import (
    CodesOfCase,
    Contender,
    Measured,
    centring_contenders,
    contenders_of,
    measure,
    table_contenders,
)
from estimator_report import plot_errors, plot_sizes, print_errors, print_sizes, summary
from tqdm import tqdm

from vllm_magicpig.config import MagicPigOptions, parse_options

ISSUE_GEOMETRIES = ["needle", "heavy_hitters", "flat", "heavy_tailed", "clustered", "cone"]
Contenders: TypeAlias = Callable[[MagicPigOptions, Sequence[float]], list[Contender]]
COMPARISONS: dict[str, tuple[str, Contenders]] = {
    "centring": ("With and without the key centre", centring_contenders),
    "tables": ("K, L and min_matches", table_contenders),
}


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument(
        "--geometries",
        type=_argument(check_geometries),
        default=ISSUE_GEOMETRIES,
        help=f"of {','.join(GEOMETRIES)}; '' for none; default {','.join(ISSUE_GEOMETRIES)}",
    )
    options.add_argument("--tokens", type=positive, default=16384)
    options.add_argument("--seeds", type=positive, default=2, help="of keys and hyperplanes")
    options.add_argument("--steps", type=positive, default=4, help="decode steps of each case")
    options.add_argument("--rows", type=_fractions, default=[0.01, 0.02, 0.05], help="budgets")
    options.add_argument("--K", type=int, default=MagicPigOptions.K)
    options.add_argument("--L", type=int, default=MagicPigOptions.L)
    options.add_argument("--min-matches", type=int, default=MagicPigOptions.min_matches)
    options.add_argument("--model", help="folder or hub name of a causal language model")
    options.add_argument("--text", type=Path, help="plain text that --model reads")
    options.add_argument(
        "--layers", type=_integers, help="of --model, each by itself; default all together"
    )
    options.add_argument("--trained-here", action="store_true", help="a few minutes more")
    options.add_argument("--training-steps", type=positive, default=700)
    options.add_argument("--compare", type=_comparisons, default=[], help=",".join(COMPARISONS))
    given = options.parse_args(argv)
    if (given.model is None) != (given.text is None):
        options.error("--model and --text go together: the text is what the model reads.")
    if given.quick:
        given.tokens, given.seeds, given.steps, given.rows = 4096, 1, 2, [0.02]
        given.training_steps = min(given.training_steps, 20)
    magicpig = _options(options, given)
    threads = len(os.sched_getaffinity(0))
    report = Report("estimator_error", given.output, argv, [threads])
    sections = {"errors": ("Relative output error", contenders_of)}
    sections |= {name: COMPARISONS[name] for name in given.compare}
    contenders = {name: make(magicpig, given.rows) for name, (_, make) in sections.items()}
    found = measure_all(_cases(given, report), contenders)
    for name, (title, _) in sections.items():
        report.add(name, [summary(one) for one in found[name]])
        place = f"{given.tokens} tokens, {given.seeds} seeds, {given.steps} steps"
        print_errors(report, f"{title}; {place}", found[name])
        plot_errors(report, "estimator_error" if name == "errors" else name, found[name])
    sizes = [one for one in found["errors"] if one.label == "native"]
    if sizes:
        print_sizes(report, sizes)
        plot_sizes(report, "sample_size", sizes)
    report.finish()
    return 0


def measure_all(
    cases: Iterable[Case], contenders: dict[str, list[Contender]]
) -> dict[str, list[Measured]]:
    """Section -> what was measured, per source and contender, in the order of the contenders."""
    found: dict[str, dict[tuple[str, Contender], Measured]] = {name: {} for name in contenders}
    total = sum(map(len, contenders.values()))
    for case in cases:
        codes = CodesOfCase(case)
        tasks = ((name, one) for name, some in contenders.items() for one in some)
        for name, one in tqdm(
            tasks, desc=f"{case.source}, {case.name}", total=total, unit="method", leave=False
        ):
            errors, fractions = measure(case, one, codes)
            of = found[name].setdefault(
                (case.source, one), Measured(case.source, one.label, one.rows)
            )
            of.errors += errors.tolist()
            of.fractions += fractions.tolist()
    return {name: list(some.values()) for name, some in found.items()}


def _cases(given: argparse.Namespace, report: Report) -> Iterator[Case]:
    """Synthetic ones, then those of the model that is trained here, then those of --model."""
    synthetic = synthetic_cases(given.geometries, given.tokens, range(given.seeds), given.steps)
    trained = _trained(given, report) if given.trained_here else iter(())
    loaded = _loaded(given) if given.model is not None else iter(())
    return itertools.chain(synthetic, trained, loaded)


def _trained(given: argparse.Namespace, report: Report) -> Iterator[Case]:
    from small_transformer import corpus, train

    model, facts = train(steps=given.training_steps, long_tokens=given.tokens)
    report.add("training", facts)
    print(
        f"trained for {facts.steps} steps, {facts.seconds:.0f} s: loss {facts.loss:.2f}; answers "
        f"{100 * facts.recall:.0f} % of the questions at {facts.train_tokens} tokens, "
        f"{100 * facts.long_recall:.0f} % at {facts.long_tokens} (chance: 25 %)"
    )
    texts = [corpus(given.tokens, seed=10 + seed) for seed in range(given.seeds)]
    yield from captured_cases("trained", model, texts, given.steps, None, by_layer=True)


def _loaded(given: argparse.Namespace) -> Iterator[Case]:
    model, tokenizer = load_model(given.model)
    check_length(model, given.tokens)
    texts = text_tokens(tokenizer, given.text, given.tokens, given.seeds)
    source = Path(given.model).name
    by_layer = given.layers is not None
    yield from captured_cases(source, model, texts, given.steps, given.layers, by_layer)


def _options(options: argparse.ArgumentParser, given: argparse.Namespace) -> MagicPigOptions:
    chosen = {
        "index": "buckets",
        "K": given.K,
        "L": given.L,
        "min_matches": given.min_matches,
        "exact_below": 0,
    }
    try:
        return parse_options({"magicpig": chosen})
    except ValueError as error:
        options.error(str(error))


def _argument(check: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        try:
            return check(text) if text else []
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _fractions(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} has a budget that is not above 0 and up to 1; give fractions such as 0.01,0.02."
        )
    return values


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _comparisons(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in COMPARISONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(COMPARISONS)}.")
    return chosen


if __name__ == "__main__":
    raise SystemExit(main())
