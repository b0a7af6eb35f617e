"""Tests of the GPU kernels: in triton's interpreter (TRITON_INTERPRET=1), or compiled; `make test-triton` does both."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_embed.kernels.triton import status

try:
    import triton
except ImportError:
    triton = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs triton where it is not installed, and what needs its interpreter where that is not on."""
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        compiled = item.get_closest_marker("compiled") is not None
        if triton is None:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
        elif compiled == status.interpreted():
            item.add_marker(pytest.mark.skip(reason="in triton's interpreter" if compiled else "TRITON_INTERPRET is not 1"))
