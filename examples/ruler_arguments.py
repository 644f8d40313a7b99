"""Command line of ruler.py, checked."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import recall_model
from argument_types import folder_for_results, json_object, positive, positive_list, whole
from ruler_backends import PROTOCOLS
from ruler_recall import RECALL_TASKS
from ruler_score import SCORE_FROM
from ruler_tasks import QaEntry, families

from vllm_magicpig.accuracy.methods import METHODS
from vllm_magicpig.config import DEFAULT_INDEX, parse_options

BUILT_IN = Path(".models") / "recall"
ENGINES = ("vllm", "transformers", "url")
# Under each protocol, the first token that a decode step made.
DEFAULT_SCORE_FROM = {"dense": 2, "sparse": 1}

_EPILOG = """\
Scores are string matches as in the paper (arXiv 2404.06654). The first generated token comes from the
dense prefill under the protocol "dense" and says nothing about sampled decode, so there only what
follows it is scored by default (--score-from 2). Text prompts end where a list begins, and their first
token is the list's dash; where a model answers at once, a reference that its first token begins counts
if the rest completes it, and one that the token says in full is left out. --score-from 1, the default
under the protocol "sparse", scores everything. Records keep the first token apart, so a rerun with
another --score-from only counts anew.

Answers are appended to OUTPUT/records.jsonl; a rerun answers only what is missing there.
"""


class MethodChoice(NamedTuple):
    """engine: one of ENGINES; name: vLLM's attention backend or "dense", or a method of METHODS."""

    engine: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.engine}:{self.name}"


@dataclass(frozen=True)
class Settings:
    """qa: entries of --qa-file; tokenizer: None for the model's own; rows: 0 for the paper's sample;
    compares: whether it was --compare that named the methods."""

    model: str
    tokenizer: str | None
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    qa: tuple[QaEntry, ...] | None
    methods: tuple[MethodChoice, ...]
    url: str | None
    options: dict[str, Any]
    rows: float
    protocol: str
    score_from: int
    is_chat: bool
    batch: int
    engine_arguments: dict[str, Any]
    output: Path

    @property
    def has_signatures(self) -> bool:
        return self.options.get("index", DEFAULT_INDEX) == "signatures"

    @property
    def magicpig_options(self) -> dict[str, Any]:
        """Of the engine: the options with the row budget, by the name that the index has for it."""
        if self.has_signatures:
            return self.options | {"row_budget": self.rows}
        return self.options | ({"rows": self.rows} if self.rows else {})


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument("--model", help="Hugging Face name or local folder; default: built-in model")
    what.add_argument("--tokenizer", help="where it is not the model's own, as with a served name")
    what.add_argument(
        "--tasks",
        help="names, or recall (the built-in model's), or ruler (all for models that read English); "
        "default: the set that fits the model",
    )
    what.add_argument("--lengths", type=positive_list, default="4096,8192,16384",
                      help="tokens of prompt and answer together; default %(default)s")  # fmt: skip
    what.add_argument(
        "--samples", type=positive, default=20, help="per task and length; default 20"
    )
    what.add_argument("--seed", type=whole(0), default=0)
    what.add_argument("--qa-file", type=Path,
                      help="JSON list of {question, context, answers}, for the task qa")  # fmt: skip
    what.add_argument("--chat", action="store_true", help="use the tokenizer's chat template")
    how = parser.add_argument_group("what answers")
    how.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    how.add_argument("--backend", help="of vLLM: magicpig (default), dense, or a name vLLM knows")
    how.add_argument("--method", help=f"with --engine transformers: {', '.join(METHODS)}")
    how.add_argument("--url", help="ask a running server; --backend only names it in the table")
    how.add_argument("--compare", metavar="ENGINE:NAME,...",
                     help="several in turn, such as vllm:magicpig,transformers:top-k")  # fmt: skip
    how.add_argument("--rows", type=float, default=0.02,
                     help="budget of every method that has one, as a fraction of the middle's rows; 0 "
                     "leaves magicpig's buckets the paper's sample; default %(default)s")  # fmt: skip
    how.add_argument("--options", type=json_object, default={}, help="JSON, magicpig's own")
    how.add_argument("--engine-args", type=json_object, default={},
                     help="JSON, further arguments of vLLM's LLM")  # fmt: skip
    how.add_argument("--batch", type=positive, default=1, help="prompts given to vLLM at once")
    how.add_argument("--protocol", choices=tuple(PROTOCOLS), default="dense",
                     help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()))  # fmt: skip
    parser.add_argument("--score-from", type=int, choices=SCORE_FROM,
                        help="first generated token that counts; default: see below")  # fmt: skip
    parser.add_argument("--output", type=folder_for_results, default=str(Path(".logs") / "ruler"),
                        help="folder of records, table and plot; default %(default)s")  # fmt: skip
    return parser


