from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray in this very process come first: Ray reads its authentication mode when
    it is imported, and vLLM, which later tests use here, imports it."""
    items.sort(key=lambda item: item.path.name != "test_control_lives.py")
