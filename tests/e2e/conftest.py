import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts engines."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)
