"""The kernels compile for the GPUs that they are meant for, on a machine without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("options", "num_rows"),
    [
        ("--arch 80 90 100 --dtype bfloat16 --head-size 128 --kv-heads 8", 21),
        # The most registers, the masks of an odd head size, and 1, which Triton makes a constant.
        ("--arch 80 --dtype float32 --head-size 256 --kv-heads 1", 7),
        ("--arch 90 --dtype float16 --head-size 80 --kv-heads 5", 7),
    ],
)
def test_kernels_compile_to_machine_code_and_nothing_spills(options: str, num_rows: int) -> None:
    script = ROOT / "scripts" / "triton_resources.py"
    command = [sys.executable, script, "--json", *options.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == num_rows, result.stderr
    spills = [row for row in rows if row["spilled_bytes"]]
    assert not spills
    assert result.returncode == 0, f"too much shared memory, or rows moved in small parts: {rows}"
    for row in rows:
        assert 16 < row["registers"] <= 255
        assert (row["tensor_cores"] != "-") == (row["kernel"] == "simhash_kernel")


def test_importing_the_kernels_needs_no_gpu_and_makes_no_top_level_module(tmp_path: Path) -> None:
    program = (
        "import sys, torch; torch.cuda._lazy_init = None\n"  # what any use of CUDA would call
        "from vllm_magicpig.triton_kernels import host_pages, merge, simhash\n"
        "assert 'triton_kernels' not in sys.modules and 'vllm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
