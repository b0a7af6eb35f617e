"""Names that moved between files are found where they were, and say where they are."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize("module", ["recsys_embed.train.run", "recsys_embed.search.common"])
def test_former_homes_warn(module: str) -> None:
    former = importlib.import_module(module)
    for name, home in former._HOME.items():
        now = f"{module.rpartition('.')[0]}.{home}"
        with pytest.warns(DeprecationWarning, match=f"{name} is no longer in {module}; import it from {now}"):
            found = getattr(former, name)
        today = getattr(former, "_RENAMED", {}).get(name, name)
        assert found is getattr(importlib.import_module(now), today)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = former.nothing
