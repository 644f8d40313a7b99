"""`vllm-magicpig tune`: its figures against the reference, its choice, its file, its sentences."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import VOCAB_SIZE, write_random_model
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    T5Config,
)

from vllm_magicpig import reference
from vllm_magicpig.accuracy import tune_model
from vllm_magicpig.accuracy.transformers_attention import CapturedLayer, capture
from vllm_magicpig.accuracy.tune_measure import (
    LayerMeasure,
    groups_of_layers,
    mean_key,
    measure,
    relative_error,
)
from vllm_magicpig.accuracy.tune_model import UnsupportedModel, model_shape
from vllm_magicpig.accuracy.tune_report import bytes_per_token, choose, name
from vllm_magicpig.cli import main
from vllm_magicpig.config import MagicPigOptions, parse_options
from vllm_magicpig.key_center import load_centers, save_centers
from vllm_magicpig.tune import parse_candidate

TOKENS = 900


def captured_layer(seed: int, num_tokens: int = 800, num_queries: int = 3) -> CapturedLayer:
    """2 kv heads with 2 query heads each, size 32, keys off centre."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, num_tokens, 32, generator=generator) + 1
    values = torch.randn(2, num_tokens, 32, generator=generator)
    queries = 2 * torch.randn(num_queries, 4, 32, generator=generator)
    positions = torch.arange(num_tokens - num_queries, num_tokens)
    return CapturedLayer(5, queries, keys, values, 32**-0.5, positions)


# ------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("rows", [None, 0.02])
def test_figures_are_those_of_the_reference(tmp_path: Path, rows: float | None) -> None:
    """Rows exactly; the error as far as float32 sums of 800 terms allow."""
    layer = captured_layer(0)
    center = mean_key([layer])
    save_centers(tmp_path / "center", {5: center})
    options = MagicPigOptions(
        index="buckets", K=6, L=40, rows=rows, center=str(tmp_path / "center"), seed=3
    )
    (figures,) = measure(layer, [options])
    seed = reference.layer_seed(options.seed, layer.layer_index)
    directions = reference.hyperplanes(32, options.L, options.K, seed)
    for q, position in enumerate(layer.query_positions.tolist()):
        n = position + 1
        queries, keys, values = layer.queries[q], layer.keys[:, :n], layer.values[:, :n]
        codes = reference.hash_codes(keys - center[:, None], directions, options.K)
        query_codes = reference.hash_codes(queries, directions, options.K)
        sampled = reference.sample(query_codes, codes, 2, 4, 64)
        counts = reference.count_matches(query_codes, codes)
        thresholds = [(2, 1.0)] * 4
        limit = reference.row_limit(n - 68, rows or 0.0)
        for head in range(4):
            if limit is not None and int(sampled[head].sum()) > limit:
                phase = reference.tie_phase(options.seed, n, head, query_codes[head].tolist())
                sampled[head], t, r = reference.pick_best(counts[head], sampled[head], limit, phase)
                thresholds[head] = (t, r)
        assert figures.fractions[q].tolist() == (sampled.sum(1).double() / (n - 68)).tolist()
        out, _ = reference.sampled_attention(
            queries, keys, values, layer.scale, sampled, center, 6, 40, thresholds, 4, 64
        )
        exact, _ = reference.exact_attention(queries, keys, values, layer.scale)
        expected = relative_error(out, exact)
        assert np.allclose(figures.head_errors[q], expected, rtol=0, atol=1e-4)
        together = relative_error(out.flatten(), exact.flatten())
        assert figures.errors[q] == pytest.approx(float(together), abs=1e-4)


def test_the_centre_is_the_mean_key_of_all_prompts() -> None:
    layers = [captured_layer(1, 700), captured_layer(2, 900)]
    expected = torch.cat([layer.keys.double() for layer in layers], dim=1).mean(1)
    assert torch.allclose(mean_key(layers).double(), expected, atol=1e-6)


def test_an_unused_head_has_no_error() -> None:
    out = torch.tensor([[0.0, 0.0], [4.0, 6.0]])
    assert relative_error(out, torch.tensor([[0.0, 0.0], [4.0, 0.0]])).tolist() == [0, 1.5]


@pytest.mark.parametrize(
    ("memory", "groups"),
    [(0, [[0], [2], [3]]), (20, [[0, 2], [3]]), (1000, [[0, 2, 3]])],
)
def test_as_many_layers_are_held_as_memory_allows(memory: int, groups: list[list[int]]) -> None:
    assert groups_of_layers([0, 2, 3], bytes_per_layer=10, memory_bytes=memory) == groups


