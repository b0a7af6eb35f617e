"""Tests of the GPU kernels: in triton's interpreter (TRITON_INTERPRET=1), or compiled; `make test-triton` does both."""

from __future__ import annotations

import pytest

from recsys_embed.kernels.triton import status

try:
    import triton
except ImportError:
    triton = None


@pytest.fixture(autouse=True)
def faults_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of lookups come before their call returns, on GPUs too."""
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run: kernels without a GPU or triton's interpreter, compiling them within the interpreter."""
    for item in items:
        why = None
        if item.get_closest_marker("kernels"):
            why = status.why_not()
        elif item.get_closest_marker("compiled"):
            why = (
                "triton is not installed" if triton is None else "in the interpreter" if status.interpreted() else None
            )
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
