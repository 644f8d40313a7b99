"""examples/estimator_error.py at small sizes: what it reports, and that it knows what it claims."""

from __future__ import annotations

import json
import math
from pathlib import Path

import estimator_cases as cases
import estimator_error
import estimator_measure as measure
import pytest
import small_transformer as small
import torch
from bench_report import Report
from estimator_report import plot_errors, plot_sizes, pooled, print_errors, summary
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_magicpig import reference
from vllm_magicpig.config import MagicPigOptions

OPTIONS = MagicPigOptions(exact_below=0)


def found(argv: list[str], folder: Path) -> dict:
    assert estimator_error.main([*argv, "--output", str(folder)]) == 0
    return json.loads((folder / "estimator_error.json").read_text())


def median(content: dict, source: str, method: str, section: str = "errors") -> float:
    (one,) = [m for m in content[section] if (m["source"], m["method"]) == (source, method)]
    return one["error_p50"]


def test_flat_attention_needs_samples_and_needles_need_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's claim, and where top-k wins."""
    argv = "--geometries needle,flat --tokens 8192 --seeds 1 --steps 2 --rows 0.02"
    content = found(argv.split(), tmp_path)
    for sampled in ("oracle-sampling", "signatures, 1 bit", "signatures, 2 bits"):
        assert median(content, "flat", sampled) < 0.8 * median(content, "flat", "top-k")
    assert median(content, "needle", "top-k") < median(content, "needle", "oracle-sampling")
    for blind in ("uniform", "streaming", "quest"):
        assert median(content, "needle", blind) > 0.3
    for name in ("estimator_error.png", "sample_size.png"):
        assert (tmp_path / name).stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "error p50 / p90 / p99" in printed
    assert "Sample size without a budget" in printed
    for one in content["errors"]:
        assert one["figures"] == 2 * 8  # steps, heads
        assert one["budget"] is None or one["rows"] <= one["budget"] * 1.01
        assert one["error_p50"] <= one["error_p90"] <= one["error_p99"]


def test_the_same_arguments_give_the_same_figures(tmp_path: Path) -> None:
    argv = "--geometries heavy_hitters --tokens 2048 --seeds 2 --steps 1 --rows 0.05 --K 6 --L 30"
    first, second = (found(argv.split(), tmp_path / name)["errors"] for name in ("a", "b"))
    assert first == second


def test_comparisons_of_centring_and_tables(tmp_path: Path) -> None:
    argv = "--geometries cone --tokens 2048 --seeds 1 --steps 2 --rows 0.05"
    content = found([*argv.split(), "--compare", "centring,tables"], tmp_path)
    with_center = median(content, "cone", "native, centred", "centring")
    assert with_center < 0.5 * median(content, "cone", "native, not centred", "centring")
    methods = {one["method"] for one in content["tables"]}
    assert {"native (10,150) t=2", "B (8,75) t=2"} <= methods
    rows = {one["method"]: one["rows"] for one in content["tables"]}
    assert rows["native (10,150) t=1"] > 3 * rows["native (10,150) t=2"]