def parse(description: str, argv: Sequence[str] | None = None) -> Settings:
    """Exits with one sentence and code 2 where an argument is wrong."""
    parser = _parser(description)
    given = parser.parse_args(argv)
    methods = _methods(given, parser.error)
    for name in ("rows", "row_budget"):
        if name in given.options:
            parser.error(f"--options has {name!r}, which --rows gives; remove it from --options.")
    if not 0 <= given.rows <= 1:
        parser.error(f"--rows is {given.rows:g}, but must be a fraction from 0 to 1.")
    if given.protocol == "sparse" and any(method.engine == "url" for method in methods):
        parser.error(
            "--protocol is sparse, but a server prefills every token of a prompt densely, the "
            "question's too; use --engine vllm or transformers, which can force the question into "
            "decode steps."
        )
    qa = _qa(given.qa_file, parser.error)
    is_recall = given.model is None or (Path(given.model) / recall_model.STAMP).is_file()
    if given.model is None:
        recall_model.build(BUILT_IN)
    settings = Settings(
        model=given.model or str(BUILT_IN),
        tokenizer=given.tokenizer,
        tasks=_tasks(given.tasks, is_recall, qa, parser.error),
        lengths=given.lengths,
        samples=given.samples,
        seed=given.seed,
        qa=qa,
        methods=methods,
        url=given.url,
        options=given.options,
        rows=given.rows,
        protocol=given.protocol,
        score_from=given.score_from or DEFAULT_SCORE_FROM[given.protocol],
        is_chat=given.chat,
        batch=given.batch,
        engine_arguments=given.engine_args,
        output=given.output,
    )
    try:
        parse_options({"magicpig": settings.magicpig_options})
    except ValueError as error:
        parser.error(str(error))
    return settings


def _methods(
    given: argparse.Namespace, fail: Callable[[str], NoReturn]
) -> tuple[MethodChoice, ...]:
    if given.compare is None:
        if given.url is not None:
            return (MethodChoice("url", given.backend or "magicpig"),)
        if given.engine == "vllm":
            if given.method is not None:
                fail(
                    f"--method is {given.method!r}, but is for --engine transformers; name vLLM's "
                    "attention backend with --backend."
                )
            return (MethodChoice("vllm", given.backend or "magicpig"),)
        if given.backend is not None:
            fail(f"--backend is {given.backend!r}, but transformers takes --method; use that.")
        named = [MethodChoice("transformers", given.method or "magicpig")]
    else:
        if given.method is not None or given.backend is not None:
            fail("--compare names the methods itself; leave out --method and --backend.")
        named = [
            MethodChoice(*part.strip().partition(":")[::2]) for part in given.compare.split(",")
        ]
    for method in named:
        if method.engine not in ENGINES or not method.name:
            fail(
                f"--compare has {method.label!r}, but must be a list of ENGINE:NAME with an engine of "
                f"{', '.join(ENGINES)}."
            )
        if method.engine == "url" and given.url is None:
            fail(f"--compare has {method.label!r}, but no --url is given; add it.")
        if method.engine == "transformers" and method.name not in METHODS:
            fail(_unknown("method", method.name, METHODS))
    return tuple(dict.fromkeys(named))


def _tasks(
    text: str | None,
    is_recall: bool,
    qa: Sequence[QaEntry] | None,
    fail: Callable[[str], NoReturn],
) -> tuple[str, ...]:
    text_tasks = families(qa)
    tasks: list[str] = []
    for name in (text or ("recall" if is_recall else "ruler")).split(","):
        name = name.strip()
        if name == "recall":
            tasks += RECALL_TASKS
        elif name == "ruler":
            tasks += text_tasks
            if qa is None:
                print("qa is left out, since no --qa-file gives its questions.", file=sys.stderr)
        elif name == "qa" and qa is None:
            fail("--tasks has 'qa', but no file gives its questions; add --qa-file.")
        elif name in RECALL_TASKS or name in text_tasks:
            tasks.append(name)
        else:
            fail(_unknown("task", name, ("recall", "ruler", *RECALL_TASKS, *text_tasks, "qa")))
    wrong = [task for task in tasks if (task in RECALL_TASKS) != is_recall]
    if wrong and is_recall:
        fail(f"task {wrong[0]!r} needs a model that reads English; name one with --model.")
    if wrong:
        fail(
            f"task {wrong[0]!r} is in the vocabulary of the built-in model; leave out --model, or "
            "choose tasks of the set ruler."
        )
    return tuple(dict.fromkeys(tasks))


def _unknown(kind: str, name: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{kind} {name!r} is unknown; choose from {', '.join(known)}{hint}"


def _qa(path: Path | None, fail: Callable[[str], NoReturn]) -> tuple[QaEntry, ...] | None:
    if path is None:
        return None
    try:
        entries = tuple(
            QaEntry(str(e["question"]), str(e["context"]), tuple(map(str, e["answers"])))
            for e in json.loads(path.read_text("utf-8"))
        )
    except (OSError, ValueError, TypeError, KeyError):
        entries = ()
    if any(not entry.answers for entry in entries) or len({e.context for e in entries}) < 2:
        fail(
            f"--qa-file is {str(path)!r}, but must be a JSON list of at least two entries with "
            "different contexts, each with question, context and a list of answers; name such a file."
        )
    return entries
