"""The largest elements of tables are those that sorting finds, in memory that does not grow with the tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.search import largest_elements as ranking
from recsys_embed.search.largest_elements import LargestElements
from recsys_embed.search.pruning import keep_elements

# Neighbours in each digit, values that differ by sign alone, and what lies at the ends of the floats.
VALUES = [0.0, -0.0, 1.0, -1.0, 1.0000001, 1.0002442, 1.125, 1e-45, 1e-40, 3e38, math.inf, -math.inf, 0.03, -0.02]


@st.composite
def some_tables(draw: st.DrawFn) -> list[Tensor]:
    width, g = draw(st.integers(1, 5)), torch.Generator().manual_seed(draw(st.integers(0, 999)))
    values = torch.tensor(draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=6)))
    found = []
    for rows in draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)):
        pick = values[torch.randint(0, len(values), (rows, width), generator=g)]
        noise = torch.randn(rows, width, generator=g)
        found.append(torch.where(torch.rand(rows, width, generator=g) < draw(st.floats(0, 1)), pick, noise))
    return found


def by_sorting(found: list[Tensor], count: int) -> list[Tensor]:
    sizes = torch.cat([t.abs().reshape(-1) for t in found])
    kept = torch.zeros(len(sizes), dtype=torch.bool)
    kept[sizes.argsort(descending=True, stable=True)[:count]] = True
    return [part.view(t.shape) for part, t in zip(kept.split([t.numel() for t in found]), found, strict=True)]


@settings(max_examples=60, deadline=None)
@given(found=some_tables(), shares=st.lists(st.floats(0, 1), min_size=1, max_size=3), part=st.sampled_from([1, 8, 99]))
def test_the_largest_are_those_of_a_stable_sort(found: list[Tensor], shares: list[float], part: int) -> None:
    with patch.object(ranking, "_PART", part):
        ranked = LargestElements(found)
        assert ranked.total == sum(t.numel() for t in found)
        for count in [0, ranked.total, *(round(s * ranked.total) for s in shares)]:
            wanted = by_sorting(found, count)
            got = ranked.mask(count)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), count
            assert ranked.columns(count).tolist() == [k.sum(0).tolist() for k in wanted]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, masks aside."""

    bytes = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given | {0}:
                size = 0 if made.dtype == torch.bool else made.untyped_storage().nbytes()
                self.bytes = max(self.bytes, size)
        return out


@pytest.mark.parametrize("options", [{"budget": None, "sparsity": 0.9}, {"budget": 400_000, "sparsity": 0.0}])
def test_nothing_of_the_size_of_a_table_is_made(options: dict[str, Any]) -> None:
    schema = Schema([FeatureSpec("a", 100_000, 4)])
    table = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(0))
    # Half of it is one value, and cuts go through it.
    table[::2, :2] = 1.6
    with patch.object(ranking, "_PART", 1 << 12), Largest() as largest:
        (kept,) = keep_elements(schema, [table], "zero", **options)
    assert 0 < int(kept.sum()) < table.numel() / 2
    assert 0 < largest.bytes < table.nbytes / 8