def test_a_model_by_path_and_a_text(tmp_path: Path) -> None:
    """Through a checkpoint on disk: a word-level tokenizer and a random Llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(50)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0").save_pretrained(tmp_path / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 50}" for i in range(1500)))
    argv = ["--geometries", "", "--model", str(tmp_path / "tiny"), "--text", str(text)]
    argv += ["--tokens", "700", "--seeds", "2", "--steps", "3", "--rows", "0.1", "--layers", "1"]
    content = found(argv, tmp_path)
    assert {one["source"] for one in content["errors"]} == {"tiny, layer 1"}
    assert {one["figures"] for one in content["errors"]} == {2 * 3 * 4}  # texts, steps, heads

    for wrong, words_of_it in (
        (["--tokens", "900"], "has 1500 tokens, but 2 of 900 are asked for"),
        (["--tokens", "2000"], "--tokens is 2000, but the model knows 1024 positions"),
        (["--text", str(tmp_path / "none")], "cannot be read"),
        (["--model", str(tmp_path / "nowhere")], "cannot be loaded"),
    ):
        with pytest.raises(SystemExit, match=words_of_it):
            estimator_error.main([*argv, *wrong, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--geometries", "needles"], "'needles' is none of needle"),
        (["--rows", "0.1,2"], "not above 0 and up to 1"),
        (["--compare", "bits"], "'bits' is none of centring, tables"),
        (["--K", "99"], "magicpig option K is 99"),
        (["--model", "x"], "--model and --text go together"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        estimator_error.main([*argv, "--output", str(tmp_path)])
    assert words in capsys.readouterr().err


def test_exact_steps_attend_to_what_was_there() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8), (2, 9, 8), (2, 9, 8))
    )
    out = cases.exact_steps(q, k, v, [5, 9], 0.3)
    for step, n in enumerate((5, 9)):
        expected, _ = reference.exact_attention(q[step], k[:, :n], v[:, :n], 0.3)
        torch.testing.assert_close(out[step], expected, rtol=1e-12, atol=1e-12)


def test_shared_codes_change_nothing() -> None:
    """The codes of a case are those that each method would make for itself."""
    (case,) = cases.synthetic_cases(["cone"], 1500, [3], 2)
    codes = measure.CodesOfCase(case)
    for rows in (0.0, 0.05):
        contender = measure.Contender("magicpig", "magicpig", rows, OPTIONS)
        errors, fractions = measure.measure(case, contender, codes)
        method = contender.method(case.layer_index, case.scale)
        own = [method.attend(query, case.keys, case.values) for query in case.queries]
        outs = torch.stack([out for out, _ in own])
        expected = measure.relative_error(outs, case.exact).flatten()
        assert errors.tolist() == expected.tolist()
        assert fractions.tolist() == (torch.cat([rows for _, rows in own]) / 1432).tolist()


def test_pooling_keeps_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = [
        measure.Measured("a", "G", 0.1, [0.1, 0.2], [0.1, 0.1]),
        measure.Measured("b", "G", 0.1, [0.9], [0.05]),
        measure.Measured("a", "native", 0.0, [0.3], [0.2]),
        measure.Measured("b", "native", 0.0, [0.5], [0.2]),
    ]
    together = pooled(some)
    assert [(one.label, one.errors) for one in together] == [
        ("G", [0.1, 0.2, 0.9]),
        ("native", [0.3, 0.5]),
    ]
    assert summary(together[0])["error_p50"] == 0.2
    assert summary(together[0])["rows"] == pytest.approx(0.25 / 3)
    report = Report("estimator_error", tmp_path, [], [1])
    print_errors(report, "title", some)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "G |" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["G", "10 %", "8.33", "0.200 / 0.760 / 0.886", "0.150", "0.900"]
    plot_errors(report, "errors", some)
    plot_sizes(report, "sizes", some[2:])
    assert (tmp_path / "errors.png").exists()
    assert (tmp_path / "sizes.png").exists()


def test_texts_settle_on_one_item_for_each_topic() -> None:
    text = small.corpus(4000, seed=3)
    assert torch.equal(text, small.corpus(4000, seed=3))
    assert not torch.equal(text, small.corpus(4000, seed=4))
    assert len(text) == 4000
    items = text[text >= small.ITEMS].unique()
    topics = (items - small.ITEMS) // small.CHOICES
    assert len(topics.unique()) == len(items) == small.TOPICS
    asked = ((text >= small.QUESTIONS) & (text < small.ITEMS))[:-1].nonzero().flatten()
    answers = (text[asked + 1] - small.ITEMS) // small.CHOICES
    assert torch.equal(answers, text[asked] - small.QUESTIONS)


def test_recall_counts_what_the_text_had_said() -> None:
    """A model that always names topic 0's second choice; topic 1 is asked for before it is known."""

    class Stubborn:
        def __call__(self, tokens: torch.Tensor, use_cache: bool) -> object:
            logits = torch.zeros(*tokens.shape, small.VOCABULARY)
            logits[..., small.ITEMS + 1] = 1
            return type("Output", (), {"logits": logits})

    item, question = small.ITEMS, small.QUESTIONS
    text = [item + 1, question, item + 1, question + 1, item + 4, question + 1, item + 4]
    assert small.recall(Stubborn(), torch.tensor(text)) == 0.5
    assert math.isnan(small.recall(Stubborn(), torch.tensor([1, 2, 3])))


def test_training_is_a_matter_of_the_seed() -> None:
    small.train(steps=1, long_tokens=200, quiet=True)  # the threads' first use
    (one, facts), (two, _) = (small.train(steps=3, long_tokens=200, quiet=True) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert facts.steps == 3
    assert facts.loss < math.log(small.VOCABULARY) + 0.5


def test_trained_heads_are_captured(tmp_path: Path) -> None:
    argv = ["--geometries", "", "--trained-here", "--training-steps", "2"]
    argv += ["--tokens", "600", "--seeds", "1", "--steps", "2", "--rows", "0.1"]
    content = found(argv, tmp_path)
    assert {one["source"] for one in content["errors"]} == {"trained, layer 0", "trained, layer 1"}
    assert {one["figures"] for one in content["errors"]} == {2 * 4}  # steps, heads
    assert content["training"]["long_tokens"] == 600
