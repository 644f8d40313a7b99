"""RULER's task families (arXiv 2404.06654) with magicpig, dense attention and other sparse methods.

    python examples/ruler.py                         the built-in recall model on the vLLM engine
    python examples/ruler.py --model NAME --lengths 32768,65536 --backend dense
    python examples/ruler.py --model NAME --url http://127.0.0.1:8000
    python examples/ruler.py --engine transformers --method quest --rows 0.02
    python examples/ruler.py --protocol sparse       the question's tokens decoded one by one
    python examples/ruler.py --lengths 16384 --compare \\
        vllm:magicpig,vllm:dense,transformers:magicpig,transformers:top-k

A run that is ended goes on where it stopped; see docs/evaluation.md for how to read its tables.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Before anything imports vLLM: its progress would drown that of this run.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from ruler_arguments import MethodChoice, Settings, parse
from ruler_backends import PROTOCOLS, Backend, Server, Transformers, VllmEngine
from ruler_prompt import PromptFormat
from ruler_recall import RECALL_TASKS
from ruler_recall import generate as generate_recall
from ruler_record import Record, RecordFile, settings_digest
from ruler_report import agreements, cells, json_report, plot, text_report
from ruler_run import Case, Labels, run
from ruler_sample import Sample
from ruler_tasks import families
from ruler_tasks import generate as generate_text

# What samples follow from: a record made by another version of these is not reused.
RECALL_SOURCES = ("ruler_recall.py", "ruler_prompt.py", "recall_model.py", "recall_words.txt")
TEXT_SOURCES = ("ruler_tasks.py", "ruler_text.py", "ruler_prompt.py", "recall_words.txt")


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse(__doc__, argv)
    try:
        records = answer_all(settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    report(settings, records)
    return 0


def answer_all(settings: Settings) -> list[Record]:
    """The records of all methods in turn; raises ValueError in one sentence."""
    tokenizer, stop_ids, max_length = load_tokenizer(settings.tokenizer or settings.model)
    for length in settings.lengths:
        if length > max_length:
            raise ValueError(
                f"length {length} is longer than the {max_length} tokens that {settings.model!r} "
                "takes; ask for less with --lengths."
            )
    form = PromptFormat(tokenizer, settings.is_chat)
    make_sample = sample_maker(settings, form)
    cases = [
        Case(*case)
        for case in itertools.product(settings.tasks, settings.lengths, range(settings.samples))
    ]
    file = RecordFile(settings.output / "records.jsonl")
    # All before the first run, which may take hours: the sources are those that are loaded.
    digests = [settings_digest(what_shapes_answers(settings, m)) for m in settings.methods]
    found: list[Record] = []
    for method, digest in zip(settings.methods, digests, strict=True):
        labels = Labels(digest, method.label, PROTOCOLS[settings.protocol])
        run(
            cases,
            make_sample,
            form,
            lambda method=method: open_backend(settings, method, stop_ids),
            file,
            labels,
            settings.batch,
        )
        found += [file.records[(*case, digest)] for case in cases]
    return found


def load_tokenizer(model: str) -> tuple[Any, set[int], int]:
    """(tokenizer, token ids that end an answer, longest context); ValueError without the model."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model {model!r} cannot be loaded ({reason}); give the name of a Hugging Face model that "
            "this machine can download, or a local folder."
        ) from None
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the file is optional
        eos = None
    ids = eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos]
    return tokenizer, {i for i in ids if i is not None}, config.max_position_embeddings


def sample_maker(settings: Settings, form: PromptFormat) -> Callable[[Case], Sample]:
    text_families = families(settings.qa)

    def make(case: Case) -> Sample:
        if case.task in RECALL_TASKS:
            return generate_recall(case.task, case.length, case.index, settings.seed)
        family = text_families[case.task]
        return generate_text(family, case.task, case.length, case.index, settings.seed, form)

    return make


def what_shapes_answers(settings: Settings, method: MethodChoice) -> dict[str, Any]:
    """All but (task, length, index)."""
    here = Path(__file__).parent
    names = RECALL_SOURCES if settings.tasks[0] in RECALL_TASKS else TEXT_SOURCES
    sources = hashlib.sha256(b"".join((here / name).read_bytes() for name in names))
    shape: dict[str, Any] = {
        "model": settings.model,
        "tokenizer": settings.tokenizer,
        "method": method.label,
        "protocol": settings.protocol,
        "seed": settings.seed,
        "is_chat": settings.is_chat,
        "sources": sources.hexdigest(),
        "qa": None if settings.qa is None else repr(settings.qa),
    }
    if method.name != "dense":
        shape |= {"rows": settings.rows, "options": settings.options}
    if method.engine == "vllm":
        shape["engine_arguments"] = settings.engine_arguments
    if method.engine == "url":
        shape["url"] = settings.url
    return shape


def open_backend(settings: Settings, method: MethodChoice, stop_ids: set[int]) -> Backend:
    longest = max(settings.lengths)
    if method.engine == "vllm":
        return VllmEngine(
            settings.model,
            method.name,
            settings.magicpig_options,
            longest,
            settings.protocol,
            stop_ids,
            settings.engine_arguments,
        )
    if method.engine == "transformers":
        return Transformers(
            settings.model,
            method.name,
            settings.rows,
            settings.options,
            settings.seed,
            settings.protocol,
            stop_ids,
        )
    assert settings.url is not None
    server = Server(settings.url, settings.model, stop_ids)
    if server.max_model_len is not None and longest > server.max_model_len:
        raise ValueError(
            f"length {longest} is longer than the {server.max_model_len} tokens that the server at "
            f"{settings.url} takes; ask for less, or start it with a larger --max-model-len."
        )
    return server


def report(settings: Settings, records: Sequence[Record]) -> None:
    """Prints the table and writes it, the JSON and the plot."""
    found = cells(records, settings.score_from)
    agreed = agreements(records) if len(settings.methods) > 1 else []
    options = " ".join(f"{name}={value}" for name, value in settings.options.items())
    head = (
        f"{Path(settings.model).name}, {settings.samples} samples a task, seed {settings.seed}, "
        f"rows {settings.rows:g} of the middle{', ' + options if options else ''}"
    )
    text = f"{head}\n\n{text_report(found, agreed, settings.score_from)}\n"
    shown = {"model": settings.model, "rows": settings.rows, "options": settings.options,
             "samples": settings.samples, "seed": settings.seed}  # fmt: skip
    (settings.output / "ruler.md").write_text(text, "utf-8")
    (settings.output / "ruler.json").write_text(
        json_report(found, agreed, settings.score_from, shown), "utf-8"
    )
    print("\n" + text)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there is no plot; pip install matplotlib.")
    else:
        plot(found, settings.output / "ruler.png")
    print(f"written to {settings.output}")


def end(number: int, _: object) -> NoReturn:
    sys.exit(f"ended by {signal.Signals(number).name}; a rerun goes on from here")


if __name__ == "__main__":
    # By default SIGTERM would leave the engine's processes behind.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    sys.exit(main())
