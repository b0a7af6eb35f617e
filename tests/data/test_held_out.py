"""Rows held out are the last of training, in no other split, and the same from memory and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import table
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data import loader, open_dataset
from recsys_embed.errors import ConfigError, UnknownNameError


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
    found = data.held_out(0.25)
    ids = {split: found.load(split).ids for split in (*data.splits, "held_out")}
    cut = found.rows("train")
    assert ids["train"].data_ptr() == data.load("train").ids.data_ptr()
    assert ids["held_out"].data_ptr() == data.load("train").ids[cut:].data_ptr()
    assert all(ids[split].data_ptr() == data.load(split).ids.data_ptr() for split in ("valid", "test"))


def test_a_part_that_fits_is_loaded_where_the_whole_does_not(sharded: Path) -> None:
    rows = open_dataset(sharded).rows("train")
    data = open_dataset(sharded, memory_limit=rows // 2 * open_dataset(sharded).row_bytes())
    found = data.held_out(0.25)
    assert (found.fits("train"), found.fits("held_out"), data.fits("train")) == (False, True, False)
    kept = list(found.batches("train", 64, shuffle=False)) + list(found.batches("held_out", 64, shuffle=False))
    assert torch.equal(table(kept), table(list(data.batches("train", 64, shuffle=False))))


def test_what_is_held_out_is_part_of_what_the_data_is(sharded: Path) -> None:
    data = open_dataset(sharded)
    digests = [data.digest, data.held_out(0.2).digest, data.held_out(0.5).digest]
    assert len(set(digests)) == 3
    assert digests[1] == open_dataset(sharded).held_out(0.2).digest


def test_what_cannot_be_held_out_is_refused(sharded: Path) -> None:
    data = open_dataset(sharded)
    for share in (0.0, 1.0, -0.5, float("nan"), "0.2", None):
        with pytest.raises(ConfigError, match=r"`share` must lie between 0 and 1; got"):
            data.held_out(share)
    with pytest.raises(ConfigError, match="rows are held out once"):
        data.held_out(0.2).held_out(0.2)
    with pytest.raises(UnknownNameError, match="did you mean 'held_out'"):
        data.held_out(0.2).batches("heldout", 8)


@given(world=st.integers(1, 4), group=st.sampled_from([60, 65536]), streamed=st.booleans())
def test_views_are_made_of_views(sharded: Path, world: int, group: int, streamed: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "CHUNK_ROWS", group)
        data = open_dataset(sharded, memory_limit=0 if streamed else 1 << 30)
        whole = table(list(data.batches("train", 64, shuffle=False)))
        after = [data.portion(rank, world).held_out(0.3) for rank in range(world)]
        rows = [list(d.batches(split, 16, shuffle=False)) for d in after for split in ("train", "held_out")]
        assert torch.equal(table([b for some in rows for b in some]), whole)
        before = [data.held_out(0.3).portion(rank, world) for rank in range(world)]
        rows = [list(d.batches(split, 16, shuffle=False)) for split in ("train", "held_out") for d in before]
        assert torch.equal(table([b for some in rows for b in some]), whole)
        first = after[0]
        ran = list(first.batches("train", 16, seed=5))
        assert torch.equal(table(list(first.batches("train", 16, seed=5, start_batch=2))), table(ran[2:]))
        assert len({d.digest for d in (*after, *before, data)}) == 1 + (2 * world if world > 1 else 2)
