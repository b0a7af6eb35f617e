"""What a folder holds is what plain Python makes of the same rows, for columns of every kind and nulls anywhere."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed.data import TableSchema, convert_table, open_dataset
from recsys_embed.data.manifest import Manifest, read_manifest

BIG = 2**53 + 1
TYPES: dict[str, tuple[pl.DataType, st.SearchStrategy[Any]]] = {
    "string": (pl.String(), st.sampled_from(["", "a", "b", "Zürich", "68fd1e64", "a b", "0"])),
    "int8": (pl.Int8(), st.integers(-2, 2)),
    "int64": (pl.Int64(), st.sampled_from([0, -1, BIG, BIG + 1, -(2**62), 2**63 - 1])),
    "uint64": (pl.UInt64(), st.sampled_from([0, 1, 2**64 - 1, 2**64 - 2, 2**63 + 1])),
    "bool": (pl.Boolean(), st.booleans()),
    "date": (pl.Date(), st.sampled_from([dt.date(1969, 12, 31), dt.date(2024, 2, 29), dt.date(2030, 1, 1)])),
    "float": (pl.Float64(), st.sampled_from([0.0, 1.0, -5.0, float("nan"), 2.0**53])),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    kind = draw(st.sampled_from(sorted(TYPES)))
    value = st.none() | TYPES[kind][1]
    row = st.fixed_dictionaries(
        {
            "click": st.integers(0, 1),
            "item": value,
            "seen": st.none() | st.lists(value, max_size=5),
            "tags": st.none() | st.lists(st.none() | st.sampled_from(["", "x", "y", "z"]), max_size=4),
            "price": st.none() | st.sampled_from([float("nan"), 0.0, -1.5, 1e9, 3.25]),
            "weight": st.sampled_from([0.0, 0.5, 2.0]),
            "user": st.none() | st.sampled_from(["u", "v", ""]),
        }
    )
    return kind, draw(st.lists(row, min_size=6, max_size=40))


def frame_of(kind: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
    inner = TYPES[kind][0]
    types = {
        "click": pl.Int16, "item": inner, "seen": pl.List(inner), "tags": pl.List(pl.String), "price": pl.Float64,
        "weight": pl.Float64, "user": pl.String,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=types)


def schema(ids: str, min_count: int) -> TableSchema:
    shared = {"vocab": "item", "min_count": min_count} if ids == "vocab" else {"ids": "raw"}
    return TableSchema.from_dict(
        {
            "columns": {
                "click": {"kind": "label"},
                "item": {"kind": "categorical", **shared},
                "tags": {"kind": "list", "min_count": min_count},
                "seen": {"kind": "sequence", "max_length": 3, **shared},
                "price": {"kind": "numeric", "transform": "log", "indicator": True},
                "weight": {"kind": "weight"},
                "group": {"kind": "group", "column": "user"},
            },
            "split": {"kind": "order", "valid": 0.1, "test": "1/6"},
        }
    )


def missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def vocabulary(values: list[Any], gone: int, min_count: int) -> tuple[dict[Any, int], int]:
    """Ids by falling count, ties by value, the missing value behind its ties; and its id."""
    counts = Counter(values)
    kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
    places: list[Any] = [(counts[v], v) for v in kept]
    if gone >= max(1, min_count):
        at = sum(1 for count, _ in places if count >= gone)
        places.insert(at, (gone, None))
    ids = {v: i for i, (_, v) in enumerate(places, 1)}
    return {v: i for v, i in ids.items() if v is not None}, ids.get(None, 0)


def shards(folder: Path) -> pl.DataFrame:
    manifest: Manifest = read_manifest(folder)
    files = [folder / s.file for name in ("train", "valid", "test") if name in manifest.splits
             for s in manifest.splits[name].shards]  # fmt: skip
    return pl.concat([pl.read_parquet(f) for f in files])


def key(value: Any) -> Any:
    return int(value) if isinstance(value, float) else value.encode() if isinstance(value, str) else value


@settings(max_examples=30, deadline=None)
@given(table=tables(), min_count=st.integers(1, 3))
def test_vocabulary_ids_numbers_and_parts(table: tuple[str, list[dict[str, Any]]], min_count: int) -> None:
    kind, rows = table
    n = len(rows)
    test = int(n / 6 + 0.5)
    train = rows[: n - test - min(int(n / 10 + 0.5), n - test)]
    with TemporaryDirectory() as folder:
        report = convert_table(frame_of(kind, rows), Path(folder) / "out", schema("vocab", min_count))
        found = shards(Path(folder) / "out")
        manifest = read_manifest(Path(folder) / "out")
    assert sum(report.rows.values()) == n

    targets = [key(r["item"]) for r in train if not missing(r["item"])]
    kept = [(r["seen"] or [])[-3:] for r in rows]
    history = [key(v) for seen in kept[: len(train)] for v in seen if not missing(v)]
    ids, gone = vocabulary(targets + history, sum(missing(r["item"]) for r in train), min_count)
    assert found["item"].to_list() == [gone if missing(r["item"]) else ids.get(key(r["item"]), 0) for r in rows]
    assert found["seen"].to_list() == [[ids.get(key(v), 0) for v in seen if not missing(v)] for seen in kept]
    tags = [[key(v) for v in r["tags"] or [] if not missing(v)] for r in rows]
    tag_ids, _ = vocabulary([v for some in tags[: len(train)] for v in some], 0, min_count)
    assert found["tags"].to_list() == [[tag_ids.get(v, 0) for v in some] for some in tags]

    logs = [None if missing(r["price"]) else math.copysign(math.log1p(abs(r["price"])), r["price"]) for r in rows]
    known = [x for x in logs[: len(train)] if x is not None]
    fill = sum(known) / len(known) if known else 0.0
    np.testing.assert_allclose(found["price"], [fill if x is None else x for x in logs], rtol=1e-6, atol=1e-6)
    assert found["price_missing"].to_list() == [float(x is None) for x in logs]
    assert found["label"].to_list() == [r["click"] for r in rows]
    assert found["weight"].to_list() == [r["weight"] for r in rows]
    # The group of a missing value is the id that string_ids gives it.
    assert found["group"].to_list() == rse.string_ids([r["user"] for r in rows]).tolist()

    features = {f.name: f for f in manifest.features}
    assert list(features) == ["item", "tags", "seen"]
    assert features["item"].num_embeddings == features["seen"].num_embeddings == 1 + len(ids) + (gone > 0)
    assert features["item"].vocab == features["seen"].vocab
    assert (features["seen"].form, features["seen"].table, features["seen"].max_length) == ("sequence", "item", 3)
    assert manifest.dense == ("price", "price_missing")


@settings(max_examples=20, deadline=None)
@given(table=tables())
def test_raw_ids(table: tuple[str, list[dict[str, Any]]]) -> None:
    kind, rows = table
    with TemporaryDirectory() as folder:
        convert_table(frame_of(kind, rows), Path(folder) / "out", schema("raw", 2))
        found = shards(Path(folder) / "out")
        item = read_manifest(Path(folder) / "out").features[0]

    def raw(value: Any) -> int:
        if missing(value):
            return item.missing_id
        if isinstance(value, str):
            return int(rse.string_ids(value))
        if isinstance(value, dt.date):
            return value.toordinal() - dt.date(1970, 1, 1).toordinal()
        return int(np.array(int(value) & (2**64 - 1), np.uint64).view(np.int64))

    assert found["item"].to_list() == [raw(r["item"]) for r in rows]
    assert found["seen"].to_list() == [[raw(v) for v in (r["seen"] or [])[-3:] if not missing(v)] for r in rows]
    if kind == "string":
        assert item.missing_id == int(rse.string_ids(""))


def single(values: list[Any], dtype: Any, column: dict[str, Any], **split: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    """One column converted, all rows training: its shards and statistics."""
    frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype)})
    with TemporaryDirectory() as folder:
        convert_table(
            frame,
            Path(folder) / "out",
            {"columns": {"x": column}, "split": {"kind": "all", "only": "train", **split}},
        )
        return shards(Path(folder) / "out"), open_dataset(Path(folder) / "out").stats


@pytest.mark.parametrize("newest", ["last", "first"])
def test_the_newest_of_a_sequence_are_kept_oldest_first(newest: str) -> None:
    found, _ = single([[1, 2, 3], [3, 3], [1, 1]], pl.List(pl.Int32),
                      {"kind": "sequence", "max_length": 2, "min_count": 1, "newest": newest})  # fmt: skip
    # Counts of what is kept decide the ids: 3 and 1 before 2, or 1 and 3 before 2.
    values = {"last": [[2, 3], [3, 3], [1, 1]], "first": [[2, 1], [3, 3], [1, 1]]}[newest]
    ids, _ = vocabulary([v for some in values for v in some], 0, 1)
    assert found["x"].to_list() == [[ids[v] for v in some] for some in values]


def test_delimited_text_is_a_list() -> None:
    found, stats = single(["7|8| 7", "", None, "8||x"], pl.String, {"kind": "list", "separator": "|", "min_count": 1})
    assert found["x"].to_list() == [[1, 2, 1], [], [], [2, 3]]
    assert {k: v["train"] for k, v in stats["columns"]["x"].items()} == {
        "null": 1, "empty": 0, "values": 5, "left_out": 2, "unknown": 0,
    }  # fmt: skip


def test_pieces_of_text_share_a_vocabulary_of_integers(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item": [BIG, BIG + 1, BIG], "seen": [f"{BIG + 1},{BIG}", None, "5"]})
    columns = {
        "item": {"kind": "categorical", "vocab": "item", "min_count": 1},
        "seen": {"kind": "sequence", "separator": ",", "values": "integer", "vocab": "item", "min_count": 1},
    }
    convert_table(frame, tmp_path / "out", {"columns": columns, "split": {"kind": "all", "only": "train"}})
    found = shards(tmp_path / "out")
    assert found["item"].to_list() == [1, 2, 1]
    assert found["seen"].to_list() == [[2, 1], [], [3]]


def test_a_vocabulary_has_a_cap() -> None:
    found, stats = single(["a"] * 3 + ["b"] * 2 + ["c"], pl.String, {"kind": "categorical", "max_size": 1})
    assert found["x"].to_list() == [1, 1, 1, 0, 0, 0]
    assert (stats["fields"]["x"]["distinct"], stats["fields"]["x"]["num_embeddings"]) == (3, 2)


@given(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(2, 7))
@settings(max_examples=20, deadline=None)
def test_quantile_buckets(values: list[float | None], buckets: int) -> None:
    found, _ = single(values, pl.Float64, {"kind": "numeric", "buckets": buckets})
    known = sorted(v for v in values if v is not None)
    edges = sorted({known[len(known) * i // buckets] for i in range(1, buckets)} - set(known[:1])) if known else []
    assert found["x"].to_list() == [0 if v is None else 1 + sum(e <= v for e in edges) for v in values]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"fill": "mean"}, [1.0, 13 / 3, 2.0, 10.0]),
        ({"fill": "median"}, [1.0, 2.0, 2.0, 10.0]),
        ({"fill": -1.0, "clip": [1.5, 5]}, [1.5, -1.0, 2.0, 5.0]),
        ({"standardise": True}, [(x - 13 / 3) / np.std([1, 2, 10]) for x in (1, 13 / 3, 2, 10)]),
    ],
)
def test_steps_of_numbers(settings: dict[str, Any], wanted: list[float]) -> None:
    found, _ = single([1, None, 2, 10], pl.Int64, {"kind": "numeric", **settings})
    np.testing.assert_allclose(found["x"].to_numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("array", [True, False])
def test_vectors_are_numeric_columns(tmp_path: Path, array: bool) -> None:
    values = [[1.0, 2.0], None, [3.0, -4.0], [0.5, 0.25]]
    dtype: Any = pl.Array(pl.Float64, 2) if array else pl.List(pl.Float64)
    frame = pl.DataFrame({"v": pl.Series(values, dtype=dtype), "n": [1, 2, 3, 4], "y": [0, 1, 1, 0]})
    convert_table(
        frame,
        tmp_path / "out",
        {
            "columns": {"v": {"kind": "vector"}, "n": {"kind": "numeric"}, "y": {"kind": "label"}},
            "split": {"kind": "all", "only": "train"},
        },
    )
    data = open_dataset(tmp_path / "out")
    assert data.manifest.dense == ("n", "v[0]", "v[1]")
    assert data.read("train", 0, 4).dense.tolist() == [[i + 1, *(v or [0.0, 0.0])] for i, v in enumerate(values)]
    for memory in (1 << 30, 1):  # in memory, and streamed
        opened = open_dataset(tmp_path / "out", memory_limit=memory)
        for batch in opened.batches("train", 3, shuffle=True, seed=1):
            own = [values[int(n) - 1] or [0.0, 0.0] for n in batch.dense[:, 0]]
            assert {name: v.tolist() for name, v in batch.vectors.items()} == {"v": own}
            assert batch.vectors["v"].untyped_storage().data_ptr() == batch.dense.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda t: pl.Series([dt.datetime.fromtimestamp(s, dt.UTC).replace(tzinfo=None) for s in t]),
        lambda t: pl.Series(t, dtype=pl.Int64),
        lambda t: pl.Series([float(s) for s in t]),
        lambda t: pl.Series([dt.datetime.fromtimestamp(s, dt.UTC).isoformat() for s in t]),
        lambda t: pl.Series([dt.datetime.fromtimestamp(s, dt.UTC).strftime("%Y-%m-%d %H:%M:%S") for s in t]),
        lambda t: pl.Series([dt.datetime.fromtimestamp(s, dt.UTC) for s in t], dtype=pl.Datetime("ns", "Asia/Tokyo")),
    ],
)
def test_times(tmp_path: Path, make: Callable[[list[int]], pl.Series]) -> None:
    seconds = [1_700_000_000, -86_401, 1_709_200_861, 0]
    columns = {"t": {"kind": "time", "parts": ["hour", "weekday", "day", "month", "age"], "time_zone": "Europe/Berlin"}}
    frame = pl.DataFrame({"t": make(seconds), "y": [0, 1, 0, 1]})
    convert_table(
        frame,
        tmp_path / "out",
        {"columns": {**columns, "y": {"kind": "label"}}, "split": {"kind": "all", "only": "train"}},
    )
    from zoneinfo import ZoneInfo

    local = [dt.datetime.fromtimestamp(s, ZoneInfo("Europe/Berlin")) for s in seconds]
    batch = open_dataset(tmp_path / "out").read("train", 0, 4)
    wanted = [
        [w.hour + w.minute / 60 + w.second / 3600, w.isoweekday(), w.day, w.month, (max(seconds) - s) / 86_400]
        for w, s in zip(local, seconds, strict=True)
    ]
    np.testing.assert_allclose(batch.dense.numpy(), wanted, rtol=1e-6)
    assert batch.extra["time"].tolist() == seconds


@pytest.mark.parametrize(
    ("values", "column", "wanted"),
    [
        ([1, 0, 1], {}, [1, 0, 1]),
        ([True, False, True], {}, [1, 0, 1]),
        (["yes", "No", "true"], {}, [1, 0, 1]),
        ([5, 3, 4], {"threshold": 4}, [1, 0, 1]),
        (["buy", "view", "buy"], {"positive": "buy"}, [1, 0, 1]),
        ([0.5, -2.0, 7.0], {"task": "real"}, [0.5, -2.0, 7.0]),
    ],
)
def test_labels(tmp_path: Path, values: list[Any], column: dict[str, Any], wanted: list[float]) -> None:
    schema = {
        "columns": {"y": {"kind": "label", **column}, "n": {"kind": "numeric", "column": "y2"}},
        "split": {"kind": "all", "only": "train"},
    }
    convert_table(pl.DataFrame({"y": values, "y2": [1, 2, 3]}), tmp_path / "out", schema)
    data = open_dataset(tmp_path / "out")
    assert data.read("train", 0, 3).label.tolist() == wanted
    clicks = data.manifest.splits["train"].positives
    assert clicks == (None if column.get("task") == "real" else 2)


def test_counts_of_ids_are_those_of_the_training_rows(tmp_path: Path) -> None:
    values = ["a", "a", "a", "b", "b", "c", None, None, "", "a"]
    frame = pl.DataFrame({"x": values, "y": [0, 1] * 5})
    schema = TableSchema.of(label="y", categorical="x", split={"kind": "order", "valid": 0, "test": 0.1})
    convert_table(frame, tmp_path / "out", schema)
    data = open_dataset(tmp_path / "out")
    ids = data.read("train", 0, 9).ids[:, 0]
    counts = data.counts("x")
    assert counts is not None
    assert counts.tolist() == ids.bincount(minlength=len(counts)).tolist() == [1, 3, 3, 2]
    assert data.vocabulary("x").values.to_list() == ["a", "b"]
