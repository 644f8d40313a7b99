"""What examples/ruler.py refuses, in one sentence, and how it asks a server."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import ruler
import ruler_arguments
from ruler_backends import Server
from ruler_prompt import Request


@pytest.mark.parametrize(
    ("index", "rows", "budget"),
    [
        ("buckets", "0.03", {"rows": 0.03}),
        ("buckets", "0", {}),
        ("signatures", "0.03", {"row_budget": 0.03}),
    ],
)
def test_the_budget_has_the_name_of_the_index(
    index: str, rows: str, budget: dict[str, float], tmp_path: Path
) -> None:
    options = json.dumps({"index": index})
    settings = ruler_arguments.parse(
        "", ["--model", "x", "--options", options, "--rows", rows, "--output", str(tmp_path)]
    )
    assert settings.magicpig_options == {"index": index} | budget


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "recall_neddle"], "task 'recall_neddle' is unknown; .*'recall_needle'"),
        (["--tasks", "vt"], "task 'vt' needs a model that reads English; name one with --model"),
        (
            ["--model", "x", "--tasks", "recall"],
            "'recall_needle' is in the vocabulary of the built",
        ),
        (["--model", "x", "--tasks", "qa"], "'qa', but no file gives its questions; add --qa-file"),
        (["--engine", "transformers", "--method", "qest"], "method 'qest' is unk.*'quest'"),
        (["--method", "quest"], "--method is 'quest', but is for --engine transformers"),
        (["--engine", "transformers", "--backend", "dense"], "transformers takes --method"),
        (["--compare", "vllm"], "--compare has 'vllm:', but must be a list of ENGINE:NAME"),
        (["--compare", "url:magicpig"], "but no --url is given; add it"),
        (["--compare", "vllm:dense", "--backend", "dense"], "names the methods itself"),
        (["--url", "http://x", "--protocol", "sparse"], "a server prefills every token"),
        (["--options", '{"rows": 0.1}'], "'rows', which --rows gives"),
        (["--options", '{"row_budget": 0.1}'], "'row_budget', which --rows gives"),
        (["--options", '{"index": "signatures"}', "--rows", "0"], "option row_budget is 0.0, but"),
        (["--options", '{"k": 9}'], "magicpig option 'k' is unknown"),
        (["--rows", "2"], "--rows is 2, but must be a fraction from 0 to 1"),
        (["--lengths", "4096,0"], "'0' is not a whole number from 1 up"),
        (["--qa-file", "nowhere.json"], "'nowhere.json', but must be a JSON list of at least two"),
    ],
)
def test_wrong_arguments_get_one_sentence(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ruler_arguments.parse("", arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.split("error: ")[-1].strip()
    assert "\n" not in said
    assert re.search(sentence, said), said


def test_a_missing_model_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = str(tmp_path / "no-such-model")
    assert ruler.main(["--model", missing, "--output", str(tmp_path)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "qa is left out" not in line]
    assert len(said) == 1
    assert said[0].startswith(f"model '{missing}' cannot be loaded (")


def test_too_long_a_length_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ruler.main(["--lengths", "300000"]) == 2
    assert capsys.readouterr().err.strip() == (
        "length 300000 is longer than the 262144 tokens that '.models/recall' takes; ask for less "
        "with --lengths."
    )


def test_a_dead_url_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ruler.main(["--url", "http://127.0.0.1:9", "--lengths", "4096", "--samples", "1"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("no OpenAI server answers at http://127.0.0.1:9 (")
    assert said.endswith("; start one with vllm serve, or correct --url.")
    assert "\n" not in said


@pytest.mark.parametrize(("protocol", "score_from"), [("dense", 2), ("sparse", 1)])
def test_what_decode_produced_is_scored(
    protocol: str, score_from: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prefill makes the first token only where it sees all of the question."""
    monkeypatch.chdir(tmp_path)
    assert ruler_arguments.parse("", ["--protocol", protocol]).score_from == score_from
    given = ["--protocol", protocol, "--score-from", str(3 - score_from)]
    assert ruler_arguments.parse("", given).score_from == 3 - score_from


class _FakeServer(http.server.BaseHTTPRequestHandler):
    """Answers with the last token of the prompt, thrice."""

    asked: list[dict[str, Any]]

    def __init__(self, asked: list[dict[str, Any]], *arguments: Any) -> None:
        self.asked = asked
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._send({"data": [{"id": "served", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        self._send({"choices": [{"token_ids": body["prompt"][-1:] * 3}]})

    def _send(self, content: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def served() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    server = http.server.HTTPServer(("127.0.0.1", 0), functools.partial(_FakeServer, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_is_asked_by_token_ids(served: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = served
    server = Server(url, "served", stop_ids={9, 3})
    (answer,) = server.answer([Request((0, 5, 7), 2, 11)])
    assert answer.token_ids == [7, 7, 7]
    assert server.max_model_len == 4096
    assert asked == [
        {
            "path": "/v1/completions",
            "model": "served",
            "prompt": [0, 5, 7],
            "max_tokens": 11,
            "temperature": 0,
            "stop_token_ids": [3, 9],
            "return_token_ids": True,
        }
    ]


def test_a_model_that_is_not_served_gets_one_sentence(
    served: tuple[str, list[dict[str, Any]]],
) -> None:
    with pytest.raises(ValueError, match=r"model 'other' is not served at .*, which has served; n"):
        Server(served[0], "other", stop_ids=set())
