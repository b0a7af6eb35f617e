"""Tests of the GPU kernels: in triton's interpreter (TRITON_INTERPRET=1), or compiled; `make test-triton` does both."""

from __future__ import annotations

import pytest

from recsys_embed.kernels.triton import status

try:
    import triton
except ImportError:
    triton = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs triton where it is not installed, and what needs its interpreter where that is not on."""
    for item in items:
        needs = {name for name in ("interpreted", "compiled") if item.get_closest_marker(name)}
        if needs and triton is None:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
        elif needs and ("interpreted" in needs) != status.interpreted():
            item.add_marker(pytest.mark.skip(reason="runs with TRITON_INTERPRET=1, or without"))
