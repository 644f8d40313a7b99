"""From a worker's figures to what `vllm-magicpig stats` prints, over a /metrics of this test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from vllm_magicpig.cli import main
from vllm_magicpig.metrics import MagicPigCollector, expose
from vllm_magicpig.published_stats import StatsFile
from vllm_magicpig.stats import LayerStats, PageUse, summarise

VLLM = """# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 2.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 1.0
"""


@pytest.fixture(autouse=True)
def folder_of_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class Server(HTTPServer):
    text = ""
    status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Page(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(self.server.text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def publish(rank: int, sampled_rows: int) -> None:
    layer = LayerStats(
        decode_steps=10,
        sampled_heads=100,
        sampled_rows=sampled_rows,
        middle_rows=100_000,
        exact_heads=25,
        hash_ns=20_000,
        lookup_ns=500_000,
        attend_ns=3_000_000,
        decode_ns=4_000_000,
    )
    stats = summarise(
        [layer],
        [PageUse(4096, 3 << 20, 1 << 20, 2, 3, 1)],
        dense_layers=2,
        key_centers=1,
        threads=4,
        isa="avx2",
    )
    StatsFile("abcde", 0, rank).write(stats.to_dict())


def metrics() -> str:
    registry = CollectorRegistry()
    collector = MagicPigCollector()
    collector.vllm_config = SimpleNamespace(instance_id="abcde")
    registry.register(collector)
    return generate_latest(registry).decode()


def test_every_rank_is_shown(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    publish(0, 2000)
    publish(1, 1500)
    server.text = VLLM + metrics()
    assert main(["stats", f"{server.url}/"]) == 0
    shown = capsys.readouterr().out
    assert "5 finished, 1 running, 0 waiting" in shown
    first, second = shown.split("engine 0, rank ")[1:]
    assert "2.00 % of the middle" in first
    assert "1.50 % of the middle" in second
    assert "20 per query head and token" in first
    assert "20% of the heads attended exactly" in first
    assert "hash 2 us, lookup 50 us, attend 300 us, 400 us in all, over 10 steps" in first
    assert "3.0 MiB of pages for 4096 tokens" in first
    assert "1.0 MiB in 2 segments (3 built, 0 reused, 1 refused" in first


def test_signatures_have_an_error_bar_and_no_segments(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = LayerStats(decode_steps=16, layer_index=5, error_bars=8, error_bar_sum=1.0)
    stats = summarise(
        [layer],
        [PageUse(4096, 3 << 20, 1 << 20)],
        dense_layers=2,
        key_centers=0,
        threads=4,
        isa="avx2",
        index="signatures",
    )
    StatsFile("abcde", 0, 0).write(stats.to_dict())
    server.text = metrics()
    assert "magicpig_segments" not in server.text
    assert main(["stats", server.url]) == 0
    shown = capsys.readouterr().out
    assert "error bar     0.125 on average, 0.125 in layer 5" in shown
    assert "signatures    1.0 MiB" in shown
    assert "per kv head, for its whole group, and token" in shown
    assert "segments" not in shown


def test_a_server_that_was_asked_nothing_yet(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = summarise(
        [LayerStats()], [PageUse(0, 0)], dense_layers=1, key_centers=0, threads=1, isa="avx2"
    )
    StatsFile("abcde", 0, 0).write(stats.to_dict())
    server.text = metrics()
    assert main(["stats", server.url]) == 0
    shown = capsys.readouterr().out
    assert "0 finished, 0 running, 0 waiting" in shown
    assert "time per step 0 us in all, over 0 steps" in shown


def test_an_engine_is_shown_once_its_configuration_is_made(tmp_path: Path) -> None:
    """vLLM's registry of this process, as the API server's."""
    publish(0, 2000)
    assert REGISTRY.get_sample_value("magicpig_threads", {"engine": "0", "rank": "0"}) is None
    for _ in range(2):  # a second engine takes the first one's place
        config = SimpleNamespace(instance_id="")
        expose(config)
        config.instance_id = "abcde"  # vLLM gives it afterwards
        assert REGISTRY.get_sample_value("magicpig_threads", {"engine": "0", "rank": "0"}) == 4
    config.instance_id = "other"
    assert REGISTRY.get_sample_value("magicpig_threads", {"engine": "0", "rank": "0"}) is None


def test_a_server_without_magicpig_gets_one_sentence(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (VLLM, "<html>hello</html>"):
        server.text = text
        assert main(["stats", server.url]) == 1
        assert "shows no figures of magicpig" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:1", "no server answers at http://127.0.0.1:1/metrics"),
        ("localhost:8000", "'localhost:8000' is no address of a server"),
        ("http://[", "'http://[' is no address of a server"),
        ("http://.:80", "'http://.:80' is no address of a server"),
        ("http://127.0.0.1:0", "'http://127.0.0.1:0' is no address of a server"),
        ("http://127.0.0.1:99999", "'http://127.0.0.1:99999' is no address of a server"),
        ("http://user:word@127.0.0.1:1", "'http://user:word@127.0.0.1:1' is no address of"),
        ("http://127.0.0.1:1/?page=2", "'http://127.0.0.1:1/?page=2' is no address of a server"),
        (f"http://{80 * 'a'}:1", f"'http://{80 * 'a'}:1' is no address of a server"),
        (
            "http://127.0.0.1:1/b\u00fccher",
            "no server answers at http://127.0.0.1:1/b%C3%BCcher/metrics",
        ),
        ("http://[::1]:1/v1/", "no server answers at http://[::1]:1/metrics"),
    ],
)
def test_no_server_gets_one_sentence(
    url: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", url]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-magicpig stats: {sentence}")
    assert error.count("\n") == 1


def test_another_server_gets_one_sentence(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 403
    assert main(["stats", server.url]) == 1
    assert "answers with status 403" in capsys.readouterr().err


def test_a_page_without_an_end_gets_one_sentence(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_magicpig.server_stats.MAX_BYTES", 1 << 20)
    server.text = "# nothing\n" * (1 << 18)
    assert main(["stats", server.url]) == 1
    error = capsys.readouterr().err
    assert "sends more than 1 MiB or for more than 30 s" in error
    assert error.count("\n") == 1
