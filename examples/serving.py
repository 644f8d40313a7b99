"""A real `vllm serve` as a context manager: started, waited for, asked, and gone afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 20


@dataclass(frozen=True)
class Completion:
    """text: what the server generated; ttft_s, tpot_s: seconds to the first token and per token
    after it (0 for a single token)."""

    text: str
    num_tokens: int
    ttft_s: float
    tpot_s: float


class VllmServer:
    """`with VllmServer(model, "magicpig") as server: server.complete("...")`."""

    def __init__(
        self,
        model: str | Path,
        attention_backend: str,
        *arguments: str,
        options: dict[str, Any] | None = None,
        log_path: Path,
    ) -> None:
        """options: magicpig's, passed by --additional-config; arguments: more of vllm serve's."""
        self._port = _free_port()
        self._name = attention_backend
        self._log_path = log_path
        self._command = [
            str(Path(sys.executable).parent / "vllm"),
            "serve",
            str(model),
            "--attention-backend",
            attention_backend,
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--served-model-name",
            "model",
            *arguments,
        ]
        if options:
            self._command += ["--additional-config", json.dumps({"magicpig": options})]

    def __enter__(self) -> VllmServer:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        # /collective_rpc, which answers with the plugin's statistics, is a development route.
        env = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        from openai import OpenAI

        self._client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=600)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._stop()

    def complete(self, prompt: str, max_tokens: int, **sampling: Any) -> Completion:
        """Greedy completion of a text prompt, streamed so that its tokens can be timed."""
        started = time.perf_counter()
        arrivals: list[float] = []
        pieces: list[str] = []
        stream = self._client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            **sampling,
        )
        num_tokens = 0
        for event in stream:
            if event.usage is not None:
                num_tokens = event.usage.completion_tokens
            if event.choices and event.choices[0].text:
                arrivals.append(time.perf_counter())
                pieces.append(event.choices[0].text)
        if not arrivals:
            return Completion("", num_tokens, time.perf_counter() - started, 0.0)
        per_token = (arrivals[-1] - arrivals[0]) / max(num_tokens - 1, 1)
        return Completion("".join(pieces), num_tokens, arrivals[0] - started, per_token)

    def stats(self) -> dict[str, Any]:
        """magicpig_stats of the first worker."""
        stats: dict[str, Any] = self.call("magicpig_stats")[0]
        return stats

    def call(self, method: str, *arguments: str) -> list[Any]:
        """What each worker's method answers, over the development route /collective_rpc."""
        request = urllib.request.Request(
            f"{self.url}/collective_rpc",
            data=json.dumps({"method": method, "args": arguments}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            results: list[Any] = json.load(response)["results"]
        return results

    @property
    def process_group(self) -> int:
        """Of the server and everything it started."""
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"vllm serve with {self._name} ended with exit code {self._process.returncode}: "
                    f"{first_error(self._log_path)}; all of it is in {self._log_path}"
                )
            if waited > START_TIMEOUT_S:
                raise RuntimeError(
                    f"vllm serve with {self._name} was not healthy after {START_TIMEOUT_S} s; see "
                    f"{self._log_path}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    _progress(f"{self._name}: serving after {waited:.0f} s", last=True)
                    return
            except (urllib.error.URLError, OSError):
                _progress(f"{self._name}: starting vllm serve, {waited:.0f} s")
                time.sleep(1)

    def _stop(self) -> None:
        """Ends the server and every process it started: they share its session's group."""
        for sig, patience_s in ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
            deadline = time.monotonic() + patience_s
            try:
                os.killpg(self._process.pid, sig)
                while time.monotonic() < deadline:
                    self._process.poll()
                    os.killpg(self._process.pid, 0)
                    time.sleep(0.1)
            except ProcessLookupError:
                return


def _progress(message: str, last: bool = False) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[K{message}", end="\n" if last else "", flush=True)
    elif last or message.endswith("0 s"):
        print(message, flush=True)


def first_error(log: Path) -> str:
    """The message of the first exception, which is the cause of those that follow. Messages before the
    first traceback are of exceptions that were dealt with."""
    text = log.read_text(errors="replace")
    text = text[max(0, text.find("Traceback (most recent call last)")) :]
    # Pydantic puts the sentence below a count: "... for VllmConfig", "  Value error, <sentence>".
    wrapped = re.search(r"Value error, (.*?)(?: \[type=|$)", text, re.MULTILINE)
    message = re.search(r"\b[A-Z]\w*(?:Error|Exception): (?!.*validation error)(.*)", text)
    found = [match for match in (wrapped, message) if match is not None]
    if not found:
        return "no exception was logged"
    return min(found, key=re.Match.start).group(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
