"""`vllm-magicpig stats URL`: what a running server's magicpig reads, keeps and takes, from /metrics."""

from __future__ import annotations

import argparse
import http.client
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from urllib.parse import quote, urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

from vllm_magicpig.metrics import PREFIX

TIMEOUT_S, TOTAL_TIMEOUT_S = 10.0, 30.0
"""Of each answer of the network, and of the whole page."""

MAX_BYTES = 64 << 20

Samples = dict[str, dict[tuple[str, str], float]]
"""Metric name -> (engine, rank) -> value; the rank is empty in vLLM's own metrics."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="the server, such as http://127.0.0.1:8000")


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError, in one sentence, where nobody answers or magicpig does not run."""
    samples = read_samples(fetch(arguments.url))
    if f"{PREFIX}decode_steps_total" not in samples:
        raise ValueError(
            f"{arguments.url} shows no figures of magicpig, they are there when it serves with "
            "--attention-backend magicpig and one API server; see its first log lines and "
            "--api-server-count."
        )
    sys.stdout.write(report(samples))


def fetch(url: str) -> str:
    """The text of URL/metrics."""
    address = metrics_address(url)
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
            return _read(response, address).decode(errors="replace")
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{address} answers with status {error.code}, but a vLLM server shows its metrics there; "
            "check the address."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"no server answers at {address} ({reason}); start `vllm serve` or check the address."
        ) from error


def metrics_address(url: str) -> str:
    """Where the server of URL shows its metrics; raises ValueError where URL names no server."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port  # ports out of range raise ValueError
        # As a connection will look it up; labels that are empty or too long raise UnicodeError.
        name = host if ":" in host else host.encode("idna").decode()
    except ValueError:
        parts, name, port = urlsplit(""), "", None
    if (
        parts.scheme not in ("http", "https")
        or not name.strip(".")
        or port == 0
        or parts.username is not None
        or parts.query
        or parts.fragment
    ):
        raise ValueError(
            f"{url!r} is no address of a server, which looks like http://127.0.0.1:8000; give that "
            "of `vllm serve`."
        )
    path = parts.path.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"
    place = (f"[{name}]" if ":" in name else name) + ("" if port is None else f":{port}")
    return urlunsplit((parts.scheme, place, quote(path, safe="/%"), "", ""))


def _read(response: http.client.HTTPResponse, address: str) -> bytes:
    """All of it, unless it is no page of metrics: without an end, or dripping."""
    deadline = time.monotonic() + TOTAL_TIMEOUT_S
    content = bytearray()
    while part := response.read1(1 << 16):
        content += part
        if len(content) > MAX_BYTES or time.monotonic() > deadline:
            raise ValueError(
                f"{address} sends more than {MAX_BYTES >> 20} MiB or for more than "
                f"{TOTAL_TIMEOUT_S:.0f} s, but a page of metrics is small; check the address."
            )
    return bytes(content)


def read_samples(text: str) -> Samples:
    """text: of /metrics, in Prometheus' format. Of vLLM's metrics, values of one engine that differ
    in other labels (how a request finished) are added up; histograms and the like are left out."""
    samples: Samples = defaultdict(lambda: defaultdict(float))
    try:
        families = list(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError):
        return {}  # a page of some other server
    for family in families:
        if family.type not in ("counter", "gauge"):
            continue
        for sample in family.samples:
            labels = sample.labels
            place = (labels.get("engine", "0"), labels.get("rank", ""))
            if not sample.name.endswith("_created"):
                samples[sample.name][place] += sample.value
    return samples


def report(samples: Samples) -> str:
    """A paragraph for the server and one for each rank."""
    finished, running, waiting = (
        sum(samples.get(f"vllm:{name}", {}).values())
        for name in ("request_success_total", "num_requests_running", "num_requests_waiting")
    )
    lines = [
        f"requests        {finished:.0f} finished, {running:.0f} running, {waiting:.0f} waiting"
    ]
    for place in sorted(samples[f"{PREFIX}decode_steps_total"]):
        lines += ["", f"engine {place[0]}, rank {place[1]}", *_rank_lines(samples, place)]
    return "\n".join(lines) + "\n"


def _rank_lines(samples: Samples, place: tuple[str, str]) -> list[str]:
    def figure(name: str) -> float:
        return samples.get(PREFIX + name, {}).get(place, 0.0)

    steps = figure("decode_steps_total")
    heads, rows = figure("sampled_heads_total"), figure("sampled_rows_total")
    fraction = rows / max(figure("middle_rows_total"), 1)
    # A device hashes in its own time, which nobody measures, and exact mode does not hash.
    stages = [
        f"{stage} {1e6 * figure(f'{stage}_seconds_total') / max(steps, 1):.0f} us"
        for stage in ("hash", "lookup", "attend")
        if figure(f"{stage}_seconds_total")
    ]
    whole = f"{1e6 * figure('decode_seconds_total') / max(steps, 1):.0f} us in all"
    has_signatures = place in samples.get(f"{PREFIX}error_bars_total", {})
    if has_signatures:
        kind, head = "signatures", "kv head, for its whole group,"
        index = [
            f"  error bar     {figure('error_bar'):.3f} on average, "
            f"{figure('worst_layer_error_bar'):.3f} in layer {figure('worst_layer'):.0f} (expected "
            f"relative error of a head's output; of {figure('error_bars_total'):.0f})",
            f"  signatures    {figure('index_bytes') / 2**20:.1f} MiB",
        ]
    else:
        kind, head = f"{figure('key_centers'):.0f} key centres", "query head"
        index = [
            f"  index memory  {figure('index_bytes') / 2**20:.1f} MiB in {figure('segments'):.0f} "
            f"segments ({figure('segments_built_total'):.0f} built, "
            f"{figure('segments_reused_total'):.0f} reused, {figure('builds_refused_total'):.0f} "
            f"refused for lack of room), {figure('idle_index_bytes') / 2**20:.1f} MiB idle",
        ]
    return [
        f"  layers        {figure('sampled_layers'):.0f} with magicpig "
        f"({kind}), {figure('dense_layers'):.0f} dense; "
        f"{figure('threads'):.0f} threads",
        f"  sampled       {100 * fraction:.2f} % of the middle",
        f"  rows          {rows / max(heads, 1):.0f} per {head} and token, recent median "
        f"{figure('sampled_rows_p50'):.0f}, p99 {figure('sampled_rows_p99'):.0f}; "
        f"{figure('exact_heads_total') / max(heads + figure('exact_heads_total'), 1):.0%} of the "
        "heads attended exactly (short contexts)",
        f"  time per step {', '.join([*stages, whole])}, over {steps:.0f} steps and all layers "
        "(lookup and attend summed over threads)",
        f"  host memory   {figure('page_bytes') / 2**20:.1f} MiB of pages for "
        f"{figure('page_tokens'):.0f} tokens",
        *index,
    ]
