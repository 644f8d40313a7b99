"""examples/compare_flash_attention.py without an engine: figures, table, plot, arguments, and what
becomes of an engine's process, with a script in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import compare_flash_attention as compare
import pytest
from compare_arguments import parse
from compare_engine import Plan, prompts, text_prompt, warm_up_cases
from compare_figures import (
    Case,
    EngineFacts,
    HostUse,
    Request,
    Result,
    Run,
    Step,
    figures,
    host_use,
)
from compare_report import Comparison, machine_facts, plot, table
from compare_setup import SHAPES, Device, engine_arguments, with_budget, write_model

from vllm_magicpig.vllm_versions import kv_cache_planner

CPU = Device("cpu", "vLLM's CPU platform", None)
GPU = Device("cuda", "a GPU", 80 << 30)


def prefill(at: float | None, tokens: int, running: int, new_tokens: int = 0) -> Step:
    return Step(at, new_tokens, 1, tokens, 0, 0, running)


def decode(at: float, requests: int, running: int) -> Step:
    return Step(at, requests, 0, 0, requests, requests, running)


# Two prompts of 100 tokens, prefilled one after the other; the first decodes beside the second's
# prefill, then both decode, then the second alone.
STAGGERED = Run(
    requests=[Request([2.0, 5.0, 5.5, 6.0], 0), Request([5.0, 5.5, 6.0, 6.25], 1)],
    steps=[
        prefill(None, 50, running=1),
        prefill(2.0, 50, running=1, new_tokens=1),
        Step(5.0, 2, 1, 100, 1, 1, 2),
        decode(5.5, 2, running=2),
        decode(6.0, 2, running=1),
        decode(6.25, 1, running=0),
    ],
)


def test_figures_of_a_run() -> None:
    found = figures(Case(100, 2), [STAGGERED])
    assert found.ttft_median_s == 3.5
    assert found.ttft_max_s == 5.0
    assert found.tpot_ms == 500, "5 tokens of steps that only decode: 4 after 0.5 s, 1 after 0.25"
    assert found.decode_tokens_per_s == 5 / 1.25
    assert found.prefill_tokens_per_s == 200 / 5.0
    assert found.output_tokens_per_s == 8 / 6.25
    assert found.peak_running == 2
    assert found.preemptions == 1
    assert found.output_tokens == 8


def test_figures_of_repeats_weigh_every_run() -> None:
    faster = Run(
        requests=[Request([1.0, 1.25], 0)] * 2,
        steps=[Step(1.0, 2, 2, 200, 0, 0, 2), decode(1.25, 2, running=0)],
    )
    found = figures(Case(100, 2), [STAGGERED, faster])
    assert found.ttft_median_s == 1.5
    assert found.tpot_ms == 500
    assert found.decode_tokens_per_s == (5 + 2) / (1.25 + 0.25)
    assert found.prefill_tokens_per_s == 400 / (5.0 + 1.0)


def test_tokens_that_a_preemption_computes_again_are_no_decoding() -> None:
    resumed = Step(3.0, 2, 0, 0, 2, 1 + 64, 2)
    assert not resumed.is_decode
    run = Run(
        requests=[Request([1.0, 3.0, 3.5], 0), Request([1.0, 3.0, 3.5], 1)],
        steps=[Step(1.0, 2, 2, 200, 0, 0, 2), resumed, decode(3.5, 2, running=0)],
    )
    found = figures(Case(100, 2), [run])
    assert found.decode_tokens_per_s == 2 / 0.5
    assert found.prefill_tokens_per_s == 200 / 3.0


def test_no_decode_figures_without_a_step_that_only_decodes() -> None:
    run = Run([Request([1.0, 2.0], 0)], [prefill(1.0, 100, 1, 1), Step(2.0, 1, 1, 10, 1, 1, 1)])
    found = figures(Case(100, 1), [run])
    assert found.decode_tokens_per_s is None
    assert found.tpot_ms is None
    assert found.prefill_tokens_per_s == 100 / 2.0


def test_runs_survive_json() -> None:
    assert Run.from_dict(json.loads(json.dumps(asdict(STAGGERED)))) == STAGGERED


def _stats(sampled: int, middle: int) -> dict[str, Any]:
    return {
        "sampled_rows": sampled,
        "middle_rows": middle,
        "page_bytes": 100,
        "index_bytes": 10,
        "page_tokens": 7,
        "isa": "portable",
    }


def test_host_use_sums_ranks_and_counts_the_case_only() -> None:
    before, after = [_stats(5, 100)] * 2, [_stats(8, 200)] * 2
    assert host_use(before, after) == HostUse(200, 20, 7, sampled_fraction=6 / 200)
    assert host_use(after, after).sampled_fraction is None


def _result(backend: str, case: Case, **given: Any) -> Result:
    found = figures(case, [STAGGERED])
    return Result(backend, case, figures=replace(found, **given), runs=[STAGGERED])


def _comparison(*results: Result) -> Comparison:
    return Comparison(
        command=["compare_flash_attention.py", "--options", '{"K": 9}'],
        machine=machine_facts("a device"),
        settings=asdict(parse([])),
        backends=("magicpig", "CPU_ATTN"),
        engines={"magicpig": EngineFacts(164, 4096, 32, 128, 24.9, 3 << 29, 12.3)},
        results=list(results),
        finished=True,
    )


def _rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_puts_the_ratio_below_both_backends() -> None:
    case = Case(100, 2)
    host = HostUse(3 << 30, 1 << 29, 7, 0.0213)
    ours = replace(_result("magicpig", case, tpot_ms=250.0, ttft_max_s=10.0), host=host)
    text = _comparison(ours, _result("CPU_ATTN", case)).markdown()
    rows = {row[2]: row for row in _rows(text) if row[:2] == ["100", "2"]}
    header = next(row for row in _rows(text) if row[0] == "prompt tokens")
    assert list(rows) == ["magicpig", "CPU_ATTN", "ratio"]
    column = header.index("ms/token")
    assert [row[column] for row in rows.values()] == ["250.00", "500.00", "0.50"]
    column = header.index("TTFT max s")
    assert [row[column] for row in rows.values()] == ["10.00", "5.00", "2.00"]
    assert rows["magicpig"][-3:] == ["3.000", "0.500", "2.13 %"]
    assert rows["CPU_ATTN"][-3:] == ["", "", ""]
    assert ["magicpig", "4096", "32 x 128", "1.500", "12"] in _rows(text)
    assert "--options '{\"K\": 9}'" in text


def test_table_names_the_reason_of_a_refusal_and_gives_no_ratio() -> None:
    case = Case(100, 2)
    refused = Result("CPU_ATTN", case, refused="it needs 2 GiB")
    text = _comparison(_result("magicpig", case), refused).markdown()
    rows = [row for row in _rows(text) if row[:2] == ["100", "2"]]
    assert [row[2] for row in rows] == ["magicpig", "CPU_ATTN"]
    assert rows[1][3] == "cannot hold it"
    assert "- CPU_ATTN, 100 tokens: it needs 2 GiB" in text


def test_ratio_of_a_missing_or_zero_figure_is_a_dash() -> None:
    case = Case(100, 2)
    ours = _result("magicpig", case, decode_tokens_per_s=None)
    text = _comparison(ours, _result("CPU_ATTN", case, preemptions=0)).markdown()
    header = next(row for row in _rows(text) if row[0] == "prompt tokens")
    ratio = next(row for row in _rows(text) if row[2] == "ratio")
    assert ratio[header.index("decode tokens/s")] == ratio[header.index("preemptions")] == "-"
    assert ratio[header.index("ms/token")] == "1.00"


def test_table_is_aligned_and_fills_short_rows() -> None:
    lines = table(("a", "long name"), [("1234",), ("1", "2")]).splitlines()
    assert lines == [
        "|    a | long name |",
        "|-----:|----------:|",
        "| 1234 |           |",
        "|    1 |         2 |",
    ]


def test_an_unfinished_comparison_says_so(tmp_path: Path) -> None:
    comparison = _comparison(_result("magicpig", Case(100, 2)))
    assert "Unfinished" not in comparison.markdown()
    comparison.finished = False
    comparison.write(tmp_path)
    assert "Unfinished" in (tmp_path / "comparison.md").read_text()
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["finished"] is False
    assert written["results"][0]["figures"]["tpot_ms"] == 500
    assert written["results"][0]["runs"][0]["steps"][1]["at"] == 2.0
    assert written["machine"]["cores"] >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "comparison.md"]


def test_plot_has_a_line_for_each_backend_and_number_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = [
        _result(backend, Case(length, requests), tpot_ms=length / 1e3)
        for backend in ("magicpig", "CPU_ATTN")
        for length in (8192, 2048)
        for requests in (1, 2)
    ]
    results.append(Result("CPU_ATTN", Case(32768, 1), refused="too long"))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot(results, ("magicpig", "CPU_ATTN"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    left, right = pyplot.gcf().axes
    labels = [line.get_label() for line in left.get_lines()]
    assert labels == [
        "magicpig, 1 request",
        "magicpig, 2 requests",
        "CPU_ATTN, 1 request",
        "CPU_ATTN, 2 requests",
    ]
    assert left.get_lines()[0].get_xdata().tolist() == [2048, 8192]
    assert left.get_lines()[0].get_ydata().tolist() == [2.048, 8.192]
    assert right.get_lines()[0].get_ydata().tolist() == [4.0, 4.0]
    monkeypatch.undo()
    pyplot.close("all")


def test_plot_of_nothing_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot([Result("magicpig", Case(100, 1), refused="no")], ("magicpig",), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "8k"], "argument --lengths: '8k' is not a whole number from 1 up."),
        (["--requests", "1,,2"], "argument --requests: '' is not a whole number from 1 up."),
        (["--repeats", "0"], "argument --repeats: '0' is not a whole number from 1 up."),
        (["--output-tokens", "1"], "--output-tokens is 1, but must be at least 2"),
        (["--shape", "gpt"], "--shape is 'gpt', but must be one of small, llama-3.1-8b."),
        (["--model", "m", "--shape", "small"], "--model and --shape both name a model"),
        (["--config", "/nowhere"], "--config is '/nowhere', but must be the config.json"),
        (["--model", "m", "--layers", "2"], "add --load-format dummy."),
        (["--prompts", "text"], "use --prompts random."),
        (["--options", "K=10"], "argument --options: 'K=10' is not JSON"),
        (["--options", "[1]"], "argument --options: '[1]' is not a JSON object."),
        (["--options", '{"Q": 1}'], "magicpig option 'Q' is unknown"),
        (["--engine-args", '{"model": "m"}'], "--engine-args has 'model', which the comparison"),
        (["--gpu-memory-gib", "-1"], "'-1' is not a number above 0."),
        (["--gpu-memory-gib", "nan"], "'nan' is not a number above 0."),
        (["--host-gib", "8", "--options", '{"host_kv_cache_gib": 8}'], "keep one of them."),
    ],
)
def test_wrong_arguments_end_with_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(arguments)
    assert ending.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_cases_ascend() -> None:
    settings = parse(["--lengths", "8192,1024", "--requests", "2,1"])
    assert settings.cases == sorted(settings.cases)
    assert settings.cases[0] == Case(1024, 1)


def test_prompts_are_text_only_where_the_weights_are_real() -> None:
    assert parse(["--model", "m"]).prompts == "text"
    assert parse(["--model", "m", "--load-format", "dummy"]).prompts == "random"
    assert parse(["--shape", "small"]).load_format == "dummy"
    assert parse([]).shape == "small"


def test_budget_on_the_cpu_platform() -> None:
    settings = parse(["--kv-cache-gib", "0.5"])
    assert with_budget(settings, CPU) == (settings, {"kv_cache_memory_bytes": 1 << 29})
    assert with_budget(parse([]), CPU)[1] == {"kv_cache_memory_bytes": 4 << 30}
    for name in ("--gpu-memory-gib", "--host-gib"):
        with pytest.raises(ValueError, match=f"{name} is 24, but vLLM's CPU platform"):
            with_budget(parse([name, "24"]), CPU)


def test_budget_on_a_gpu() -> None:
    settings, budget = with_budget(parse(["--gpu-memory-gib", "20", "--host-gib", "64"]), GPU)
    assert budget == {"gpu_memory_utilization": 0.25}
    assert settings.options == {"host_kv_cache_gib": 64.0}
    assert with_budget(parse([]), GPU)[1] == {}, "vLLM's own default"
    assert with_budget(parse(["--gpu-memory-gib", "80"]), GPU)[1] == {"gpu_memory_utilization": 1}
    with pytest.raises(ValueError, match=r"--gpu-memory-gib is 81, but a GPU has 80\.0 GiB"):
        with_budget(parse(["--gpu-memory-gib", "81"]), GPU)
    with pytest.raises(ValueError, match="belongs to vLLM's CPU platform"):
        with_budget(parse(["--kv-cache-gib", "1"]), GPU)


def test_both_engines_get_the_same_but_for_the_backend() -> None:
    settings = parse(
        ["--options", '{"threads": 1}', "--layers", "2", "--engine-args", '{"dtype": "half"}']
    )
    budget = {"kv_cache_memory_bytes": 1}
    ours = engine_arguments(settings, budget, "magicpig", "folder", 100)
    dense = engine_arguments(settings, budget, "CPU_ATTN", "folder", 100)
    assert ours.pop("additional_config") == {"magicpig": {"threads": 1}}
    assert (ours.pop("attention_backend"), dense.pop("attention_backend")) == (
        "magicpig",
        "CPU_ATTN",
    )
    assert ours == dense
    assert dense["enable_prefix_caching"] is False
    assert dense["hf_overrides"] == {"num_hidden_layers": 2}
    assert dense["dtype"] == "half"
    assert dense["max_num_seqs"] == 2
    assert dense["kv_cache_memory_bytes"] == 1


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_built_in_shape_holds_the_longest_case(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = parse(["--shape", shape, "--lengths", "200000", "--output-tokens", "8"])
    config = transformers.AutoConfig.from_pretrained(write_model(settings, tmp_path / "model"))
    assert config.max_position_embeddings == 200008
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_a_config_of_the_users_is_taken_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text('{"model_type": "llama"}')
    folder = write_model(parse(["--config", str(own)]), tmp_path / "model")
    assert (Path(folder) / "config.json").read_text() == own.read_text()
    assert write_model(parse(["--model", "name"]), tmp_path) == "name"


def _plan(tmp_path: Path, *cases: Case, **given: Any) -> Plan:
    defaults: dict[str, Any] = {
        "engine_arguments": {"attention_backend": "magicpig"},
        "cases": list(cases),
        "output_tokens": 4,
        "repeats": 1,
        "tokenizer": None,
        "samples": True,
        "results": str(tmp_path / "results.jsonl"),
        "parent": os.getpid(),
    }
    return Plan(**defaults | given)


def test_prompts_are_all_different_and_the_same_in_every_process() -> None:
    runs = [(Case(100, 2), 0), (Case(100, 2), 1), (Case(100, 1), 0), (Case(300, 2), 0)]
    batches = [prompts(case, repeat, vocab_size=512) for case, repeat in runs]
    assert [len(batch) for batch in batches] == [2, 2, 1, 2]
    flat = [tuple(prompt) for batch in batches for prompt in batch]
    assert [len(prompt) for prompt in flat] == [100] * 5 + [300] * 2
    assert len({prompt[:16] for prompt in flat}) == len(flat)
    assert max(map(max, flat)) < 512
    assert min(map(min, flat)) >= 0
    assert batches == [prompts(case, repeat, vocab_size=512) for case, repeat in runs]
    texts = prompts(Case(100, 2), 0, vocab_size=512, tokenizer=Words())
    assert [len(text) for text in texts] == [100, 100]
    assert texts[0] != texts[1]


def test_warm_up_runs_the_longest_prompt_and_the_most_requests() -> None:
    cases = [Case(100, 1), Case(100, 4), Case(300, 1)]
    assert warm_up_cases(cases) == [Case(300, 1), Case(100, 4)]


class Words:
    """A tokenizer of words and their lengths, with <s> in front."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [len(word) for word in text.split()]


