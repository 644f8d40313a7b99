"""What sampled attention costs a real model: a text's own continuation, forced through decode steps.

    python evals/forced_decoding.py --model NAME                  the standard library's source
    python evals/forced_decoding.py --model NAME --documents essays samuel.txt --prefix 6144
    python evals/forced_decoding.py --model NAME --methods dense '{"index": "signatures", "bits": 4}'

The prefix of each document is prefilled, densely as always. Its next tokens are forced one after
the other, and each one's log-probability is compared with that of the first method. A run that is
ended goes on where it stopped. docs/evaluation.md says how to read the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

# Before anything imports vLLM: its progress would drown that of this run.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from argument_types import folder_for_results, json_object, positive
from bench_report import hardware
from forced_documents import BUILT_IN, read_document
from forced_engine import ForcedEngine
from forced_records import ForcedRun, RecordFolder, digest
from forced_report import report, table
from tqdm import tqdm

from vllm_magicpig.config import parse_options

METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "exact": {"K": 0},
    "signatures": {"index": "signatures"},
    "buckets": {"index": "buckets"},
}
"""magicpig's options by name; "dense" is the platform's own attention."""


@dataclass(frozen=True)
class Method:
    """options: magicpig's, None for the platform's own dense attention."""

    label: str
    options: dict[str, Any] | None


@dataclass(frozen=True)
class Document:
    """token_ids: int [prefix + forced + 1]."""

    name: str
    token_ids: list[int]


def method(text: str) -> Method:
    """A name of METHODS, or magicpig's options as JSON."""
    if text in METHODS:
        return Method(text, METHODS[text])
    if not text.startswith("{"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {', '.join(METHODS)} nor a JSON object of magicpig's options."
        )
    options = json_object(text)
    try:
        parse_options({"magicpig": options})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Method(" ".join(f"{name}={value}" for name, value in options.items()), options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face name or local folder")
    parser.add_argument("--name", help="of the model in tables; default: the end of --model")
    parser.add_argument(
        "--documents",
        nargs="+",
        default=["stdlib"],
        help=f"{', '.join(BUILT_IN)} or paths of text files; default: stdlib",
    )
    parser.add_argument("--prefix", type=positive, default=6144, help="tokens; default %(default)s")
    parser.add_argument("--forced", type=positive, default=192, help="tokens; default %(default)s")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method,
        default=[method(name) for name in METHODS],
        help=f"{', '.join(METHODS)} or options as JSON; the first is the reference; default: all four",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of the model; default %(default)s, so that rounding hides nothing",
    )
    parser.add_argument("--output", type=folder_for_results, default=".logs/forced_decoding")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse(argv)
    try:
        found = measure(settings, ForcedEngine)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    path = settings.output / "forced_decoding.json"
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("\n" + table(found) + f"\nwritten to {path}")
    return 0


def measure(settings: argparse.Namespace, open_engine: Callable[..., Any]) -> dict[str, Any]:
    """The report of all methods; runs what has no record yet. Raises ValueError in one sentence."""
    folder = model_folder(settings.model)
    weights = weights_digest(folder)
    documents = load_documents(settings, folder)
    records = RecordFolder(settings.output / "records")
    length = settings.prefix + settings.forced + 1
    runs: dict[str, list[ForcedRun]] = {}
    for chosen in settings.methods:
        keys = [
            digest(weights, resolved(chosen), settings.dtype, settings.prefix, document.token_ids)
            for document in documents
        ]
        missing = [i for i, key in enumerate(keys) if key not in records]
        done = len(documents) - len(missing)
        with tqdm(total=len(documents), initial=done, desc=chosen.label, unit="document") as bar:
            engine = None
            if missing:
                engine = open_engine(str(folder), chosen.options, length, settings.dtype)
            try:
                for i in missing:
                    ids = documents[i].token_ids
                    records[keys[i]] = engine.run(ids[: settings.prefix], ids[settings.prefix :])
                    bar.update()
            finally:
                if engine is not None:
                    engine.close()
        runs[chosen.label] = [records[key] for key in keys]
    return {
        "model": settings.name or Path(settings.model).name,
        "weights_sha256": weights,
        "dtype": settings.dtype,
        "protocol": "forced decoding",
        "prefix_tokens": settings.prefix,
        "forced_tokens": settings.forced,
        "documents": [
            {"name": d.name, "tokens_sha256": tokens_digest(d.token_ids)} for d in documents
        ],
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "methods": report(
            [(chosen.label, chosen.options, runs[chosen.label]) for chosen in settings.methods]
        ),
    }


def resolved(chosen: Method) -> dict[str, Any] | None:
    """All of magicpig's options, as defaults change."""
    if chosen.options is None:
        return None
    return asdict(parse_options({"magicpig": chosen.options}))


def model_folder(model: str) -> Path:
    """Where its files are; fetched from the hub where `model` is no folder."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {model!r} cannot be fetched ({str(error).splitlines()[0]}); give the name of a "
            "Hugging Face model or a local folder."
        ) from None


def weights_digest(folder: Path) -> str:
    """SHA-256 over the model's safetensors in the order of their names."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"model {str(folder)!r} has no *.safetensors; name a folder that has them."
        )
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                found.update(chunk)
    return found.hexdigest()


def tokens_digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()


def load_documents(settings: argparse.Namespace, folder: Path) -> list[Document]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    needed = settings.prefix + settings.forced + 1
    documents = []
    for name in settings.documents:
        # Tokens are shorter than that; the tokenizer need not read what nobody asks for.
        text = read_document(name)[: 16 * needed]
        token_ids = tokenizer(text).input_ids[:needed]
        if len(token_ids) < needed:
            raise ValueError(
                f"document {name!r} has {len(token_ids)} tokens, but --prefix and --forced need "
                f"{needed}; name a longer one or ask for less."
            )
        documents.append(Document(Path(name).stem, token_ids))
    return documents


def end(number: int, _: object) -> NoReturn:
    sys.exit(f"ended by {signal.Signals(number).name}; a rerun goes on from here")


if __name__ == "__main__":
    # By default SIGTERM would leave the engine's processes behind.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    sys.exit(main())
