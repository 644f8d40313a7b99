import pytest
import torch

NEEDS_CPU_BUILD = pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="compares with CPU_ATTN, which needs vLLM's CPU build; on a GPU run make gpu-check",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts engines."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(NEEDS_CPU_BUILD)
