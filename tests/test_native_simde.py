"""The AVX-512 kernels on any machine with AVX2: their source through SIMDe (simde_build.py).

Integers equal the portable kernels' exactly, floats lie within the bounds of the other tests.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import simde_build
import torch
from disassembly import AVX512, KINDS, disassembled, kinds_by_symbol, needs_objdump
from native_helpers import Layer, Rule, isa_or_none, pool
from signature_paging import Paged
from signature_worlds import world
from test_native_budget import World
from test_native_decode import BOUND, DTYPES, Batch
from test_native_hashing import SETTINGS, check_log_u
from test_native_lists import SCALE, a_query, same
from test_native_lists import SHAPES as LIST_SHAPES
from test_native_signatures import SHAPES
from test_native_signatures import check as check_signatures

each_avx512 = pytest.mark.parametrize("name", ["avx512", "avx512_vpopcnt"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LENGTHS = [1, 15, 17, 127, 128, 129, 223, 1000]


@pytest.fixture(scope="module")
def simde() -> ModuleType:
    include = os.environ.get("SIMDE_INCLUDE")
    if include is None:
        pytest.skip("SIMDE_INCLUDE is unset: the folder with simde/, see scripts/get_simde.sh")
    if isa_or_none("avx2") is None:
        pytest.skip("this CPU has no avx2")
    return simde_build.build(Path(include))


def test_avx2_is_enough_for_this_module(simde: ModuleType) -> None:
    assert simde.resolve_isa("auto").name == "avx512_vpopcnt"
    assert simde.resolve_isa("avx512").name == "avx512"


@needs_objdump
def test_no_instruction_of_avx512_is_in_this_module(simde: ModuleType) -> None:
    """Else the kernels would be the ordinary ones, and crash on a machine without AVX-512."""
    kinds = {kind for _, kind in kinds_by_symbol(disassembled(simde.__file__))}
    assert "256 bits" in kinds
    assert not [kind for kind in kinds if KINDS[kind] <= AVX512]


@each_avx512
@pytest.mark.parametrize("num_bits", range(1, 16))
def test_codes_are_equal(simde: ModuleType, name: str, num_bits: int) -> None:
    generator = torch.Generator().manual_seed(num_bits)
    for num_tables in (1, 7, 255):
        x = torch.randn(67, num_tables * num_bits, generator=generator)
        x[x.abs() < 0.1] = 0.0
        x[0] = float("nan")
        packed = [
            simde.pack_codes(x.numpy(), num_bits, simde.resolve_isa(isa), pool(2, simde))
            for isa in ("portable", name)
        ]
        np.testing.assert_array_equal(*packed)


@each_avx512
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_log_u_is_within_its_bound(
    simde: ModuleType, name: str, setting: tuple[int, int, int]
) -> None:
    check_log_u(simde.InclusionTable(*setting[:2]), simde.resolve_isa(name), setting)


@each_avx512
@each_dtype
@pytest.mark.parametrize("head_size", [16, 24, 80, 128, 256])
def test_sample_and_attention(
    simde: ModuleType, name: str, dtype: torch.dtype, head_size: int
) -> None:
    layer = Layer(60, 2, 20, 4, head_size=head_size, dtype=dtype, native=simde)
    batch = Batch(layer, group=7, lengths=LENGTHS, seed=head_size)
    isa, portable = simde.resolve_isa(name), simde.Isa.portable

    def check(rule: Rule | None) -> None:
        batch.check(isa, rule)  # against the reference, and below against the portable kernels
        out, lse, rows = batch.decode(isa, rule)
        other_out, other_lse, other_rows = batch.decode(portable, rule)
        np.testing.assert_array_equal(rows, other_rows)
        np.testing.assert_allclose(out, other_out, rtol=0, atol=2 * BOUND)
        np.testing.assert_allclose(lse, other_lse, rtol=0, atol=2 * BOUND)
        if rule is not None:
            found, other_found = (
                layer.sample(batch.query_codes, batch.tables, LENGTHS, rule, each)
                for each in (isa, portable)
            )
            assert sum(len(ids) for heads in found for ids in heads) > 0
            for heads, other_heads in zip(found, other_found, strict=True):
                for ids, other_ids in zip(heads, other_heads, strict=True):
                    np.testing.assert_array_equal(ids, other_ids)

    check(None)
    check(Rule())
    batch.seal()
    check(Rule())


@each_avx512
@pytest.mark.parametrize("setting", [(2, 255), (4, 30)], ids=str)
def test_budgets(simde: ModuleType, name: str, setting: tuple[int, int]) -> None:
    world = World(setting, 4097, group=7, native=simde)
    isa = simde.resolve_isa(name)
    for rule in (Rule(2, row_budget=0.013), Rule(setting[1] // 2)):
        world.check_sample(rule, isa)
    world.check_decode(Rule(2, row_budget=0.013), isa)


@each_avx512
@each_dtype
@pytest.mark.parametrize(("head_size", "bits"), SHAPES)
def test_signatures_are_the_references(
    simde: ModuleType, name: str, head_size: int, bits: int, dtype: torch.dtype
) -> None:
    keys = world(256, head_size).keys.to(dtype)
    check_signatures(keys, bits, simde.resolve_isa(name), simde)


@each_avx512
@pytest.mark.parametrize("shape", LIST_SHAPES, ids=str)
def test_lists_are_equal(simde: ModuleType, name: str, shape: tuple) -> None:
    """To the portable ones, which test_native_lists.py compares with the reference."""
    dtype, head_size, bits, kv_heads, group, lengths, block_size = shape
    paged = Paged(dtype, head_size, bits, kv_heads, lengths, block_size, native=simde)
    query = a_query(paged, group)
    portable = paged.lists(query, 0.05, SCALE, simde.resolve_isa("portable"))
    assert same(paged.lists(query, 0.05, SCALE, simde.resolve_isa(name)), portable)
    assert any(len(tokens) for of_request in portable for tokens, _ in of_request)


@each_avx512
def test_sampled_outputs_are_the_portable_ones(simde: ModuleType, name: str) -> None:
    paged = Paged(torch.bfloat16, 72, 2, 2, (9000, 300), native=simde)
    query = a_query(paged, 3)
    found, expected = (
        paged.attend(query, 0.03, SCALE, simde.resolve_isa(isa)) for isa in (name, "portable")
    )
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(found[2], expected[2])
