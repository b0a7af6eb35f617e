"""Rows held out are the last of training, in no other split, and the same from memory and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import table
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data import Portion, loader, open_dataset
from recsys_embed.errors import ConfigError


@given(
    share=st.floats(0.01, 0.99),
    group=st.sampled_from([60, 170, 65536]),
    streamed=st.booleans(),
    loaded=st.booleans(),
)
def test_training_rows_are_cut_in_two(sharded: Path, share: float, group: int, streamed: bool, loaded: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "CHUNK_ROWS", group)
        data = open_dataset(sharded, memory_limit=0 if streamed else 1 << 30)
        whole = table(list(open_dataset(sharded).batches("train", 64, shuffle=False)))
        if loaded:
            data.load("train")
        found = data.held_out(share)
        assert found.splits == {**data.splits, "train": found.rows("train"), "held_out": found.rows("held_out")}
        assert found.rows("held_out") == round(share * data.rows("train"))
        parts = [list(found.batches(split, 16, shuffle=False)) for split in ("train", "held_out")]
        assert torch.equal(table(parts[0] + parts[1]), whole)
        for split, batches in zip(("train", "held_out"), parts, strict=True):
            shuffled = table(list(found.batches(split, 16, seed=3, epoch=1)))
            assert sorted(shuffled.tolist()) == sorted(table(batches).tolist())
            assert len(found.batches(split, 16)) == len(batches)
        for split in ("valid", "test"):
            mine, known = (table(list(d.batches(split, 64, shuffle=False))) for d in (found, data))
            assert torch.equal(mine, known)


def test_rows_in_memory_are_not_copied(sharded: Path) -> None:
    data = open_dataset(sharded)
    whole = data.load("train")
    assert data.held_out(0.25).load("train").ids.data_ptr() == whole.ids.data_ptr()


def test_what_cannot_be_held_out_is_refused(sharded: Path) -> None:
    data = open_dataset(sharded)
    for share in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ConfigError, match="`share` must lie between 0 and 1"):
            data.held_out(share)
    with pytest.raises(ConfigError, match="a portion"):
        Portion.of(data, 0, 2).held_out(0.2)
