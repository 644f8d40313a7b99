"""Rows and relative output error of one method on one case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from bench_geometries import relative_error
from estimator_cases import Case

from vllm_magicpig.accuracy.key_codes import KeyCodes
from vllm_magicpig.accuracy.methods import MagicPig, Method, MethodSettings, make_method
from vllm_magicpig.config import MagicPigOptions

BASELINES = ("top-k", "oracle-sampling", "quest", "uniform", "streaming")


@dataclass(frozen=True)
class Contender:
    """A method at a budget. name: of METHODS; rows: fraction of the middle, 0 for the paper's sample,
    which takes what it takes; label: what tables and plots call it; bits: of signatures."""

    label: str
    name: str
    rows: float
    options: MagicPigOptions
    bits: int = 2

    def method(self, layer_index: int, scale: float) -> Method:
        settings = MethodSettings(self.name, self.rows, self.options, bits=self.bits)
        return make_method(settings, layer_index, scale)


@dataclass
class Measured:
    """Of one contender on one source; one figure per query, head and seed.

    errors: relative output errors; fractions: rows gathered, of the middle.
    """

    source: str
    label: str
    budget: float
    errors: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)

    def error(self, percent: float) -> float:
        return float(np.percentile(self.errors, percent))

    @property
    def rows(self) -> float:
        return float(np.mean(self.fractions))


class CodesOfCase:
    """Codes of a case's keys, shared by all contenders that hash alike: hashing takes longest."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._codes: dict[tuple[int, int, int, str], KeyCodes] = {}

    def of(self, options: MagicPigOptions) -> KeyCodes:
        same = (options.K, options.L, options.seed, options.center)
        if same not in self._codes:
            codes = KeyCodes(options, self._case.layer_index)
            codes.extend(self._case.keys)
            self._codes[same] = codes
        return self._codes[same]


@torch.inference_mode()
def measure(
    case: Case, contender: Contender, codes: CodesOfCase
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(errors, fractions of the middle), one for each step and query head."""
    method = contender.method(case.layer_index, case.scale)
    if isinstance(method, MagicPig):
        method.keys = codes.of(contender.options)
    errors, fractions = [], []
    for query, exact, n in zip(case.queries, case.exact, case.lengths, strict=True):
        out, rows = method.attend(query, case.keys[:, :n], case.values[:, :n])
        errors.append(relative_error(out, exact))
        fractions.append(rows / len(method.middle(n)))
    return torch.cat(errors).double().numpy(), torch.cat(fractions).double().numpy()


def contenders_of(options: MagicPigOptions, budgets: Sequence[float]) -> list[Contender]:
    """Everything at every budget; native once, where it has a sample of its own."""
    found = [Contender(name, name, rows, options) for name in BASELINES for rows in budgets]
    found.append(Contender("native", "magicpig", 0.0, options))
    found += [Contender("B", "magicpig", rows, options) for rows in budgets]
    for bits in (1, 2):
        label = f"signatures, {bits} bit{'s' if bits > 1 else ''}"
        found += [Contender(label, "signatures", rows, options, bits) for rows in budgets]
    return found


def centring_contenders(options: MagicPigOptions, budgets: Sequence[float]) -> list[Contender]:
    """The same hyperplanes with and without the key centre."""
    found = []
    for center, words in (("passage", "centred"), ("none", "not centred")):
        changed = replace(options, center=center)
        found.append(Contender(f"native, {words}", "magicpig", 0.0, changed))
        found += [Contender(f"B, {words}", "magicpig", rows, changed) for rows in budgets]
    return found


TABLES = ((10, 150, 2), (10, 150, 1), (10, 220, 2), (10, 220, 3), (9, 120, 2), (8, 75, 2))
"""(K, L, min_matches): the paper's, one that asks for less, more tables, fewer bits."""


def table_contenders(options: MagicPigOptions, budgets: Sequence[float]) -> list[Contender]:
    """Native and B for each of TABLES."""
    found = []
    for num_bits, num_tables, least in TABLES:
        changed = replace(options, K=num_bits, L=num_tables, min_matches=least)
        words = f"({num_bits},{num_tables}) t={least}"
        found.append(Contender(f"native {words}", "magicpig", 0.0, changed))
        found += [Contender(f"B {words}", "magicpig", rows, changed) for rows in budgets]
    return found