@pytest.mark.parametrize("length", [64, 100, 1000])
def test_text_prompts_have_the_stated_length_and_keep_the_question(length: int) -> None:
    tokens = text_prompt(Words(), length, seed=3)
    assert len(tokens) == length
    assert tokens[0] == 0
    assert tokens[-2:] == [len("order,"), len("are:")]


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = _plan(tmp_path, Case(100, 2))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(asdict(plan)))
    assert Plan.read(path) == plan


REFUSAL = (
    "(EngineCore pid=7) ValueError: To serve at least one request with the model's max seq len "
    "(8256), (2.06 GiB KV cache is needed, which is larger than the available KV cache memory "
    "(1.0 GiB). Based on the available memory, the estimated maximum model length is 4096. Try "
    "increasing `gpu_memory_utilization`\n"
)


def test_vllm_is_what_says_those_words() -> None:
    utils = kv_cache_planner()
    with pytest.raises(ValueError) as error:
        utils._check_enough_kv_cache_memory(1 << 30, lambda: 3 << 30, 8256, lambda _: 4096)
    assert compare.find_refusal(str(error.value)) == compare.Refusal(
        "one request of 8256 tokens needs 3.0 GiB of KV cache, 1.0 GiB are there, enough for 4096 "
        "tokens",
        4096,
    )
    with pytest.raises(ValueError) as error:
        utils._check_enough_kv_cache_memory(1 << 30, lambda: 3 << 30, 8256, lambda _: 0)
    assert compare.find_refusal(str(error.value)).max_tokens == 0
    with pytest.raises(ValueError) as error:
        utils._check_enough_kv_cache_memory(0, lambda: 1, 1, lambda _: 0)
    assert compare.find_refusal(str(error.value)).max_tokens == 0


