"""Which vLLM is checked, and stand-ins for its compiled parts of CUDA builds."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import vllm


def pytest_report_header(config: pytest.Config) -> str:
    return f"contract with vLLM {vllm.__version__} at {vllm.__path__[0]}"


if torch.version.cuda is None:  # vllm.platforms.cuda imports it
    sys.modules.setdefault("vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
