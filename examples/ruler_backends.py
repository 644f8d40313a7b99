"""What answers the questions: a vLLM engine, a served URL, or transformers with a reference method."""

from __future__ import annotations

import gc
import json
import os
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from ruler_prompt import Request

PROTOCOLS = {"dense": "question prefilled densely", "sparse": "question decoded sparsely"}
CPU_KV_CACHE_BYTES = 2 << 30  # vLLM's CPU platform would otherwise take a share of all memory
URL_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Answer:
    """token_ids: generated, with a stop token if there was one; rows_fraction: share of the middle's
    rows that decode read, over heads, layers and steps, None where it is not known."""

    token_ids: list[int]
    rows_fraction: float | None


class Backend(Protocol):
    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Greedy answers, in order."""
        ...

    def close(self) -> None:
        """Gives memory and processes back."""
        ...


class VllmEngine:
    """vLLM offline. Under the sparse protocol the context is the prompt, and the question's tokens are
    the first ones that are generated, by force (ruler_forced.py)."""

    def __init__(
        self,
        model: str,
        attention_backend: str,
        options: Mapping[str, Any],
        max_model_len: int,
        protocol: str,
        stop_ids: Collection[int],
        engine_arguments: Mapping[str, Any],
    ) -> None:
        """attention_backend: "magicpig", "dense" for the platform's own, or a name that vLLM knows."""
        from vllm import LLM
        from vllm.platforms import current_platform

        arguments: dict[str, Any] = {
            "max_model_len": max_model_len,
            "enforce_eager": True,
            "seed": 0,
        }
        if current_platform.is_cpu():
            arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        if attention_backend != "dense":
            arguments["attention_backend"] = attention_backend
        self._samples = attention_backend.lower() == "magicpig"
        if self._samples:
            arguments["additional_config"] = {"magicpig": dict(options)}
        self._is_sparse = protocol == "sparse"
        if self._is_sparse:
            from ruler_forced import QUALIFIED_NAME

            arguments["logits_processors"] = [QUALIFIED_NAME]
            # vLLM's V2 runner has logits processors of another interface, and no use on a CPU.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        self._stop_ids = set(stop_ids)
        self._llm = LLM(model, **(arguments | dict(engine_arguments)))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        before = self._rows()
        prompts = [{"prompt_token_ids": list(self._prompt(r))} for r in requests]
        outputs = self._llm.generate(
            prompts, [self._params(request) for request in requests], use_tqdm=False
        )
        rows, middle = (b - a for a, b in zip(before, self._rows(), strict=True))
        fraction = rows / middle if middle else None
        return [
            Answer(self._generated(request, list(output.outputs[0].token_ids)), fraction)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _prompt(self, request: Request) -> tuple[int, ...]:
        return request.token_ids[: request.question_start] if self._is_sparse else request.token_ids

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams

        if not self._is_sparse:
            return SamplingParams(
                temperature=0,
                max_tokens=request.max_tokens,
                stop_token_ids=sorted(self._stop_ids),
                detokenize=False,
            )
        from ruler_forced import FORCED_TOKENS

        question = list(request.token_ids[request.question_start :])
        # A chat template's question holds stop tokens, which must not end the request.
        stops = self._stop_ids.isdisjoint(question)
        return SamplingParams(
            temperature=0,
            max_tokens=len(question) + request.max_tokens,
            stop_token_ids=sorted(self._stop_ids) if stops else [],
            ignore_eos=not stops,
            extra_args={FORCED_TOKENS: question},
            detokenize=False,
        )

    def _generated(self, request: Request, token_ids: list[int]) -> list[int]:
        if self._is_sparse:
            token_ids = token_ids[len(request.token_ids) - request.question_start :]
        end = next((i + 1 for i, t in enumerate(token_ids) if t in self._stop_ids), None)
        return token_ids[:end]

    def _rows(self) -> tuple[int, int]:
        """(rows sampled, rows of the middles) since the engine started, of all ranks."""
        if not self._samples:
            return 0, 0
        stats = self._llm.collective_rpc("magicpig_stats")
        return sum(s["sampled_rows"] for s in stats), sum(s["middle_rows"] for s in stats)


class Server:
    """A running `vllm serve`, over the OpenAI completions API; the question is prefilled densely."""

    def __init__(self, url: str, model: str, stop_ids: Collection[int]) -> None:
        """Raises ValueError in one sentence where nothing answers there, or no such model."""
        self._url, self._model, self._stop_ids = url.rstrip("/"), model, sorted(stop_ids)
        served = self._ask("/v1/models", None).get("data", [])
        names = [entry.get("id") for entry in served]
        if model not in names:
            raise ValueError(
                f"model {model!r} is not served at {url}, which has {', '.join(map(str, names))}; "
                "name one of them with --model."
            )
        self.max_model_len: int | None = served[names.index(model)].get("max_model_len")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [Answer(self._complete(request), None) for request in requests]

    def close(self) -> None:
        """Nothing is held."""

    def _complete(self, request: Request) -> list[int]:
        body = {
            "model": self._model,
            "prompt": list(request.token_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stop_token_ids": self._stop_ids,
            "return_token_ids": True,
        }
        token_ids = self._ask("/v1/completions", body)["choices"][0].get("token_ids")
        if token_ids is None:
            raise ValueError(
                f"the server at {self._url} does not return token ids, which the first token is told "
                "apart by; serve the model with vLLM 0.11 or later."
            )
        return list(token_ids)

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise ValueError(
                f"the server at {self._url} answers {path} with {error.code} ({said}); see its log."
            ) from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ValueError(
                f"no OpenAI server answers at {self._url} ({error}); start one with vllm serve, or "
                "correct --url."
            ) from None


class Transformers:
    """transformers with a method of vllm_magicpig.accuracy: slow, and for accuracy only."""

    def __init__(
        self,
        model: str,
        method: str,
        rows: float,
        options: Mapping[str, Any],
        seed: int,
        protocol: str,
        stop_ids: Collection[int],
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from vllm_magicpig.accuracy.methods import MethodSettings
        from vllm_magicpig.accuracy.transformers_attention import generate, use_method
        from vllm_magicpig.config import parse_options
        from vllm_magicpig.passage import PASSAGE_TOKENS, make_passage

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
        self._is_sparse, self._stop_ids = protocol == "sparse", set(stop_ids)
        parsed = parse_options({"magicpig": dict(options)})
        name = "signatures" if method == "magicpig" and parsed.has_signatures else method
        settings = MethodSettings(name=name, rows=rows, options=parsed, seed=seed, bits=parsed.bits)
        self._open = ExitStack()
        self._run = self._open.enter_context(use_method(self._model, settings))
        # Before all prompts, as in the engine: it fixes magicpig's key centres.
        tokenizer = AutoTokenizer.from_pretrained(model)
        vocab_size = self._model.config.get_text_config().vocab_size
        passage = make_passage(tokenizer, vocab_size, tokenizer.all_special_ids, PASSAGE_TOKENS)
        generate(self._model, passage.token_ids, 1, (), self._run)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        self._open.close()

    def _answer(self, request: Request) -> Answer:
        from vllm_magicpig.accuracy.transformers_attention import generate

        self._run.clear_rows()
        token_ids = generate(
            self._model,
            list(request.token_ids),
            request.max_tokens,
            self._stop_ids,
            self._run,
            sparse_from=request.question_start if self._is_sparse else None,
        )
        fraction = self._run.mean_fraction
        return Answer(token_ids, None if fraction != fraction else fraction)
