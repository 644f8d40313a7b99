"""The options: defaults, strictness, and one clear sentence for each mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from native_helpers import ISA_NAMES

from vllm_magicpig.config import COMPILE_KEY, DEFAULT_INDEX, MagicPigOptions, parse_options


def parse(**options: Any) -> MagicPigOptions:
    return parse_options({"magicpig": options})


def test_defaults_are_the_papers() -> None:
    options = parse_options({})
    assert options.index == DEFAULT_INDEX
    assert (options.bits, options.row_budget) == (2, 0.02)
    assert (options.K, options.L, options.min_matches) == (10, 150, 2)
    assert (options.sink_tokens, options.window_tokens, options.exact_below) == (4, 64, 2048)
    assert [i for i in range(40) if options.is_dense(i)] == [0, 16, 32]
    assert options == parse_options(None) == parse_options({"another": {"plugin": 1}})


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().K = 8  # type: ignore[misc]


def test_dense_layers_are_a_set_of_indices() -> None:
    assert parse(dense_layers=[]).is_dense(0) is False
    assert parse(dense_layers=[5, 2, 5]).dense_layers == (2, 5)
    assert parse(dense_layers=None).is_dense(16)


def test_exact_mode_samples_nothing_and_stores_no_codes() -> None:
    for options in (parse(K=0), parse(K=0, index="buckets"), parse(K=0, index="signatures")):
        assert options.is_exact
        assert not options.has_buckets
        assert not options.has_signatures
        assert options.num_tables == 0
        assert not options.samples(1 << 20)


def test_an_index_is_of_one_kind() -> None:
    buckets = parse(index="buckets", K=8, L=75, min_matches=3, rows=0.01, center="none")
    assert (buckets.has_buckets, buckets.has_signatures, buckets.num_tables) == (True, False, 75)
    signatures = parse(index="signatures", bits=4, row_budget=1)
    assert (signatures.has_buckets, signatures.has_signatures) == (False, True)
    assert (signatures.num_tables, signatures.bits, signatures.row_budget) == (0, 4, 1.0)
    assert buckets.samples(1 << 20)
    assert signatures.samples(1 << 20)


@pytest.mark.parametrize(
    ("index", "owner", "name", "value"),
    [
        ("signatures", "buckets", "K", 10),
        ("signatures", "buckets", "L", 150),
        ("signatures", "buckets", "min_matches", 2),
        ("signatures", "buckets", "rows", None),
        ("signatures", "buckets", "rows", 0.02),
        ("signatures", "buckets", "center", "passage"),
        ("buckets", "signatures", "bits", 2),
        ("buckets", "signatures", "row_budget", 0.02),
    ],
)
def test_a_setting_of_the_other_index_is_refused(
    index: str, owner: str, name: str, value: Any
) -> None:
    """Whatever its value: also where the value is the default."""
    sentence = (
        f'magicpig option {name} is {value!r}, but belongs to index "{owner}" and the index is '
        f'"{index}"; remove {name}, or set index to "{owner}" in --additional-config.'
    )
    given = {"index": index, name: value}
    for options in (given, given if name == "K" else given | {"K": 0}):
        with pytest.raises(ValueError) as caught:
            parse(**options)
        assert str(caught.value) == sentence
    assert getattr(parse(index=owner, **{name: value}), name) == value


@pytest.mark.parametrize(
    "name",
    [
        "dense_layers",
        "sink_tokens",
        "window_tokens",
        "exact_below",
        "threads",
        "seed",
        "isa",
        "host_kv_cache_gib",
    ],
)
def test_other_settings_are_for_both(name: str) -> None:
    value = {"dense_layers": [3], "isa": "portable"}.get(name, 7)
    for index in ("buckets", "signatures"):
        assert getattr(parse(index=index, **{name: value}), name) != getattr(parse(), name)


def test_a_middle_is_sampled_from_exact_below_on() -> None:
    options = parse(exact_below=100, sink_tokens=4, window_tokens=64)
    assert not options.samples(167)
    assert options.samples(168)
    assert not parse(exact_below=0).samples(68), "an empty middle has nothing to sample"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("K", -1),
        ("K", 1),
        ("K", 16),
        ("K", 10.0),
        ("K", True),
        ("K", "10"),
        ("L", 0),
        ("L", 256),
        ("min_matches", 0),
        ("dense_layers", "0,16"),
        ("dense_layers", [0, -1]),
        ("dense_layers", [0.5]),
        ("sink_tokens", -1),
        ("window_tokens", 0),
        ("exact_below", None),
        ("threads", 0),
        ("threads", "all"),
        ("seed", -1),
        ("bits", 0),
        ("bits", 3),
        ("bits", 8),
        ("bits", True),
        ("bits", 2.0),
        ("bits", None),
        ("row_budget", 0),
        ("row_budget", 1.01),
        ("row_budget", None),
        ("row_budget", True),
        ("row_budget", "2 %"),
        ("rows", 0),
        ("index", None),
        ("index", "auto"),
        ("index", "scan"),
        ("center", "second_prompt"),
        ("center", "first_prompt"),
        ("center", 3),
        ("isa", "sse2"),
        ("host_kv_cache_gib", 0),
        ("host_kv_cache_gib", "4 GiB"),
        ("check_host_memory", "no"),
        ("check_host_memory", 0),
        ("check_host_memory", False),  # and no host_kv_cache_gib
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        parse(**{name: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"magicpig option {name} is {value!r}, but must be ")
    assert sentence.endswith("; correct it in --additional-config.")
    assert "\n" not in sentence


@pytest.mark.parametrize("isa", ["auto", *ISA_NAMES])
def test_every_instruction_set_has_its_name(isa: str) -> None:
    assert parse(isa=isa).isa == isa


def test_min_matches_cannot_exceed_the_tables() -> None:
    with pytest.raises(ValueError, match=r"min_matches is 9, but must be 1 to L = 8 tables"):
        parse(index="buckets", L=8, min_matches=9)


def test_an_unknown_option_suggests_a_known_one() -> None:
    with pytest.raises(ValueError, match=r"'windows_tokens' is unknown.*'window_tokens'\?"):
        parse(windows_tokens=32)


@pytest.mark.parametrize(
    "key",
    ["magic_pig", "magic-pig", "MagicPig", "MAGICPIG", "magicpigs", "magipig", "vllm_magicpig"],
)
def test_options_under_almost_the_right_name_are_not_left_unread(key: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_options({key: {"K": 8}})
    assert str(caught.value) == (
        f'additional_config has {key!r} and no "magicpig", under which magicpig looks for its options; '
        'rename it to "magicpig".'
    )


def test_options_outside_their_object_are_not_left_unread() -> None:
    with pytest.raises(ValueError, match=r"option 'K' at its top, .* under \"magicpig\"; pass"):
        parse_options({"another": {"plugin": 1}, "K": 8})


def test_other_plugins_keys_are_theirs_and_the_compile_key_is_ours() -> None:
    assert parse_options({COMPILE_KEY: {"K": 3}}) == MagicPigOptions()
    assert parse_options({"magic": 1, "pig": {"K": 3}, "magnet": 2}) == MagicPigOptions()
    assert parse_options({"magicpig": {"threads": 3}, "magic_pig": 1, "seed": 5}).threads == 3


def test_the_options_must_be_an_object() -> None:
    with pytest.raises(ValueError, match=r"is \[10, 150\], but must be an object"):
        parse_options({"magicpig": [10, 150]})


def test_center_takes_an_existing_file(tmp_path: Path) -> None:
    file = tmp_path / "centers.safetensors"
    file.touch()
    assert parse(index="buckets", center=str(file)).center == str(file)
