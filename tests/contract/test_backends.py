"""Every backend that runs here equals the reference on every method."""

from __future__ import annotations

import pytest

from recsys_embed.kernels.dispatch import available_backends
from recsys_embed.testing import check_backend


@pytest.mark.parametrize("backend", [b.name for b in available_backends() if b.available])
def test_backend(backend: str) -> None:
    check_backend(backend)
