"""`vllm-magicpig tune MODEL --prompts FILE`: measures the options on a model and prompts of yours.

It prefills the prompts with transformers, takes the queries, keys and values of their last tokens, and
compares sampled with exact attention for each candidate (K, L, min_matches), layer and head. It
writes a calibration file, which the option `center` loads, and prints the options to serve with.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_magicpig.config import MagicPigOptions, parse_options
from vllm_magicpig.output_files import check_writable, replaced

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from vllm_magicpig.accuracy.tune_model import ModelShape
    from vllm_magicpig.accuracy.tune_report import Choice

CANDIDATES = ("10,150,2", "9,120,2", "8,75,2", "10,150,2,0.01")
_CANDIDATE_FIELDS = ("K", "L", "min_matches", "rows")
MIN_MIDDLE = 512
"""Tokens between sink and window that a prompt must have. Below, 2 % is a handful of rows."""


@dataclass(frozen=True)
class Prompt:
    """ids: the tokens that are used; num_tokens: of the whole file."""

    file: Path
    ids: list[int]
    num_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hugging Face name, as for `vllm serve`")
    add(
        "--prompts",
        metavar="FILE",
        nargs="+",
        type=Path,
        required=True,
        help="text files, a prompt each, such as the model will be asked in use (its chat template "
        "applied) and as long; two or three will do",
    )
    add(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("calibration.safetensors"),
        help="the calibration file; the figures go beside it as .json; default %(default)s",
    )
    add(
        "--candidates",
        metavar="CANDIDATE",
        nargs="+",
        default=list(CANDIDATES),
        help="what to compare, each as K,L[,min_matches[,rows]]; default " + " ".join(CANDIDATES),
    )
    add(
        "--max-sampled",
        metavar="FRACTION",
        type=float,
        default=0.025,
        help="of the middle, that the recommended candidate may read on average; default %(default)s",
    )
    add(
        "--dense-layers",
        metavar="N",
        type=int,
        help="layers to keep dense, the N of the largest error; default: as many as the backend keeps "
        "by itself, every 16th",
    )
    add(
        "--queries",
        metavar="N",
        type=int,
        default=16,
        help="tokens at each prompt's end whose attention is measured; default %(default)s",
    )
    add(
        "--max-tokens",
        metavar="N",
        type=int,
        default=16_384,
        help="longer prompts are cut; default %(default)s",
    )
    add(
        "--memory-gib",
        metavar="GIB",
        type=float,
        default=4.0,
        help="for captured keys and values, beside the model; where not all layers fit, the prompts "
        "are prefilled several times; default %(default)s",
    )
    add("--seed", type=int, default=0, help="of the hyperplanes; default %(default)s")
    add("--device", default="cpu", help="of the prefill, such as cuda; default %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError, in one sentence, for input that cannot be used."""
    candidates = [parse_candidate(text, arguments.seed) for text in arguments.candidates]
    _check_numbers(arguments)
    texts = [_read(path) for path in arguments.prompts]
    _check_output(arguments.output, arguments.prompts)
    _check_device(arguments.device)
    from vllm_magicpig.accuracy import tune_measure, tune_model, tune_report
    from vllm_magicpig.accuracy.transformers_attention import CapturedLayer, capture
    from vllm_magicpig.key_center import save_centers

    model, tokenizer, shape = tune_model.load(arguments.model, arguments.device)
    limit = min(arguments.max_tokens, shape.max_tokens)
    prompts = [
        _tokenize(path, text, tokenizer, limit, arguments.queries, candidates[0])
        for path, text in zip(arguments.prompts, texts, strict=True)
    ]
    bytes_per_layer = shape.kv_bytes_per_token * sum(len(prompt.ids) for prompt in prompts)
    groups = tune_measure.groups_of_layers(
        shape.full_layers, bytes_per_layer, int(arguments.memory_gib * 2**30)
    )
    print(_header(arguments.model, shape, prompts, groups, bytes_per_layer, arguments.queries))
    with _progress(len(prompts) * (len(groups) + len(shape.full_layers))) as advance:

        def capture_all(layers: Sequence[int]) -> list[list[CapturedLayer]]:
            found = []
            for prompt in prompts:
                found.append(capture(model, prompt.ids, arguments.queries, layers))
                advance()
            return found

        result = tune_measure.measure_layers(capture_all, groups, candidates, advance)
    num_dense = arguments.dense_layers
    if num_dense is None:
        num_dense = len(tune_report.default_dense(shape.num_layers))
    choice = tune_report.choose(result.measures, arguments.max_sampled, num_dense)
    recommended = recommended_options(candidates[choice.candidate], choice, arguments.output)
    about = {
        "model": arguments.model,
        "num_layers": str(shape.num_layers),
        "recommended_options": json.dumps(recommended),
    }
    # Before anything is written: a full disk must not cost what was measured.
    default_dense = tune_report.default_dense(shape.num_layers)
    print(tune_report.summary(candidates, result.measures, choice, default_dense), flush=True)
    calibration = _write(arguments.output, lambda path: save_centers(path, result.centers, about))
    recommended["center"] = str(calibration.absolute())
    report = {
        "model": arguments.model,
        "prompts": [{"file": str(p.file), "tokens": len(p.ids)} for p in prompts],
        "queries_per_prompt": arguments.queries,
        "seed": arguments.seed,
        "recommended_options": recommended,
        "layers_worst_first": tune_report.worst_first(result.measures[choice.candidate]),
        "candidates": tune_report.figures(candidates, result.measures),
    }
    figures = _write(
        arguments.output.with_suffix(".json"),
        lambda path: path.write_text(json.dumps(report, indent=1) + "\n"),
    )
    print(f"\nWrote {calibration} and {figures}. To serve with it:")
    given = shlex.quote(json.dumps({"magicpig": recommended}))
    print(
        f"vllm serve {shlex.quote(arguments.model)} --attention-backend magicpig "
        f"--additional-config {given}"
    )


