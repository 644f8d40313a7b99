"""What instructions each function of a built extension holds, by objdump."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable

import pytest

needs_objdump = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="objdump (binutils) for x86-64 is missing",
)

AVX512 = {"avx512", "avx512_vpopcnt"}
KINDS = {
    "512 bits, or masks": AVX512,
    "registers 16 to 31": AVX512,
    "256 bits": AVX512 | {"avx2"},
    "VEX or EVEX": AVX512 | {"avx2"},
    "counts of bits in vectors": {"avx512_vpopcnt"},
}
"""The namespaces of magicpig that may hold each kind of instruction."""
PATTERNS = {
    "512 bits, or masks": re.compile(r"%zmm|%k[0-7]\b"),
    "registers 16 to 31": re.compile(r"%[xy]mm(1[6-9]|2\d|3[01])\b"),
    "256 bits": re.compile(r"%ymm"),
    # Mnemonics with a v, whatever their width: older CPUs stop at a VEX prefix, too.
    "VEX or EVEX": re.compile(r"^v"),
    "counts of bits in vectors": re.compile(r"^vpopcnt"),
}

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


def disassembled(library: str) -> list[str]:
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


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
            for kind, pattern in PATTERNS.items():
                if pattern.search(text):
                    counts[symbol, kind] += 1
    return counts


def strays(counts: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(symbol, kind) for symbol, kind in counts if namespace_of(symbol) not in KINDS[kind]]
