"""No instruction of one instruction set where another may run: the built extension, disassembled.

One inline function of the standard library that a kernel's file compiles for AVX-512 is enough to
stop the process on any other CPU, because the linker may keep that copy for everybody.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable

import pytest

from vllm_magicpig import _C

AVX512 = {"avx512", "avx512_vpopcnt"}
KINDS = {
    "512 bits, or masks": (re.compile(r"%zmm|%k[0-7]\b"), AVX512),
    "registers 16 to 31": (re.compile(r"%[xy]mm(1[6-9]|2\d|3[01])\b"), AVX512),
    "256 bits": (re.compile(r"%ymm"), AVX512 | {"avx2"}),
    # Mnemonics with a v, whatever their width: older CPUs stop at a VEX prefix, too.
    "VEX or EVEX": (re.compile(r"^v"), AVX512 | {"avx2"}),
    "counts of bits in vectors": (re.compile(r"^vpopcnt"), {"avx512_vpopcnt"}),
}
"""What an instruction may hold, and the namespaces of magicpig that may hold it."""

SYMBOL = re.compile(r"^[0-9a-f]+ <(\S+)>:$")
INSTRUCTION = re.compile(r"^ +[0-9a-f]+:\t(?P<text>.+)$")
# Mangled: after demangling, an argument's namespace reads like the function's. _ZZ are the lambdas
# of a function. Clones only append to the name.
NAMESPACE = re.compile(r"^_ZZ?NK?8magicpig(\d+)")


def namespace_of(symbol: str) -> str | None:
    found = NAMESPACE.match(symbol)
    if found is None:
        return None
    return symbol[found.end() : found.end() + int(found[1])]


def kinds_by_symbol(disassembly: Iterable[str]) -> Counter[tuple[str, str]]:
    """How often each symbol holds each kind; disassembly: lines of objdump -d, not demangled."""
    counts: Counter[tuple[str, str]] = Counter()
    symbol = ""
    for line in disassembly:
        if header := SYMBOL.match(line):
            symbol = header[1]
        elif instruction := INSTRUCTION.match(line):
            # Behind the operands may stand the symbol that they point to.
            text = instruction["text"].partition("<")[0].partition("#")[0]
            for kind, (pattern, _) in KINDS.items():
                if pattern.search(text):
                    counts[symbol, kind] += 1
    return counts


def strays(counts: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(symbol, kind) for symbol, kind in counts if namespace_of(symbol) not in KINDS[kind][1]]


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's registers")


@needs_x86
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is missing")
def test_wide_instructions_stay_in_their_namespace() -> None:
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as objdump:
        assert objdump.stdout is not None
        counts = kinds_by_symbol(objdump.stdout)
    assert objdump.returncode == 0
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