def test_other_failures_are_no_refusals() -> None:
    assert compare.find_refusal("ValueError: magicpig option 'Q' is unknown") is None


def test_a_refusal_takes_the_longest_case_and_all_that_are_too_long() -> None:
    cases = [Case(1000, 1), Case(4090, 1), Case(4096, 2), Case(8192, 1)]
    held, refused = compare.split_by_capacity(cases, output_tokens=6, max_tokens=4096)
    assert held == cases[:2]
    assert refused == cases[2:]
    held, refused = compare.split_by_capacity(cases, output_tokens=6, max_tokens=1 << 20)
    assert refused == cases[3:], "vLLM's estimate can be off, so a start can fail again"


def _fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Puts a script in the engine's place; `plan` and `say(**event)` are at its hand."""
    script = tmp_path / "fake_engine.py"
    script.write_text(
        "import json, subprocess, sys, time\n"
        "plan = json.load(open(sys.argv[1]))\n"
        "results = open(plan['results'], 'a', buffering=1)\n"
        "say = lambda **event: results.write(json.dumps(event) + '\\n')\n" + body
    )
    monkeypatch.setattr(compare, "ENGINE_SCRIPT", script)
    monkeypatch.setattr(compare, "POLL_S", 0.01)


def test_events_are_handed_over_while_the_engine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "say(warmed_up=1)\nwhile not open(plan['results'] + '.go', 'a').tell(): time.sleep(.01)\n"
    )
    _fake_engine(tmp_path, monkeypatch, body + "say(last=plan['output_tokens'])\n")
    plan = _plan(tmp_path, Case(100, 1))
    events = []

    def take(event: dict[str, Any]) -> None:
        events.append(event)
        Path(plan.results + ".go").write_text("go")

    assert compare.run_engine(plan, tmp_path / "log", take) is None
    assert events == [{"warmed_up": 1}, {"last": 4}]


