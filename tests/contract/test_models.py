"""Every registered model keeps the contract with every method."""

from __future__ import annotations

import pytest

from recsys_embed.models import list_models
from recsys_embed.testing import check_model
from tests.tiers import slow_but


@pytest.mark.parametrize("model", slow_but(list_models(), "twotower"))
def test_model(model: str) -> None:
    check_model(model)