def _write(path: Path, write: Callable[[Path], object]) -> Path:
    """Returns where it was written: `path`, or a file in the temporary folder where that has become
    unwritable."""
    try:
        with replaced(path) as new:
            write(new)
        return path
    except Exception as error:  # safetensors has exceptions of its own
        reason = str(error)
    rescued = Path(tempfile.mkdtemp(prefix="vllm-magicpig-tune-")) / path.name
    try:
        write(rescued)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be written ({reason}), nor {rescued} ({error}); the figures are printed "
            "above, make room and run the command again for the file."
        ) from error
    print(f"{path} cannot be written ({reason}); it is {rescued} instead.", file=sys.stderr)
    return rescued


def parse_candidate(text: str, seed: int) -> MagicPigOptions:
    """text: "K,L[,min_matches[,rows]]"; raises ValueError for what the options would refuse."""
    try:
        values = [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not 2 <= len(values) <= len(_CANDIDATE_FIELDS):
        raise ValueError(
            f"candidate {text!r} is not K,L or K,L,min_matches or K,L,min_matches,rows; write it as "
            "10,150,2 or 10,150,2,0.01."
        )
    given = dict(zip(_CANDIDATE_FIELDS, values, strict=False)) | {"seed": seed, "index": "buckets"}
    try:
        options = parse_options({"magicpig": given})
    except ValueError as error:
        reason = str(error).replace("--additional-config", "--candidates")
        raise ValueError(f"candidate {text!r}: {reason}") from error
    if options.is_exact:
        raise ValueError(
            f"candidate {text!r} is exact attention, which has no error; give a K of 2 to 15."
        )
    return options


def recommended_options(
    candidate: MagicPigOptions, choice: Choice, calibration: Path
) -> dict[str, Any]:
    """What to write into --additional-config; only what differs from a default but K and L."""
    options: dict[str, Any] = {"K": candidate.K, "L": candidate.L}
    if candidate.index != MagicPigOptions.index:
        options["index"] = candidate.index
    if candidate.min_matches != MagicPigOptions.min_matches:
        options["min_matches"] = candidate.min_matches
    if candidate.rows is not None:
        options["rows"] = candidate.rows
    if candidate.seed != MagicPigOptions.seed:
        options["seed"] = candidate.seed
    options["dense_layers"] = choice.dense_layers[choice.candidate]
    options["center"] = str(calibration.absolute())
    return options


def _check_numbers(arguments: argparse.Namespace) -> None:
    least = {"queries": 1, "max_tokens": 1, "dense_layers": 0, "seed": 0}
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise _wrong_number(name, value, f"{lowest} or more")
    if not 0 < arguments.max_sampled <= 1:
        raise _wrong_number("max_sampled", arguments.max_sampled, "above 0 and up to 1")
    if not 0 < arguments.memory_gib < math.inf:
        raise _wrong_number("memory_gib", arguments.memory_gib, "a number of GiB above 0")


def _wrong_number(name: str, value: float, allowed: str) -> ValueError:
    return ValueError(f"--{name.replace('_', '-')} is {value}, but must be {allowed}; correct it.")


def _check_output(output: Path, prompts: Sequence[Path]) -> None:
    """Before anything is measured."""
    if output.suffix == ".json":
        raise ValueError(
            f"--output is {output}, but the figures go there; name the calibration file .safetensors."
        )
    for path in (output, output.with_suffix(".json") if output.name else output):
        check_writable("--output", path)
        if any(path.exists() and path.samefile(prompt) for prompt in prompts):
            raise ValueError(f"--output would write over the prompt {path}; name another file.")


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device)
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"--device is {device}, but torch {torch.__version__} cannot use it ({reason}); give cpu, "
            "or cuda where torch has a CUDA build and a GPU."
        ) from error
    if kind.type == "meta":
        raise ValueError("--device is meta, which computes nothing; give cpu or cuda.")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(
            f"prompt file {path} cannot be read ({reason}); give text files."
        ) from error