def test_a_failed_engine_is_reported_with_its_first_error_and_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "print('ValueError: the cause')\nprint('noise\\n' * 99)\nsys.exit('the end')\n"
    _fake_engine(tmp_path, monkeypatch, body)
    with pytest.raises(compare.EngineFailed) as failure:
        compare.run_engine(_plan(tmp_path), tmp_path / "log", lambda event: None)
    said = str(failure.value)
    assert "the engine of magicpig ended with exit code 1: the cause" in said
    assert said.endswith("  the end")
    assert said.count("noise") < compare.LOG_LINES


def test_an_error_that_was_dealt_with_is_not_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "WARNING OSError: no tokenizer here\nTraceback (most recent call last):\n  ...\n"
        "RuntimeError: the cause\nTraceback (most recent call last):\nValueError: what followed\n"
    )
    assert compare.first_error(log) == "the cause"


def test_processes_of_an_engine_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "child = subprocess.Popen(['sleep', '600'])\nsay(child=child.pid)\n"
    _fake_engine(tmp_path, monkeypatch, body)
    events: list[dict[str, Any]] = []
    compare.run_engine(_plan(tmp_path), tmp_path / "log", events.append)
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(events[0]["child"])], capture_output=True, text=True
    ).stdout.strip()
    assert state in ("", "Z"), "gone, or a zombie that nobody has waited for"


