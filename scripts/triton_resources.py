"""Compiles the Triton kernels for NVIDIA GPUs, without one, and prints what each needs.

For every kernel that serving launches: registers per thread, bytes spilled (a kernel's stack holds
nothing else), shared memory per program, how many bytes a thread moves at once where it moves most,
and the tensor core instruction. Exits with 1 when a kernel spills, needs more shared memory than a
program may have, or moves rows by fewer than 16 bytes. Uses the launchers' own
arguments, and Triton's compile cache.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from vllm_magicpig import reference
from vllm_magicpig.triton_kernels import host_pages, merge, simhash
from vllm_magicpig.triton_kernels.launch import Launch

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from argument_types import positive

# Per program, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# sm_86, sm_89 and sm_120 have 99 KB and run the sm_80 kernels, so sm_80 is held to that.
MAX_SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}

K, L, BLOCK_SIZE = 10, 150, 128  # the defaults; registers hardly depend on them


@dataclass(frozen=True)
class Resources:
    kernel: str
    variant: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    access_bytes: int
    tensor_cores: str

    @property
    def fits(self) -> bool:
        limit = MAX_SHARED_BYTES.get(self.arch, MAX_SHARED_BYTES[80])
        return self.spilled_bytes == 0 and self.shared_bytes <= limit and self.access_bytes == 16


class _Offline:
    """The part of a Triton driver that compiling asks for; each target counts as a device."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


def variants(dtype: torch.dtype, head_size: int, num_kv_heads: int) -> Iterator[tuple[str, Launch]]:
    """What serving launches for a model of this dtype, head size and kv heads on this rank."""
    name = f"{str(dtype).removeprefix('torch.')} D={head_size} Hkv={num_kv_heads}"
    planes = simhash.pack_directions(reference.hyperplanes(head_size, L, K, 0), K)
    center = torch.zeros(num_kv_heads, head_size)
    for tokens, step in ((1, "decode"), (320, "prefill")):
        key = torch.zeros(tokens, num_kv_heads, head_size, dtype=dtype)
        codes = torch.zeros(tokens, num_kv_heads, L, dtype=torch.uint16)
        yield (
            f"{name} keys {step}",
            simhash.simhash_launch(key, planes, L, center, codes),
        )
        if step == "decode":
            yield f"{name} queries", simhash.simhash_launch(key, planes, L, None, codes)
    content = BLOCK_SIZE * (2 * head_size + -(-2 * L // dtype.itemsize))
    pages = torch.zeros(2, num_kv_heads, content, dtype=dtype)
    slots = torch.arange(320)
    programs = host_pages.DEFAULT_PROGRAMS
    for with_codes in (codes, None):
        yield (
            f"{name} {'rows' if with_codes is None else 'rows and codes'}",
            host_pages.store_pages_launch(key, key, with_codes, slots, pages, BLOCK_SIZE, programs),
        )
    table = torch.zeros(3, dtype=torch.int32)
    yield (
        name,
        host_pages.gather_pages_launch(pages, table, 0, 320, key, key, BLOCK_SIZE, programs),
    )
    lse = torch.zeros(num_kv_heads, 320)
    yield name, merge.merge_into_launch(torch.zeros(key.shape), lse, key, lse)


def compile_for(arch: int, variant: str, launch: Launch) -> Resources:
    """Through to the cubin, for the very specialisation that launching would compile."""
    triton.runtime.driver.set_active(_Offline(arch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces a default that 3.10 will change
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump's output has no resource usage: {usage!r}")
    registers, stack_bytes, local_bytes = map(int, found.groups())
    widths = re.findall(r"(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    instructions = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    return Resources(
        kernel=launch.kernel.__name__.strip("_"),
        variant=variant,
        arch=arch,
        registers=registers,
        spilled_bytes=stack_bytes + local_bytes,
        shared_bytes=compiled.metadata.shared,
        access_bytes=max(int(lanes or 1) * int(bits) // 8 for lanes, bits in widths),
        tensor_cores=instructions[0] if instructions else "-",
    )


DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch",
        type=int,
        choices=sorted(MAX_SHARED_BYTES),
        nargs="+",
        default=sorted(MAX_SHARED_BYTES),
    )
    parser.add_argument("--head-size", type=positive, nargs="+", default=[64, 128, 256])
    parser.add_argument("--kv-heads", type=positive, default=8, help="on one rank")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    everything_fits = True
    if not arguments.json:
        print(
            f"| {'kernel':19} | {'variant':40} | arch | registers | spilled | shared | access | MMA |"
        )
        print("|---|---|---|---|---|---|---|---|")
    for dtype in arguments.dtype:
        for head_size in arguments.head_size:
            for variant, launch in variants(getattr(torch, dtype), head_size, arguments.kv_heads):
                for arch in arguments.arch:
                    row = compile_for(arch, variant, launch)
                    everything_fits &= row.fits
                    print(json.dumps(asdict(row)) if arguments.json else _line(row), flush=True)
    return 0 if everything_fits else 1


def _line(row: Resources) -> str:
    return (
        f"| {row.kernel:19} | {row.variant:40} | {row.arch:4} | {row.registers:9} | "
        f"{row.spilled_bytes:7} | {row.shared_bytes:6} | {row.access_bytes:6} | {row.tensor_cores} |"
    )


if __name__ == "__main__":
    sys.exit(main())
