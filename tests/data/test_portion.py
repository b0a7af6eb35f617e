"""Portions of a data folder: every row in exactly one, row groups whole where that is fair."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import table
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data import Portion, loader, open_dataset
from recsys_embed.data.rows import portion_ends
from recsys_embed.data.stream import moments_of
from recsys_embed.errors import ConfigError


@given(world=st.integers(1, 9), group=st.sampled_from([60, 170, 65536]), streamed=st.booleans())
def test_every_row_once_in_file_order(sharded: Path, world: int, group: int, streamed: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "CHUNK_ROWS", group)
        data = open_dataset(sharded, memory_limit=0 if streamed else 1 << 30)
        whole = table(list(data.batches("train", 64, shuffle=False)))
        parts = [data.portion(rank, world) for rank in range(world)]
        batches = [list(part.batches("train", 16, shuffle=False)) for part in parts]
        assert torch.equal(table([b for some in batches for b in some]), whole)
        assert [sum(len(b.label) for b in some) for some in batches] == [part.splits["train"] for part in parts]
        assert [len(part.batches("train", 16)) for part in parts] == [-(-part.rows("train") // 16) for part in parts]
        shuffled = table([b for part in parts for b in part.batches("train", 16, seed=3, epoch=1)])
        assert sorted(shuffled.tolist()) == sorted(whole.tolist())
        moments = moments_of(sum(part.numeric_sums() for part in parts))  # type: ignore[arg-type]
        for mine, known in zip(moments, data.numeric_moments(), strict=True):
            torch.testing.assert_close(mine, known, equal_nan=True)


@given(world=st.integers(2, 6), group=st.sampled_from([1, 2, 30, 65536]))
def test_portions_are_fair(sharded: Path, world: int, group: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "CHUNK_ROWS", group)
        data = open_dataset(sharded)
        rows = [data.portion(rank, world).rows("train") for rank in range(world)]
        fair = data.splits["train"] / world
        assert all(abs(n - fair) <= 2 * 0.01 * fair + 1 for n in rows)


def test_row_groups_stay_whole_where_that_is_fair(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CHUNK_ROWS", 2)
    data = open_dataset(sharded)
    assert portion_ends(data, "train", 2)[1] in [stop for _, stop in data.chunks("train")]


def test_more_processes_than_rows(sharded: Path) -> None:
    data = open_dataset(sharded)
    rows = [data.portion(r, 10_000).rows("valid") for r in range(0, 10_000, 999)]
    assert set(rows) <= {0, 1}
    with pytest.raises(ConfigError, match=r"`rank` must be in \[0, 2\); got 2"):
        data.portion(2, 2)


def test_the_former_name_says_the_new_one(sharded: Path) -> None:
    data = open_dataset(sharded)
    with pytest.warns(DeprecationWarning, match=r"use data\.portion\(rank, world\)"):
        part = Portion.of(data, 1, 3)
    new = data.portion(1, 3)
    assert (part.splits, part.digest, part.rows("train")) == (data.splits, data.digest, new.rows("train"))
    assert part.rows_of_all("train") == [data.portion(r, 3).rows("train") for r in range(3)]
    assert torch.equal(*(table(list(p.batches("train", 16, seed=1))) for p in (part, new)))