FACTS = asdict(EngineFacts(164, 4096, 32, 128, 24.9, 1 << 20, 1.0))


def _say_everything() -> str:
    """An engine that has STAGGERED to say about each case, unless one is longer than 4,096."""
    return (
        f"if max(case['length'] for case in plan['cases']) > 4096: sys.exit({REFUSAL!r})\n"
        f"say(engine={FACTS!r})\n"
        "for case in plan['cases']:\n"
        f"    say(case=case, runs=[{asdict(STAGGERED)!r}], before=[], after=[])\n"
    )


def test_a_backend_is_started_again_without_the_cases_that_it_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_engine(tmp_path, monkeypatch, _say_everything())
    arguments = ["--lengths", "1000,4000,8192", "--requests", "2", "--output", str(tmp_path)]
    comparison = _comparison()
    comparison.engines.clear()
    compare.run_backend("CPU_ATTN", parse(arguments), {}, "model", comparison, tmp_path)
    assert list(comparison.engines) == ["CPU_ATTN"]
    by_length = {result.case.length: result for result in comparison.results}
    assert sorted(by_length) == [1000, 4000, 8192]
    for length in (1000, 4000):
        assert by_length[length].figures == figures(Case(length, 2), [STAGGERED])
    assert "needs 2.06 GiB of KV cache" in str(by_length[8192].refused)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert len(written["results"]) == 3


