"""No instruction of one instruction set where another may run: the built extension, disassembled.

One inline function of the standard library that a kernel's file compiles for AVX-512 is enough to
stop the process on any other CPU, because the linker may keep that copy for everybody.
"""

from __future__ import annotations

import pytest
from disassembly import AVX512, disassembled, kinds_by_symbol, namespace_of, needs_objdump, strays

from vllm_magicpig import _C


@needs_objdump
def test_wide_instructions_stay_in_their_namespace() -> None:
    counts = kinds_by_symbol(disassembled(_C.__file__))
    assert strays(counts) == []
    # Each kernel has what it is named for; an extension without symbols would have nothing.
    found = {(namespace_of(symbol), kind) for symbol, kind in counts}
    assert ("avx2", "256 bits") in found
    for name in AVX512:
        assert {(name, "512 bits, or masks"), (name, "registers 16 to 31")} <= found


@pytest.mark.parametrize(
    ("symbol", "instruction"),
    [
        ("_ZNSt6vectorIfSaIfEE4dataEv", "vmovss (%rdi),%xmm0"),
        ("_ZNSt6vectorIN8magicpig6avx5123VecEE4dataEv", "vmovups (%rdi),%zmm0"),
        ("_ZN8magicpig4avx212_GLOBAL__N_16attendERKNS_10AttendArgsE", "vmovups %zmm1,(%rax)"),
        ("_ZN8magicpig4avx212_GLOBAL__N_16attendERKNS_10AttendArgsE", "vmovups %ymm17,(%rax)"),
        ("_ZN8magicpig8portable12_GLOBAL__N_15log_uEPKfmPf", "vzeroupper"),
        ("_ZN8magicpig6avx51212_GLOBAL__N_111match_tilesEPKtii", "vpopcntq %zmm0,%zmm1"),
        ("_ZN8magicpig8isa_nameENS_3IsaE", "kmovw  %k1,%eax"),
    ],
)
def test_a_stray_is_found(symbol: str, instruction: str) -> None:
    counts = kinds_by_symbol([f"0000000000001000 <{symbol}>:", f"    1000:\t{instruction}"])
    assert {found for found, _ in strays(counts)} == {symbol}


def test_what_belongs_is_no_stray() -> None:
    lines = [
        "00001000 <_ZZN8magicpig6avx51212_GLOBAL__N_13addEPfENKUlT_E_clINS0_4MaskEEEDaS1_.cold>:",
        "    1000:\tvmovups (%rdi),%zmm16{%k1}{z}",
        "00002000 <_ZN8magicpig14avx512_vpopcnt12_GLOBAL__N_13addEPf.constprop.0>:",
        "    2000:\tvpopcntq %zmm0,%zmm1",
        "00003000 <_ZN8magicpig10kernels_ofENS_3IsaE>:",
        "    3000:\tlea    0x1(%rip),%rax        # 4000 <_ZN8magicpig6avx5127kernelsE>",
        "    3007:\tpopcnt %rax,%rax",
    ]
    assert strays(kinds_by_symbol(lines)) == []