# -------------------------------------------------------------------------------------- the choice


def figures_of(layer_index: int, fraction: float, error: float) -> LayerMeasure:
    """80 of 100 queries at half the error, so that the p90 is `error` and the median is not."""
    errors = np.full(100, error / 2)
    errors[-20:] = error
    return LayerMeasure(layer_index, np.full((100, 2), fraction), np.zeros((100, 2)), errors)


def test_the_smallest_error_within_the_rows_allowed_is_chosen() -> None:
    cheap = [figures_of(0, 0.01, 0.9), figures_of(1, 0.01, 0.3), figures_of(2, 0.01, 0.2)]
    good = [figures_of(0, 0.02, 0.1), figures_of(1, 0.02, 0.8), figures_of(2, 0.02, 0.1)]
    dear = [figures_of(0, 0.05, 0.01), figures_of(1, 0.05, 0.01), figures_of(2, 0.05, 0.01)]
    choice = choose([cheap, good, dear], max_sampled=0.025, num_dense=1)
    assert choice.candidate == 1
    assert choice.dense_layers[:2] == [[0], [1]], "each has its own worst layer"
    assert "smallest p90 of those that sample at most 2.5 %" in choice.reason
    # With all layers sampled, the other one is worse in none of its own.
    assert choose([cheap, good, dear], max_sampled=0.025, num_dense=0).candidate == 1
    assert choose([cheap, good, dear], max_sampled=0.015, num_dense=1).candidate == 0
    assert choose([cheap, good, dear], max_sampled=0.5, num_dense=1).candidate == 2


def test_the_fewest_rows_are_chosen_where_none_are_few_enough() -> None:
    measures = [[figures_of(0, 0.04, 0.1)], [figures_of(0, 0.03, 0.9)]]
    choice = choose(measures, max_sampled=0.02, num_dense=0)
    assert choice.candidate == 1
    assert "none samples at most 2 %" in choice.reason


def test_all_layers_may_be_dense() -> None:
    assert choose([[figures_of(3, 0.02, 0.1)]], 0.025, num_dense=7).dense_layers == [[3]]


def test_bytes_are_those_of_codes_and_the_largest_segments() -> None:
    """As in the README's table."""
    sizes = {text: bytes_per_token(parse_candidate(text, 0)) for text in ("10,150", "8,75")}
    assert sizes == {"10,150": 605, "8,75": 301}


# ---------------------------------------------------------------------------------- the whole of it


def write_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_prompt(path: Path, num_tokens: int, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).integers(VOCAB_SIZE, size=num_tokens).tolist()
    path.write_text(" ".join(f"w{i}" for i in ids))
    return ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_random_model("llama", tmp_path_factory.mktemp("llama"))
    write_tokenizer(folder)
    return folder


def tune(model: Path, prompts: list[Path], output: Path, *more: str) -> int:
    files = [str(path) for path in prompts]
    return main(["tune", str(model), "--prompts", *files, "--output", str(output), *more])


SMALL = ("--candidates", "6,40,2", "8,75", "6,40,2,0.05", "--queries", "4")


