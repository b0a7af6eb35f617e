"""What tests of the compiled kernels vary: the instruction set and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from recsys_embed.kernels.native import library as native_library


@pytest.fixture(params=native_library.VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set."""
    found = native_library.loaded()
    if found.handle.rse_select(request.param.encode()) is None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    found.handle.rse_select(found.variant.encode())


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