def test_a_backend_that_holds_nothing_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "sys.exit('ValueError: No available memory for the cache blocks. Try')\n"
    _fake_engine(tmp_path, monkeypatch, body)
    comparison = _comparison()
    arguments = ["--lengths", "1000,8192", "--requests", "2", "--output", str(tmp_path)]
    compare.run_backend("CPU_ATTN", parse(arguments), {}, "model", comparison, tmp_path)
    assert [result.figures for result in comparison.results] == [None, None]


def test_an_ended_run_keeps_its_cases_and_leaves_no_process(tmp_path: Path) -> None:
    """SIGTERM after the first of two cases."""
    engine = tmp_path / "fake_engine.py"
    engine.write_text(
        "import json, sys, time\n"
        "plan = json.load(open(sys.argv[1]))\n"
        "results = open(plan['results'], 'a', buffering=1)\n"
        f"event = dict(case=plan['cases'][0], runs=[{asdict(STAGGERED)!r}], before=[], after=[])\n"
        "results.write(json.dumps(event) + '\\n')\n"
        "time.sleep(600)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(compare.__file__).parent)!r})\n"
        "import compare_flash_attention as compare\n"
        "from compare_setup import Device\n"
        "from pathlib import Path\n"
        f"compare.ENGINE_SCRIPT = Path({str(engine)!r})\n"
        "compare.find_device = lambda: Device('cpu', 'a CPU', None)\n"
        f"sys.exit(compare.main(['--lengths', '100,200', '--output', {str(tmp_path / 'out')!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("100 tokens x 1" in line for line in lines)
    process.terminate()
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "ended by SIGTERM" in rest
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["finished"] is False
    assert [result["case"]["length"] for result in written["results"]] == [100]
    left = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True).stdout
    assert str(engine) not in left


def test_a_missing_tokenizer_is_said_before_an_engine_starts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"cannot be loaded .* or use --prompts random"):
        compare.check_tokenizer(parse(["--model", str(tmp_path)]))
    compare.check_tokenizer(parse(["--model", str(tmp_path), "--prompts", "random"]))
