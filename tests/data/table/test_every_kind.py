"""Of every kind in the registry: what was encoded decodes to what went in, and encodes to the same again."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed.data import Dataset, convert_table, open_dataset
from recsys_embed.data.columns import KINDS, LATER
from recsys_embed.errors import ConfigError, DataError

BIG = 2**53 + 1
MASKS: dict[str, Callable[[int, int], bool]] = {
    "no nulls": lambda i, n: False,
    "nulls alone": lambda i, n: True,
    "the first": lambda i, n: i == 0,
    "the last": lambda i, n: i == n - 1,
    "all but the last": lambda i, n: i < n - 1,
    "every other": lambda i, n: i % 2 == 0,
}


def of_vocabulary(data: Dataset, encoded: list[Any]) -> list[Any]:
    known = data.vocabulary("x")
    by_id = {int(i): v for i, v in zip(known.ids, known.values.to_list(), strict=True)}  # type: ignore[union-attr]
    return [[by_id[i] for i in e] if isinstance(e, list) else by_id.get(e) for e in encoded]


def signed(data: Dataset, encoded: list[Any]) -> list[Any]:
    """Raw ids of unsigned integers, of which one stands for the missing value."""
    gone = data.manifest.features[0].missing_id
    return [None if e == gone else int(np.int64(e).view(np.uint64)) for e in encoded]


def kept(data: Dataset, encoded: list[Any]) -> list[Any]:
    return encoded


def whole(values: list[Any], value: Any) -> Any:
    return value


def filled(values: list[Any], value: Any) -> Any:
    """A missing number is the mean of the others."""
    known = [v for v in values if v is not None]
    return float(np.float32(np.mean(known) if known else 0.0)) if value is None else value


@dataclass(frozen=True)
class Case:
    """A kind with settings, values of a type, and what they decode to."""

    kind: str
    dtype: Any
    values: st.SearchStrategy[Any]
    settings: dict[str, Any] = field(default_factory=dict)
    decode: Callable[[Dataset, list[Any]], list[Any]] = kept
    wanted: Callable[[list[Any], Any], Any] = whole
    part: str = "x"
    nulls: bool = True
    again: bool = True


TEXTS, WORDS = st.sampled_from(["a", "b", "Zürich", "0"]), st.lists(st.sampled_from("abc"), max_size=4)
FLOATS, SECONDS = st.integers(-64, 64).map(lambda n: n / 8), st.integers(-(10**9), 2 * 10**9)
PIECES = st.sampled_from(["1|2", "2", "3|1|3"])
VECTOR = pl.Array(pl.Float32, 2)
CASES = {
    "label": Case("label", pl.Int8, st.integers(0, 1), part="label", nulls=False),
    "label, words": Case("label", pl.String, st.sampled_from(["yes", "no"]), part="label", nulls=False, again=False,
                         wanted=lambda _, v: int(v == "yes")),
    "label, real": Case("label", pl.Float64, FLOATS, {"task": "real"}, part="label", nulls=False),
    "categorical": Case("categorical", pl.String, TEXTS, {"min_count": 1}, of_vocabulary),
    "categorical, integers": Case("categorical", pl.Int64, st.sampled_from([0, -1, BIG]), {"min_count": 1},
                                  of_vocabulary),
    "categorical, dates": Case("categorical", pl.Date, st.dates(dt.date(1960, 1, 1), dt.date(1960, 1, 4)),
                               {"min_count": 1}, of_vocabulary),
    "categorical, raw": Case("categorical", pl.UInt64, st.sampled_from([0, 2**64 - 1, BIG]), {"ids": "raw"}, signed),
    "list": Case("list", pl.List(pl.String), WORDS, {"min_count": 1}, of_vocabulary, lambda _, v: v or []),
    "list, text": Case("list", pl.String, PIECES, {"separator": "|", "min_count": 1}, of_vocabulary,
                       lambda _, v: v.split("|") if v else []),
    "sequence": Case("sequence", pl.List(pl.String), WORDS, {"max_length": 2, "min_count": 1}, of_vocabulary,
                     lambda _, v: (v or [])[-2:]),
    "sequence, newest first": Case("sequence", pl.List(pl.String), WORDS,
                                   {"max_length": 2, "newest": "first", "min_count": 1}, of_vocabulary,
                                   lambda _, v: (v or [])[:2][::-1], again=False),
    "numeric": Case("numeric", pl.Float64, FLOATS, wanted=filled),
    "numeric, integers": Case("numeric", pl.Int32, st.integers(-9, 9), {"fill": -1}, wanted=lambda _, v: -1 if v is None
                              else v),
    "vector": Case("vector", VECTOR, st.tuples(FLOATS, FLOATS).map(list), {"width": 2},
                   wanted=lambda _, v: v or [0.0, 0.0]),
    "time": Case("time", pl.Int64, SECONDS, {"parts": []}, part="time", nulls=False),
    "weight": Case("weight", pl.Float64, FLOATS.map(abs), part="weight", nulls=False),
    "group": Case("group", pl.Int64, st.integers(-9, 9), part="group",
                  wanted=lambda _, v: np.iinfo(np.int64).min if v is None else v, again=False),
    "group, text": Case("group", pl.String, TEXTS, part="group", again=False,
                        wanted=lambda _, v: int(rse.string_ids([v or ""]))),
}  # fmt: skip


def test_every_kind_has_a_case() -> None:
    assert {case.kind for case in CASES.values()} == set(KINDS)
    for kind in LATER:
        with pytest.raises(ConfigError, match=f"kind '{kind}' comes with"):
            convert_table(pl.DataFrame({"x": ["a"]}), "unused", {"columns": {"x": {"kind": kind}}})


@pytest.mark.crossed
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_encoded_and_decoded(name: str, mask: str, data: st.DataObject) -> None:
    case = CASES[name]
    given_values = data.draw(st.lists(case.values, min_size=2, max_size=12))
    values = [None if MASKS[mask](i, len(given_values)) else v for i, v in enumerate(given_values)]
    frame = pl.DataFrame({"n": range(len(values)), "x": pl.Series(values, dtype=case.dtype)})
    columns = {"n": {"kind": "numeric"}, "x": {"kind": case.kind, **case.settings}}
    schema = {"columns": columns, "split": {"kind": "all", "only": "train"}}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if None in values and not case.nulls:
            with pytest.raises(DataError) as e:
                convert_table(frame, out, schema)
            told = [f"row {i + 1}, column x" in str(e.value) for i, v in enumerate(values) if v is None]
            assert all(told[:5])
            return
        convert_table(frame, out, schema)
        opened = open_dataset(out)
        encoded = pl.read_parquet(out / opened.manifest.splits["train"].shards[0].file)[case.part].to_list()
        decoded = case.decode(opened, encoded)
        assert decoded == [case.wanted(values, v) for v in values]
        encoder = opened.encoder("x")
        assert encoder.encode(frame["x"]).columns[case.part].to_list() == encoded
        if case.again:
            # Where the column is text, decoded lists are texts again.
            text = case.dtype == pl.String and case.kind == "list"
            rows = ["|".join(row) for row in decoded] if text else decoded
            again = encoder.encode(pl.Series("x", rows).cast(case.dtype)).columns[case.part].to_list()
            assert again == encoded