def _tokenize(
    path: Path, text: str, tokenizer: Any, limit: int, num_queries: int, options: MagicPigOptions
) -> Prompt:
    ids: list[int] = tokenizer(text)["input_ids"]
    needed = options.sink_tokens + MIN_MIDDLE + options.window_tokens + num_queries
    if min(len(ids), limit) < needed:
        raise ValueError(
            f"prompt {path} has {min(len(ids), limit)} tokens, but {needed} are needed (sink, window, "
            f"{MIN_MIDDLE} between them and {num_queries} queries); give a longer prompt, as long as "
            "those in use."
        )
    return Prompt(path, ids[:limit], len(ids))


def _header(
    model: str,
    shape: ModelShape,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[int]],
    bytes_per_layer: int,
    num_queries: int,
) -> str:
    lines = [
        f"{model}: {shape.num_layers} layers, {len(shape.full_layers)} without a sliding window, "
        f"{shape.num_heads} query heads over {shape.num_kv_heads} kv heads of size {shape.head_size}"
    ]
    for prompt in prompts:
        cut = f", cut from {prompt.num_tokens}" if prompt.num_tokens > len(prompt.ids) else ""
        lines.append(
            f"{prompt.file}: {len(prompt.ids)} tokens{cut}, the last {num_queries} measured"
        )
    gib = len(groups[0]) * bytes_per_layer / 2**30
    times = "once" if len(groups) == 1 else f"{len(groups)} times, for want of --memory-gib"
    lines.append(
        f"keys and values of {len(groups[0])} layers at a time take {gib:.2f} GiB beside the model; "
        f"each prompt is prefilled {times}"
    )
    return "\n".join(lines)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Yields what counts one more; a bar where the output is a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, disable=None, desc="measuring", leave=False) as bar:
        yield bar.update


if __name__ == "__main__":
    from vllm_magicpig.cli import main

    sys.exit(main(["tune", *sys.argv[1:]]))
