"""What a command cannot use ends it with one sentence, before it does anything."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import argument_types
import pytest
from argument_types import folder_for_results, positive, positive_number, whole

NUMBERS: dict[Callable[[str], object], tuple[list[str], list[str]]] = {
    positive: (["1", "12345"], ["0", "-1", "1.5", "", " ", "x", "1_000", "٣", "inf", "9" * 30]),
    whole(0): (["0", "7"], ["-1", "", "nan", "9" * 30]),
    positive_number: (["0.5", "1e3"], ["0", "-1", "nan", "inf", "-inf", "", "x", "1e300"]),
    argument_types.positives: (["1", "8, 4"], ["", "8,", "8,0", "8;4"]),
    argument_types.json_object: (["{}"], ["", "[]", "{", "null", '{"a": }']),
}


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.__name__)
def test_a_type_refuses_in_one_sentence(kind: Callable[[str], object]) -> None:
    right, wrong = NUMBERS[kind]
    for text in right:
        kind(text)
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError) as refusal:
            kind(text)
        sentence = str(refusal.value)
        assert sentence.endswith(".")
        assert "\n" not in sentence


def test_results_go_into_a_folder_that_can_be_written(tmp_path: Path) -> None:
    assert folder_for_results(str(tmp_path / "new" / "folder")).is_dir()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/results")):
        with pytest.raises(argparse.ArgumentTypeError, match="is no folder that can be written"):
            folder_for_results(str(wrong))


WRONG = {
    "bench_decode_attention": [
        ["--lengths", "0"],
        ["--batches", "1,x"],
        ["--threads", "0"],
        ["--threads", "99999"],
        ["--repeats", "-3"],
        ["--max-tokens", "inf"],
        ["--output", "/proc/results"],
    ],
    "bench_index": [
        ["--parts", "nothing"],
        ["--threads", "99999"],
        ["--repeats", "0"],
        ["--build-tokens", "1.5"],
        ["--decode-steps", "0"],
        ["--error-steps", "0"],
        ["--generate", "9,8"],
        ["--budget-s", "inf"],
    ],
    "bench_generate": [
        ["--layers", "0"],
        ["--hidden-size", "-1"],
        ["--tokens", "8"],
        ["--options", "[]"],
        ["--options", '{"no_such_option": 1}'],
        ["--repeats", "0"],
    ],
    "estimator_error": [
        ["--tokens", "0"],
        ["--seeds", "0"],
        ["--steps", "x"],
        ["--rows", "2"],
        ["--model", "m"],
        ["--geometries", "round"],
        ["--training-steps", "0"],
    ],
    "kv_capacity": [
        ["--tp", "0"],
        ["--block-size", "-32"],
        ["--cards", "24", "0"],
        ["--host-memory", "inf"],
    ],
    "fuzz_bindings": [["--seconds", "nan"], ["--cases", "0"], ["--seed", "-1"], ["--case", "-1"]],
}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(command, arguments) for command, some in WRONG.items() for arguments in some],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_a_command_refuses_before_it_works(
    command: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--output" not in arguments and command.startswith(("bench_", "estimator_")):
        arguments = [*arguments, "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        importlib.import_module(command).main(arguments)
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert arguments[0] in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hosts", "inf:4"],
        ["--hosts", "300:0"],
        ["--contexts", "0"],
        ["--host-memory-gib", "inf"],
        ["--host-memory-gib", "nan"],
        ["--sampled-fraction", "nan"],
    ],
    ids=" ".join,
)
def test_the_cost_model_names_what_is_wrong(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="cost_model: "):
        importlib.import_module("cost_model").main(arguments)
