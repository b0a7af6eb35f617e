"""Encoders in a file: vocabularies stored once and looked up there, models that load without polars."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import written

import recsys_embed as rse
from recsys_embed.data import convert_table, open_dataset
from recsys_embed.data.serving import lookups
from recsys_embed.data.serving.lookups import IntegerIds, TextIds
from recsys_embed.data.serving.stored import StoredEncoders

WORDS = st.text(max_size=20)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3) | st.integers(2**31 - 2, 2**31 + 2)


@settings(max_examples=60, deadline=None)
@given(known=st.sets(WORDS.filter(bool), max_size=30), other=st.sets(WORDS, max_size=30), collide=st.booleans())
def test_strings_are_found_whatever_their_hashes(known: set[str], other: set[str], collide: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(lookups, "_hashes", lambda text, lengths: (lengths % 3).astype(np.uint32))
        values, asked = sorted(known), [*sorted(known | other)]
        ids = np.arange(1, len(values) + 1)
        lookup = TextIds.of(pl.Series(values, dtype=pl.String), ids)
        wanted = dict(zip(values, ids.tolist(), strict=True))
        assert lookup(pl.Series(asked, dtype=pl.String)).tolist() == [wanted.get(v, 0) for v in asked]
        texts, found = lookup.values()
        assert dict(zip(texts, found.tolist(), strict=True)) == wanted


def test_text_is_hashed_and_compared_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    values = pl.Series(["", *(f"{i:x}" * (1 + i % 7) for i in range(2**20, 2**20 + 99)), "x" * 500])
    ids = np.arange(1, len(values) + 1)
    whole = TextIds.of(values, ids)
    for size in (1, 10, 60):
        monkeypatch.setattr(lookups, "_SLICE", size)
        made = TextIds.of(values, ids)
        assert all(np.array_equal(a, b) for a, b in zip(made.arrays().values(), whole.arrays().values(), strict=True))
        assert made(values).tolist() == [0, *range(2, len(values) + 1)]
    monkeypatch.undo()
    long = pl.Series([f"{i:8d}" * 64 for i in range(2**16)])  # 32 MiB
    text, lengths = lookups._bytes(long)
    lookup = TextIds.of(long, np.arange(1, len(long) + 1))
    starts = np.cumsum(lengths) - lengths
    for work in (
        lambda: lookups._hashes(text, lengths),
        lambda: TextIds(lookup.hashes, lookup.ids, lookup.ends, text)._equal(starts, text, starts, lengths),
    ):
        tracemalloc.start()
        work()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 6 * len(text)


@settings(max_examples=60, deadline=None)
@given(known=st.sets(NUMBERS, max_size=30), other=st.lists(NUMBERS, max_size=30))
def test_integers_are_found(known: set[int], other: list[int]) -> None:
    values, asked = np.array(sorted(known), np.int64), [*known, *other]
    lookup = IntegerIds.of(values, np.arange(1, len(values) + 1))
    wanted = {int(v): i for i, v in enumerate(values, 1)}
    assert lookup(np.array(asked, np.int64)).tolist() == [wanted.get(v, 0) for v in asked]


def test_vocabularies_are_parsed_once() -> None:
    item = {"number": 0, "name": "user", "type": "string", "size": 3, "missing_id": 0}
    encoders = StoredEncoders({"vocabularies": {"user.parquet": item}}, {})
    assert encoders.vocabularies is encoders.vocabularies
    assert encoders.vocabularies["user.parquet"].size == 3


def test_a_shared_vocabulary_is_stored_once(tmp_path: Path) -> None:
    items = [f"item-{i:08d}" for i in range(500)]
    rows = {
        "click": [0, 1] * 250,
        "item": items,
        "seen": [items[i : i + 3] for i in range(500)],
        "id": range(2**60, 2**60 + 500),
    }
    columns: Any = {
        "click": {"kind": "label"}, "item": {"kind": "categorical", "vocab": "item", "min_count": 1},
        "seen": {"kind": "sequence", "vocab": "item", "min_count": 1},
        "id": {"kind": "categorical", "min_count": 1},
    }  # fmt: skip
    convert_table(rows, tmp_path / "data", {"columns": columns, "split": {"kind": "order", "valid": 0, "test": 0}})
    data = open_dataset(tmp_path / "data")
    model: Any = written(tmp_path, data)
    stored = model.scorer.stored
    # A string of 13 bytes and 12 more, an integer of 8 and 4.
    assert stored.nbytes == 500 * (13 + 12) + 500 * (8 + 4)
    report = rse.export(model, tmp_path / "again.safetensors")
    assert report.encoder_bytes == stored.nbytes
    assert report.bytes == (tmp_path / "again.safetensors").stat().st_size
    assert report.header_bytes + report.dense_bytes + report.embedding_bytes + report.encoder_bytes == report.bytes


def test_a_file_with_encoders_loads_without_polars(tmp_path: Path) -> None:
    rows = {"click": [0, 1] * 20, "user": ["ann", "bob"] * 20}
    columns: Any = {"click": {"kind": "label"}, "user": {"kind": "categorical"}}
    convert_table(rows, tmp_path / "data", {"columns": columns, "split": {"kind": "order"}})
    written(tmp_path, open_dataset(tmp_path / "data"))
    code = f"""
import sys
sys.modules["polars"] = None
import torch
import recsys_embed as rse
from recsys_embed.errors import MissingDependencyError
model = rse.load({str(tmp_path / "model.safetensors")!r})
print(model(torch.zeros(2, 0), torch.tensor([[1], [2]])).shape)
try:
    model.predict({{"user": ["ann"]}})
except MissingDependencyError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    shape, said = done.stdout.splitlines()
    assert shape == "torch.Size([2])"
    assert said.startswith("scoring raw rows needs polars"), done.stderr
    assert "pip install 'recsys-embed[data]'" in said
