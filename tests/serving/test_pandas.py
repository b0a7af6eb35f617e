"""Frames of pandas are the table that pandas writes as Parquet, whatever types their columns have."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tables import written

import recsys_embed as rse
from recsys_embed.data import convert_table, open_dataset
from recsys_embed.errors import ConfigError
from tests.tiers import slow_but

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

BIG = 2**62 + 1
NAN = float("nan")
TIMES = ["2024-01-01", "2024-06-02 03:04:05", None]
ITEMS: dict[str, Any] = {
    "Int64": lambda: pd.Series([1, None, BIG] * 4, dtype="Int64"),
    "UInt64": lambda: pd.Series([1, 2, 2**64 - 1] * 4, dtype="UInt64"),
    "int32": lambda: pd.Series([1, 2, 3] * 4, dtype="int32"),
    "float64": lambda: pd.Series([1.0, NAN, 3.0] * 4),
    "boolean": lambda: pd.Series([True, None, False] * 4, dtype="boolean"),
    "string": lambda: pd.Series(["a", None, ""] * 4, dtype="string"),
    "category of text": lambda: pd.Series(["a", None, "b"] * 4, dtype="category"),
    "category of integers": lambda: pd.Series([1, None, 3] * 4, dtype="category"),
    "objects, text": lambda: pd.Series(["a", None, "b", NAN, "", pd.NA] * 2, dtype=object),
    "objects, integers": lambda: pd.Series([1, None, BIG] * 4, dtype=object),
    "objects, booleans": lambda: pd.Series([True, None, False] * 4, dtype=object),
    "objects, dates": lambda: pd.Series([dt.date(2024, 1, 1), None, dt.date(1999, 1, 1)] * 4, dtype=object),
    "times": lambda: pd.Series(pd.to_datetime(TIMES * 4, format="ISO8601")),
    "times with a zone": lambda: pd.Series(pd.to_datetime(TIMES * 4, format="ISO8601")).dt.tz_localize("Asia/Tokyo"),
    "objects, times": lambda: pd.Series([pd.Timestamp("2024-01-01"), pd.NaT, None] * 4, dtype=object),
    "sparse": lambda: pd.Series(pd.arrays.SparseArray([0, 0, 7] * 4)),
}
INDEX = {
    "range": lambda f: f,
    "of other numbers": lambda f: f.set_axis([5, 5, *range(10)], axis=0),
    "of a column": lambda f: f.set_index("item"),
    "of two columns": lambda f: f.set_index(["user", "item"]),
}


def frame(item: Any) -> Any:
    lists: list[Any] = [[1, 2], None, [], np.array([3, 1]), (2,), [1]]
    stamps = pd.Series(pd.to_datetime(["2024-01-01 05:00", "2024-07-01", "1999-12-31"] * 4, format="ISO8601"))
    return pd.DataFrame(
        {
            "click": pd.Series([0, 1, 1] * 4, dtype="int8"),
            "item": item,
            "user": pd.Series(["u", "v"] * 6, dtype=object),
            "seen": pd.Series(lists * 2, dtype=object),
            "price": pd.Series([1.5, None, 2] * 4, dtype="Float64"),
            "count": pd.Series([1, NAN, 3] * 4),
            "ts": stamps.dt.tz_localize("Europe/Berlin"),
            "title": pd.Series([[1.0, 2.0], None, np.array([3.0, 4.0])] * 4, dtype=object),
            "weight": pd.Series([0.5, 1, 2] * 4, dtype="float32"),
        }
    )


def schema(ids: str) -> dict[str, Any]:
    own = {"min_count": 1} if ids == "vocab" else {"ids": "raw"}
    columns = {
        "click": {"kind": "label"},
        "item": {"kind": "categorical", **own},
        "user": {"kind": "categorical", **own},
        "seen": {"kind": "list", "min_count": 1},
        "price": {"kind": "numeric", "indicator": True},
        "count": {"kind": "numeric", "buckets": 3},
        "ts": {"kind": "time", "parts": ["hour", "weekday"]},
        "title": {"kind": "vector"},
        "weight": {"kind": "weight"},
    }
    return {"columns": columns, "split": {"kind": "all", "only": "train"}}


@pytest.mark.parametrize("kind", slow_but(ITEMS, "Int64", "objects, text", "category of integers"))
def test_equal_to_what_pandas_writes(tmp_path: Path, kind: str) -> None:
    ids = "raw" if len(kind) % 2 else "vocab"
    whole = frame(ITEMS[kind]())
    dense = whole.astype({"item": "int64"}) if kind == "sparse" else whole
    dense.to_parquet(tmp_path / "rows.parquet")
    forms = {name: change(whole) for name, change in INDEX.items()} | {"file": tmp_path / "rows.parquet"}
    digests = {}
    for name, form in forms.items():
        convert_table(form, tmp_path / name, schema(ids))
        digests[name] = open_dataset(tmp_path / name).digest
    assert set(digests.values()) == {digests["file"]}
    written(tmp_path, open_dataset(tmp_path / "file"))
    model: Any = rse.load(tmp_path / "model.safetensors")
    wanted = model.predict(tmp_path / "rows.parquet")
    assert len(np.unique(wanted)) > 4
    for name, form in forms.items():
        assert np.array_equal(model.predict(form), wanted), name


def test_what_cannot_be_taken_over_is_named() -> None:
    mixed = pd.DataFrame(
        {"a": [1, 2], "b": pd.Series([1, "x"], dtype=object), "c": pd.Series(["y", 2.5], dtype=object)}
    )
    with pytest.raises(ConfigError, match=r"(?s)2 faults in the pandas frame.*column 'b'.*column 'c'"):
        convert_table(mixed, "unused", schema("vocab"))
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(ConfigError, match="several columns 'a': rename them"):
        convert_table(twice, "unused", schema("vocab"))


def test_times_of_a_zone_are_those_of_polars(tmp_path: Path) -> None:
    stamps = ["2024-01-01 05:00", "2024-07-01 23:30"]
    made = pd.DataFrame({"n": [1, 2], "ts": pd.to_datetime(stamps).tz_localize("America/New_York")})
    own = pl.DataFrame({"n": [1, 2], "ts": stamps}).with_columns(
        pl.col("ts").str.to_datetime("%Y-%m-%d %H:%M").dt.replace_time_zone("America/New_York")
    )
    columns = {"n": {"kind": "numeric"}, "ts": {"kind": "time", "parts": ["hour", "weekday"]}}
    for name, form in (("a", made), ("b", own)):
        convert_table(form, tmp_path / name, {"columns": columns, "split": {"kind": "all", "only": "train"}})
    a, b = (open_dataset(tmp_path / name).read("train", 0, 2) for name in "ab")
    assert a.dense.tolist() == b.dense.tolist() == [[1, 10.0, 1], [2, 3.5, 2]]
