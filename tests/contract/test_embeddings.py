"""Every registered method keeps every clause of the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.testing import EMBEDDING_CHECKS


@pytest.mark.parametrize("check", EMBEDDING_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)
def test_contract(method: MethodInfo, check: Callable[[MethodInfo], None]) -> None:
    check(method)