def test_it_writes_a_calibration_file_and_says_how_to_serve(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    ids = [write_prompt(path, TOKENS + seed, seed) for seed, path in enumerate(prompts)]
    output = tmp_path / "calibration.safetensors"
    assert tune(model, prompts, output, *SMALL, "--max-sampled", "1", "--dense-layers", "1") == 0
    shown = capsys.readouterr().out

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    by_prompt = [capture(loaded, prompt, 1) for prompt in ids]
    centers = load_centers(output)
    assert sorted(centers) == [0, 1, 2]
    for index, center in centers.items():
        assert torch.equal(center, mean_key([layers[index] for layers in by_prompt]))

    report = json.loads(output.with_suffix(".json").read_text())
    assert [prompt["tokens"] for prompt in report["prompts"]] == [TOKENS, TOKENS + 1]
    assert [c["K"] for c in report["candidates"]] == [6, 8, 6]
    for candidate in report["candidates"]:
        assert [layer["layer"] for layer in candidate["layers"]] == [0, 1, 2]
        for layer in candidate["layers"]:
            assert len(layer["heads"]) == 4
            assert 0 < layer["sampled_fraction"]["mean"] < 1
            assert 0 < layer["error"]["p50"] <= layer["error"]["p90"] <= layer["error"]["p99"]
    assert report["recommended_options"]["dense_layers"] == report["layers_worst_first"][:1]

    # What it tells the user to paste is what the engine takes.
    command = shlex.split(shown.strip().splitlines()[-1])
    assert command[:5] == ["vllm", "serve", str(model), "--attention-backend", "magicpig"]
    options = parse_options(json.loads(command[command.index("--additional-config") + 1]))
    assert options.center_file == str(output)
    assert options.dense_layers == tuple(report["recommended_options"]["dense_layers"])
    assert re.search(rf"^\* {name(options)} ", shown, re.MULTILINE)
    with safe_open(str(output), framework="pt") as file:
        about = file.metadata()
    assert about["num_layers"] == "3"
    assert json.loads(about["recommended_options"]) == report["recommended_options"]


def test_what_was_measured_outlives_a_folder_that_is_gone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed while it measures: the figures are printed, and the files are in the temporary folder."""
    prompt, output = tmp_path / "a.txt", tmp_path / "results" / "c.safetensors"
    write_prompt(prompt, TOKENS, 0)
    output.parent.mkdir()
    loading = tune_model.load

    def load_and_remove(name: str, device: str) -> Any:
        output.parent.rmdir()
        return loading(name, device)

    monkeypatch.setattr(tune_model, "load", load_and_remove)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tune(model, [prompt], output, *SMALL) == 0
    said = capsys.readouterr()
    options = parse_options(json.loads(shlex.split(said.out.strip().splitlines()[-1])[-1]))
    assert options.center_file is not None
    assert sorted(load_centers(options.center_file)) == [0, 1, 2]
    assert f"{output} cannot be written" in said.err
    making = tempfile.mkdtemp

    def no_room(
        suffix: str | None = None, prefix: str | None = None, dir: str | None = None
    ) -> str:
        if prefix == "vllm-magicpig-tune-":
            return str(tmp_path / "nowhere")
        return making(suffix, prefix, dir)  # what measuring needs for itself

    monkeypatch.setattr(tempfile, "mkdtemp", no_room)
    output.parent.mkdir()
    assert tune(model, [prompt], output, *SMALL) == 1
    said = capsys.readouterr()
    assert re.search(r"^\* ", said.out, re.MULTILINE)  # the candidate that is recommended
    assert "the figures are printed above" in said.err.splitlines()[-1]


def test_little_memory_and_a_second_run_change_nothing(model: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "a.txt"
    write_prompt(prompt, TOKENS, 0)
    reports = []
    for place, memory in (("a", "4"), ("b", "4"), ("c", "0.000001")):
        output = tmp_path / f"{place}.safetensors"
        assert tune(model, [prompt], output, *SMALL, "--memory-gib", memory) == 0
        report = json.loads(output.with_suffix(".json").read_text())
        report["recommended_options"].pop("center")
        reports.append(report)
    assert reports[0] == reports[1] == reports[2]


def test_a_long_prompt_is_cut_to_what_the_model_takes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "a.txt"
    write_prompt(prompt, TOKENS, 0)
    arguments = ("--candidates", "6,40", "--queries", "1", "--max-tokens", "700")
    assert tune(model, [prompt], tmp_path / "o.safetensors", *arguments) == 0
    assert (
        f"{prompt}: 700 tokens, cut from {TOKENS}, the last 1 measured" in capsys.readouterr().out
    )


def test_layers_with_a_sliding_window_are_left_out(tmp_path: Path) -> None:
    folder = write_random_model("gemma3", tmp_path / "gemma3")
    write_tokenizer(folder)
    prompt = tmp_path / "a.txt"
    write_prompt(prompt, TOKENS, 0)
    output = tmp_path / "o.safetensors"
    assert tune(folder, [prompt], output, "--candidates", "6,40", "--queries", "1") == 0
    assert sorted(load_centers(output)) == [1, 3]


# ------------------------------------------------------------------------------------ the sentences


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("10", "candidate '10' is not K,L or K,L,min_matches"),
        ("10,x", "candidate '10,x' is not K,L"),
        ("10,150,2,0.1,5", "is not K,L"),
        ("16,150", "candidate '16,150': magicpig option K is 16, but must be"),
        ("1,100", "K is 1, but must be 0 for exact .* correct it in --candidates"),
        ("0,150", "candidate '0,150' is exact attention"),
        ("10,150,2,1.5", "rows is 1.5, but must be a fraction"),
    ],
)
def test_a_wrong_candidate_is_named(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_candidate(text, 0)


def test_a_candidate_is_what_the_engine_would_make_of_it() -> None:
    assert parse_candidate("9,120,3,0.01", 7) == MagicPigOptions(
        index="buckets", K=9, L=120, min_matches=3, rows=0.01, seed=7
    )


CONFIGS: dict[str, tuple[PretrainedConfig, str]] = {
    "mla": (DeepseekV3Config(), "MLA attention"),
    "soft cap": (Gemma2Config(), "a logits soft cap of 50.0"),
    "sliding": (MistralConfig(sliding_window=4096), "a sliding window in every layer"),
    "hybrid": (Qwen3NextConfig(), "layers of type linear_attention"),
    "encoder": (T5Config(), "an encoder-decoder model"),
    "alibi": (FalconConfig(alibi=True), "ALiBi position biases"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_unsupported_model_gets_its_sentence(kind: str) -> None:
    config, value = CONFIGS[kind]
    with pytest.raises(UnsupportedModel, match=rf"^magicpig does not support {value}, it supports"):
        model_shape(config.get_text_config())


def test_the_shape_of_an_ordinary_model() -> None:
    config = MistralConfig(sliding_window=None, num_hidden_layers=5, hidden_size=64, head_dim=16)
    shape = model_shape(config)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_size) == (
        5,
        32,
        8,
        16,
    )
    assert shape.full_layers == (0, 1, 2, 3, 4)


def wrong_input(model: Path, folder: Path) -> dict[str, tuple[list[Any], str]]:
    """Arguments of `tune` and the sentence about them, for each of WRONG."""
    write_prompt(folder / "short.txt", 500, 0)
    write_prompt(folder / "long.txt", TOKENS, 0)
    (folder / "binary").write_bytes(b"\xff\xfe\x00\x81")
    short, long = folder / "short.txt", folder / "long.txt"
    output = folder / "o.safetensors"
    return {
        "no model": ([folder / "none", [long], output], r"model '.*none' cannot be loaded \(.*\)"),
        "no prompt": ([model, [folder / "x"], output], "x cannot be read .No such file"),
        "no text": ([model, [folder / "binary"], output], "binary cannot be read .it is not UTF-8"),
        "short": ([model, [long, short], output], "short.txt has 500 tokens, but 596 are needed"),
        "cut": ([model, [long], output, "--max-tokens", "99"], "long.txt has 99 tokens, but 596"),
        "folder": ([model, [long], folder / "x" / "o"], "whose folder does not exist"),
        "json": ([model, [long], folder / "o.json"], "o.json, but the figures go there"),
        "over a folder": ([model, [long], folder], "which is a folder; name a file in it"),
        "read-only": ([model, [long], Path("/proc/o.safetensors")], "which cannot be written"),
        "over a prompt": ([model, [long], folder / "long.txt"], "would write over the prompt"),
        "infinite": ([model, [long], output, "--memory-gib", "inf"], "--memory-gib is inf, but"),
        "not a number": (
            [model, [long], output, "--memory-gib", "nan"],
            "--memory-gib is nan, but",
        ),
        "no GPU": (
            [model, [long], output, "--device", "cuda:77"],
            "--device is cuda:77, but torch",
        ),
        "no device": (
            [model, [long], output, "--device", "x"],
            "--device is x, but torch .* cannot",
        ),
        "meta": ([model, [long], output, "--device", "meta"], "--device is meta, which computes"),
        "dense": ([model, [long], output, "--dense-layers", "-1"], "--dense-layers is -1, but"),
        "seed": ([model, [long], output, "--seed", "-1"], "candidate '10,150,2': .*seed.* is -1"),
        "fractions": ([model, [long], output, "--max-sampled", "nan"], "--max-sampled is nan, but"),
        "queries": ([model, [long], output, "--queries", "0"], "--queries is 0, but must be 1 or"),
        "sampled": ([model, [long], output, "--max-sampled", "3"], "--max-sampled is 3.0, but"),
        "memory": ([model, [long], output, "--memory-gib", "0"], "--memory-gib is 0.0, but"),
    }


WRONG = (
    "no model",
    "no prompt",
    "no text",
    "short",
    "cut",
    "folder",
    "json",
    "queries",
    "sampled",
    "memory",
    "over a folder",
    "read-only",
    "over a prompt",
    "infinite",
    "not a number",
    "no GPU",
    "no device",
    "meta",
    "dense",
    "seed",
    "fractions",
)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_gets_one_sentence(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, sentence = wrong_input(model, tmp_path)[kind]
    assert tune(*arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(rf"^vllm-magicpig tune: .*{sentence}", error), error
    assert not (tmp_path / "o.safetensors").exists()
