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


def _score(model: Path, output: Path, options: dict[str, Any]) -> float:
    """words_from_decode of 8 samples of 4,096 tokens."""
    model_arguments = {
        "pretrained": str(model),
        "attention_backend": "magicpig",
        "additional_config": {"magicpig": options},
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
    }
    # Not from the repository root, whose triton_kernels/ vLLM would take for OpenAI's: hence -P.
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "vllm", "--tasks", "recall_chain"]
    command += ["--model_args", json.dumps(model_arguments), "--include_path", str(TASKS)]
    command += ["--metadata", '{"length": 4096, "samples": 8}', "--output_path", str(output)]
    run = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    (file,) = output.rglob("results_*.json")
    result = json.loads(file.read_text())["results"]["recall_chain"]
    return float(result["words_from_decode,none"])


def test_the_harness_decodes_by_sampling(tmp_path: Path) -> None:
    model = recall_model.build(tmp_path / "recall")
    assert _score(model, tmp_path / "centred", {"rows": 0.02}) == 1.0
    # Dense attention knows nothing of this option and would go on answering rightly.
    assert _score(model, tmp_path / "uncentred", {"rows": 0.02, "center": "none"}) < 0.5
