"""The sample is the reference's, token for token, whatever has been sealed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_helpers import (
    Layer,
    Rule,
    assert_same_sample,
    best_cover,
    each_isa,
    expected_sample,
    pool,
)

from vllm_magicpig import _C

LENGTHS = [1, 15, 17, 127, 128, 129, 223]


def codes_of(shape: tuple[int, ...], num_codes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_codes, shape, generator=generator, dtype=torch.int32)


def shuffled_blocks(num_blocks: int, seed: int) -> list[int]:
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()


def grow_and_check(
    layer: Layer,
    codes: torch.Tensor,
    query_codes: torch.Tensor,
    lengths: list[int],
    rules: list[Rule],
    isa: _C.Isa,
) -> None:
    """Appends up to each length in turn; checks before the seal and after it."""
    blocks = shuffled_blocks(layer.num_blocks, seed=codes.shape[1])
    stored = 0
    for length in lengths:
        layer.store_codes(blocks, stored, codes[:, stored:length])
        stored = length
        expected = [expected_sample(query_codes, codes[:, :length], rule) for rule in rules]

        def check(length: int = length, expected: list = expected) -> None:
            for rule, positions in zip(rules, expected, strict=True):
                (found,) = layer.sample(query_codes[None], [blocks], [length], rule, isa)
                assert_same_sample(found, positions)

        tables, lens = np.array([blocks], np.int32), np.array([length], np.int32)
        cover = best_cover(length, layer.levels)
        lacking = set(cover) - set(layer.index.find(tables[0], length))
        check()
        assert layer.index.seal(tables, lens, pool()) == len(lacking)
        assert layer.index.find(tables[0], length) == cover
        check()


@each_isa
@pytest.mark.parametrize("levels", [[32], [64], [128], [2048], [32, 64], [64, 192, 384]], ids=str)
@pytest.mark.parametrize("group", range(1, 9))
def test_random_codes_at_every_growth_step(isa: _C.Isa, levels: list[int], group: int) -> None:
    s = levels[-1]
    lengths = sorted({*LENGTHS, s - 1, s, s + 1, 2 * s + 40})
    num_tables = 11
    layer = Layer(
        num_blocks=-(-lengths[-1] // 32),
        num_kv_heads=2,
        num_tables=num_tables,
        num_bits=5,
        levels=levels,
    )
    codes = codes_of((2, lengths[-1], num_tables), 7, seed=group)
    query_codes = codes_of((2 * group, num_tables), 7, seed=group + 100)
    rules = [Rule(t, sink, window) for t, sink, window in [(1, 4, 16), (2, 0, 0), (5, 33, 64)]]
    grow_and_check(layer, codes, query_codes, lengths, [*rules, Rule(num_tables)], isa)


@each_isa
@pytest.mark.parametrize("setting", [(10, 150), (2, 255), (15, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("block_size", [32, 128])
def test_settings_and_block_sizes(isa: _C.Isa, setting: tuple[int, int], block_size: int) -> None:
    num_bits, num_tables = setting
    layer = Layer(
        num_blocks=9,
        num_tables=num_tables,
        num_bits=num_bits,
        block_size=block_size,
        levels=[2 * block_size],
    )
    num_codes = min(2**num_bits, 12)
    codes = codes_of((1, 9 * block_size, num_tables), num_codes, seed=num_bits)
    # Codes at the upper end of their range, too: the last bucket has no successor.
    codes[:, ::2] = 2**num_bits - 1 - codes[:, ::2]
    query_codes = codes_of((3, num_tables), num_codes, seed=5)
    query_codes[1] = 2**num_bits - 1 - query_codes[1]
    rules = [Rule(t) for t in sorted({1, min(2, num_tables), num_tables // 2 or 1, num_tables})]
    lengths = [17, 2 * block_size, 4 * block_size + 1, 9 * block_size]
    grow_and_check(layer, codes, query_codes, lengths, rules, isa)


def exactly(matches: int, num_tokens: int, num_tables: int) -> torch.Tensor:
    """Codes that equal a query of zeros in `matches` tables, each token in others."""
    tables = (torch.arange(num_tokens)[:, None] + torch.arange(matches)) % num_tables
    codes = torch.ones(num_tokens, num_tables, dtype=torch.int32)
    return codes.scatter(1, tables, 0)[None]


@each_isa
@pytest.mark.parametrize("min_matches", [1, 2, 5, 40])
def test_the_threshold_is_exact(isa: _C.Isa, min_matches: int) -> None:
    below, at = (exactly(m, 200, 40) for m in (min_matches - 1, min_matches))
    query_codes = torch.zeros(1, 40, dtype=torch.int32)
    for codes, size in ((below, 0), (at, 180)):
        layer = Layer(num_blocks=7, num_tables=40)
        rule = Rule(min_matches)
        grow_and_check(layer, codes, query_codes, [130, 200], [rule], isa)
        (found,) = layer.sample(query_codes[None], [shuffled_blocks(7, seed=200)], [200], rule, isa)
        assert len(found[0]) == size


@each_isa
@pytest.mark.parametrize("code", [0, 3, 7])
@pytest.mark.parametrize("num_tables", [3, 255])
def test_all_codes_equal(isa: _C.Isa, code: int, num_tables: int) -> None:
    """One bucket holds everything; queries of that bucket, and of its empty neighbours."""
    layer = Layer(num_blocks=8, num_tables=num_tables, levels=[128])
    codes = torch.full((1, 256, num_tables), code, dtype=torch.int32)
    query_codes = torch.arange(8)[:, None].expand(8, num_tables)
    rules = [Rule(t) for t in (1, 2, num_tables)]
    grow_and_check(layer, codes, query_codes, [129, 255, 256], rules, isa)


@each_isa
@pytest.mark.parametrize("levels", [[64], [65536], [1024, 4096, 16384, 65536]], ids=str)
@pytest.mark.parametrize("content", ["random", "first", "middle", "last", "beyond"])
def test_around_65536_tokens(isa: _C.Isa, levels: list[int], content: str) -> None:
    """Where the uint16 end of a bucket wraps: `first` to `last` put all tokens into one bucket."""
    num_tokens = 65_537 + 31
    layer = Layer(
        num_blocks=-(-num_tokens // 64),
        num_tables=3,
        num_bits=4,
        block_size=64,
        levels=levels,
    )
    if content == "random":
        codes = codes_of((1, num_tokens, 3), 16, seed=1)
    else:
        code = {"first": 0, "middle": 8, "last": 15, "beyond": 40_000}[content]
        codes = torch.full((1, num_tokens, 3), code, dtype=torch.int32)
        codes[:, 100] = 1  # table by table, the bucket is full, nearly full, full
        codes[:, 100, ::2] = code
    query_codes = torch.tensor([[0] * 3, [8] * 3, [15] * 3, [1] * 3, [8, 1, 0]])
    lengths = [65_535, 65_536, 65_537, num_tokens]
    grow_and_check(layer, codes, query_codes, lengths, [Rule(1), Rule(3)], isa)


@each_isa
def test_codes_beyond_their_bits_match_nothing(isa: _C.Isa) -> None:
    layer = Layer(num_blocks=4, num_bits=3)
    codes = codes_of((1, 128, 8), 1 << 16, seed=3)
    codes[:, ::3] %= 8
    grow_and_check(layer, codes, codes_of((4, 8), 8, seed=4), [128], [Rule(1), Rule(2)], isa)


@each_isa
def test_sinks_and_windows_cut_the_middle(isa: _C.Isa) -> None:
    layer = Layer(num_blocks=8)
    codes = codes_of((1, 230, 8), 3, seed=6)
    query_codes = codes_of((2, 8), 3, seed=7)
    edges = [0, 1, 31, 32, 33, 63, 64, 65, 100, 229, 230, 231, 1 << 40]
    rules = [Rule(2, sink, window) for sink in edges for window in edges]
    grow_and_check(layer, codes, query_codes, [150, 230], rules, isa)


@each_isa
def test_a_batch_of_requests_over_shared_blocks(isa: _C.Isa) -> None:
    """Requests that share a prefix share its segments; block tables may be wider than needed."""
    layer = Layer(num_blocks=20, num_kv_heads=2)
    codes = codes_of((2, 640, 8), 3, seed=8)
    layer.store_codes(list(range(20)), 0, codes)
    per_block = codes.unflatten(1, (20, 32))
    tables = np.full((5, 12), 2**31 - 1, np.int32)
    used = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 9, 8, 7], [5], [], [19, 3, 1, 0, 2, 3]]
    for row, blocks in enumerate(used):
        tables[row, : len(blocks)] = blocks
    lens = np.array([160, 200, 7, 0, 192], np.int32)
    query_codes = codes_of((5, 6, 8), 3, seed=9)

    def check() -> None:
        for num_threads in (1, 2, 3):
            found = layer.sample(query_codes, tables[:, :9], lens, Rule(), isa, num_threads)
            for row, blocks in enumerate(used):
                logical = per_block[:, blocks].flatten(1, 2)[:, : lens[row]]
                expected = expected_sample(query_codes[row], logical, Rule())
                assert_same_sample(found[row], expected)

    check()
    # [0 1], [2 3], [9 8], [1 0]; [19 3] ends in a block whose segment another request has.
    assert layer.index.seal(tables, lens, pool()) == 4
    assert [len(layer.index.find(t[:7], n)) for t, n in zip(tables, lens, strict=True)] == [
        *(2, 3, 0, 0, 2)
    ]
    check()
    assert layer.index.seal(tables, lens, pool()) == 0
