"""The Language Model Evaluation Harness runs magicpig by `attention_backend=magicpig` alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recall_model

pytest.importorskip(
    "lm_eval", reason="lm_eval is not installed; pip install 'vllm-magicpig[eval]' to run this"
)

TASKS = Path(recall_model.__file__).parent / "lm_eval_task"


def _score(model_arguments: str, output: Path) -> float:
    """words_from_decode of 8 samples of 4,096 tokens."""
    # Not from the repository root, whose triton_kernels/ vLLM would take for OpenAI's: hence -P.
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "vllm", "--tasks", "recall_chain"]
    command += ["--model_args", model_arguments, "--include_path", str(TASKS)]
    command += ["--metadata", '{"length": 4096, "samples": 8}', "--output_path", str(output)]
    run = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    (file,) = output.rglob("results_*.json")
    result = json.loads(file.read_text())["results"]["recall_chain"]
    return float(result["words_from_decode,none"])


def test_the_harness_decodes_by_sampling(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "pretrained": str(recall_model.build(tmp_path / "recall")),
        "attention_backend": "magicpig",
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
    }
    short = ",".join(f"{name}={value}" for name, value in arguments.items())
    assert _score(short, tmp_path / "centred") == 1.0
    # Dense attention knows nothing of this option and would go on answering rightly.
    options = {"index": "buckets", "rows": 0.02, "center": "none"}
    nested = json.dumps(arguments | {"additional_config": {"magicpig": options}})
    assert _score(nested, tmp_path / "uncentred") < 0.5
