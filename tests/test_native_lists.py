"""Lists of native steps against signature_draw, chance by chance, on every instruction set."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from native_helpers import each_isa
from signature_paging import Paged

from vllm_magicpig import _C
from vllm_magicpig import signature_blocks as blocks
from vllm_magicpig import signature_draw as draw
from vllm_magicpig import signature_reference as reference
from vllm_magicpig import signature_scores as integers

SCALE = 2.0**-4  # exact in float32, as the native side takes it


def expected(paged: Paged, query: torch.Tensor, request: int, budget: float) -> list[draw.Chosen]:
    """signature_draw's lists of a request's kv heads."""
    n = paged.seq_lens[request]
    middle = reference.middle(n, paged.sink, paged.window)
    group = query.shape[0] // paged.num_kv_heads
    found = []
    for head in range(paged.num_kv_heads):
        keys = paged.keys[request][head].float()
        step = draw.ScanStep(
            integers.query_units(query[head * group : (head + 1) * group], SCALE),
            torch.cat([keys[: middle.start], keys[middle.stop :]]),
            blocks.encode_blocks(keys[: n // 128 * 128], paged.signs, paged.bits),
            paged.bits,
            paged.signs,
            middle,
            draw.DrawSource(paged.seed, paged.layer, paged.first_kv_head + head, n - 1),
        )
        found.append(draw.choose(step, draw.Budget(budget * len(middle))))
    return found


BUDGET = 0.05
SHAPES = [
    # dtype, head size, bits, kv heads, group, lengths, block size
    (torch.bfloat16, 128, 2, 2, 4, (4100, 700), 128),
    (torch.float32, 64, 2, 1, 7, (3000,), 128),
    (torch.float16, 80, 4, 1, 2, (2500, 129 + 64), 256),
    (torch.bfloat16, 256, 1, 1, 1, (1500,), 128),
    (torch.bfloat16, 16, 2, 1, 5, (5000,), 128),
    (torch.float32, 128, 4, 1, 3, (17000,), 128),
]


@functools.cache
def drawn(shape: tuple) -> tuple[Paged, torch.Tensor, list[list[draw.Chosen]]]:
    """(pages, queries, the reference's lists of each request), once for all instruction sets."""
    dtype, head_size, bits, kv_heads, group, lengths, block_size = shape
    paged = Paged(dtype, head_size, bits, kv_heads, lengths, block_size)
    query = a_query(paged, group)
    return (
        paged,
        query,
        [expected(paged, query[request], request, BUDGET) for request in range(len(lengths))],
    )


@each_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_are_those_of_the_reference(isa: _C.Isa, shape: tuple) -> None:
    paged, query, references = drawn(shape)
    lists = paged.lists(query, BUDGET, SCALE, isa)
    for n, of_request, reference_lists in zip(paged.seq_lens, lists, references, strict=True):
        start = reference.middle(n, paged.sink, paged.window).start
        for chosen, (tokens, chances) in zip(reference_lists, of_request, strict=True):
            where = chosen.listed.nonzero()[:, 0]
            assert tokens.tolist() == (where + start).tolist()
            assert np.array_equal(
                draw.chances(torch.from_numpy(chances.astype(np.int64))).numpy(),
                draw.chances(chosen.log_chances[where]).numpy(),
            )


def a_query(paged: Paged, group: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heads = paged.num_kv_heads * group
    return 6 * torch.randn(len(paged.seq_lens), heads, paged.head_size, generator=generator)


def same(a: list, b: list) -> bool:
    return all(
        np.array_equal(x, y)
        for one, other in zip(a, b, strict=True)
        for left, right in zip(one, other, strict=True)
        for x, y in zip(left, right, strict=True)
    )


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_outputs_are_the_references_on_the_same_list(isa: _C.Isa, dtype: torch.dtype) -> None:
    """In float64, of rows as they are stored; 20,000 tokens are several parts."""
    group, budget = 4, 0.03
    paged = Paged(dtype, 64, 2, 2, (20000, 1000, 90))
    query = a_query(paged, group)
    out, lse, rows = paged.attend(query, budget, SCALE, isa)
    lists = paged.lists(query, budget, SCALE, isa)
    for request, n in enumerate(paged.seq_lens):
        middle = reference.middle(n, paged.sink, paged.window)
        for head in range(paged.num_kv_heads):
            tokens, chances = lists[request][head]
            pi = torch.ones(n, dtype=torch.float64)
            pi[middle.start : middle.stop] = 0
            listed = draw.chances(torch.from_numpy(chances.astype(np.int64))).double() / 65536
            pi[torch.from_numpy(tokens).long()] = listed
            read = pi > 0
            heads = slice(head * group, (head + 1) * group)
            keys, values = (
                part[request][head].double()[read] for part in (paged.keys, paged.values)
            )
            logits = SCALE * query[request, heads].double() @ keys.T
            expected_out, expected_lse = reference.estimate(logits, values, pi[read])
            scale = values.abs().max()
            assert (out[request, heads] - expected_out).abs().max() <= 1e-5 * scale
            np.testing.assert_allclose(lse[request, heads], expected_lse, atol=1e-5, rtol=0)
            assert (rows[request, heads] == (len(tokens) if len(middle) else -1)).all()


def test_lists_do_not_depend_on_threads_batch_blocks_or_instruction_sets() -> None:
    lengths = (9000, 2000, 9000)
    paged = Paged(torch.bfloat16, 128, 2, 2, lengths)
    query = a_query(paged, 3)
    first = next(_C.resolve_isa(name) for name in ("portable",))
    alone = [paged.lists(query, 0.02, SCALE, first, [row])[0] for row in range(3)]
    for isa in {first, _C.resolve_isa("auto")}:
        for threads in (1, 2, 3):
            assert same(paged.lists(query, 0.02, SCALE, isa, threads=threads), alone)
        assert same(paged.lists(query, 0.02, SCALE, isa, [2, 0]), [alone[2], alone[0]])
    elsewhere = Paged(torch.bfloat16, 128, 2, 2, (256, *lengths))  # on other blocks
    elsewhere.keys[1:], elsewhere.values[1:] = paged.keys, paged.values
    for row in (1, 2, 3):
        elsewhere.store(row, 0, lengths[row - 1])
    moved = torch.cat([query[:1], query])
    assert same(elsewhere.lists(moved, 0.02, SCALE, first, [1, 2, 3]), alone)


def test_signatures_are_of_the_rows_that_are_stored_now() -> None:
    """A shared prefix is encoded once; a block that is written anew, or given to another, again."""
    paged = Paged(torch.bfloat16, 64, 2, 1, (2000, 2000))
    isa = _C.resolve_isa("auto")
    query = a_query(paged, 2)
    paged.tables[1, :10] = paged.tables[0, :10]  # tokens 0 to 1279 are the first request's
    paged.keys[1][:, :1280] = paged.keys[0][:, :1280]
    before = paged.lists(query, 0.05, SCALE, isa)
    assert paged.signatures.num_encoded == 15 + 5  # the 16th block is not full
    assert same(paged.lists(query, 0.05, SCALE, isa), before)
    assert paged.signatures.num_encoded == 20
    paged.keys[0][:, 128:140] += 1
    paged.store(0, 128, 140)
    changed = paged.lists(query, 0.05, SCALE, isa)
    assert paged.signatures.num_encoded == 21
    fresh = Paged(torch.bfloat16, 64, 2, 1, (2000, 2000))
    fresh.keys, fresh.values = paged.keys, paged.values
    fresh.keys[1][:, :1280] = paged.keys[0][:, :1280]
    for row in (0, 1):
        fresh.store(row, 0, 2000)
    assert same(fresh.lists(query, 0.05, SCALE, isa), changed)
    assert not same(before, changed)


def test_bad_input_is_one_sentence() -> None:
    paged = Paged(torch.bfloat16, 64, 2, 1, (300,))
    memory, signs = np.zeros(64, dtype=np.uint8), paged.signs.numpy()
    with pytest.raises(ValueError, match="memory has shape"):
        _C.SignaturePool(paged.pages, memory, signs, 2)
    with pytest.raises(ValueError, match=r"bits is 3, but must be 1, 2 or 4"):
        _C.SignaturePool(paged.pages, memory, signs, 3)
    small = _C.Pages(np.zeros((3, 1, 64 * 256), dtype=np.uint8), "bfloat16", 64, 64, 0)
    with pytest.raises(
        ValueError, match="blocks of 64 tokens, but signatures need a multiple of 128"
    ):
        _C.SignaturePool(small, memory, signs, 2)
    with pytest.raises(ValueError, match=r"row_budget is 0, but must be above 0 and up to 1"):
        paged.rule(0.0)
