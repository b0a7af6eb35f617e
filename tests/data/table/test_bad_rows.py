"""Values that cannot be used: file, row, column and reason; they stop the conversion or are set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_embed.data import convert_table, open_dataset
from recsys_embed.data.columns.base import Fault
from recsys_embed.data.sources import BadRow, Chunk, open_source
from recsys_embed.data.sources.bad_rows import bad_row_line, find_bad_rows, row_numbers
from recsys_embed.data.sources.joined import Joined, Side
from recsys_embed.data.table.rows import TableOptions
from recsys_embed.errors import DataError

NAN, INF = float("nan"), float("inf")


def convert(frame: Any, out: Path, column: dict[str, Any], mode: str = "fail") -> Any:
    columns = {"x": column} if column["kind"] == "label" else {"x": column, "y": {"kind": "label"}}
    return convert_table(frame, out, {"columns": columns, "split": {"kind": "all", "only": "train"}}, on_bad_row=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "dtype", "column", "reason"),
    [
        ([1, None], pl.Int8, {"kind": "label"}, "the label is missing; got None"),
        ([1.0, NAN], pl.Float64, {"kind": "label"}, "the label is missing; got nan"),
        ([1, 2], pl.Int8, {"kind": "label"}, "the label is not 0 or 1: give `threshold` or `positive`.*; got 2"),
        (["yes", "maybe"], pl.String, {"kind": "label"}, "the label is not 0 or 1.*; got maybe"),
        ([1.0, INF], pl.Float64, {"kind": "label", "task": "real"}, "the label is not a finite number; got inf"),
        ([1.0, None], pl.Float64, {"kind": "weight"}, "the weight is missing"),
        ([1.0, -1.0], pl.Float64, {"kind": "weight"}, "the weight is not in"),
        ([1.0, -INF], pl.Float64, {"kind": "numeric"}, "infinite, or too large"),
        ([1.0, 1e300], pl.Float64, {"kind": "numeric"}, "too large for a 32-bit float"),
        ([1.0, 1.5], pl.Float64, {"kind": "categorical"}, "not a whole number"),
        ([1.0, 2.0**60], pl.Float64, {"kind": "categorical"}, "not a whole number up to 2"),
        ([[1.0], [2.0, 0.5]], pl.List(pl.Float64), {"kind": "list"}, "a value is not a whole number"),
        ([1, -(2**63)], pl.Int64, {"kind": "categorical", "ids": "raw"}, "is the id of the missing value"),
        ([[1], [7, -(2**63)]], pl.List(pl.Int64), {"kind": "list", "ids": "raw"}, "is the id of the missing value"),
        (["1,2", "1,b"], pl.String, {"kind": "list", "separator": ",", "values": "integer"}, "is no integer"),
        ([[1.0, 2.0], [1.0]], pl.List(pl.Float64), {"kind": "vector"}, "expected 2 components"),
        ([[1.0, 2.0], [1.0, None]], pl.List(pl.Float64), {"kind": "vector"}, "a component is null, NaN or infinite"),
        ([[1.0, 2.0], [NAN, 1.0]], pl.List(pl.Float64), {"kind": "vector"}, "a component is null, NaN or infinite"),
        ([5, None], pl.Int64, {"kind": "time"}, "the event time is missing"),
        (
            ["2024-01-01", "soon"],
            pl.String,
            {"kind": "time"},
            "no time as ISO 8601 has it, such as .*; a schema's `format` names another way; got soon",
        ),
        (["2024-01-01", "01/02/2024"], pl.String, {"kind": "time", "format": "%Y-%m-%d"}, "no time of format"),
        ([1.0, NAN], pl.Float64, {"kind": "time"}, "no time in s since 1970.*; got nan"),
        ([1, 1_700_000_000_000], pl.Int64, {"kind": "time"}, "no time in s since 1970, .*name its `unit`"),
        ([1.0, 1.7e18], pl.Float64, {"kind": "time", "event": False}, "no time in s since 1970, .*name its `unit`"),
        ([None, []], pl.List(pl.Float64), {"kind": "vector"}, "it has no components"),
    ],
)
def test_reasons(tmp_path: Path, values: list[Any], dtype: Any, column: dict[str, Any], reason: str) -> None:
    frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype), "y": [0, 1]})
    with pytest.raises(DataError, match=f"the frame, row 2, column x: .*{reason}"):
        convert(frame, tmp_path / "out", column)
    report = convert(frame, tmp_path / "out", column, "quarantine")
    assert (report.rows, report.quarantined) == ({"train": 1}, 1)
    record = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert (record["file"], record["row"], record["column"]) == ("the frame", 2, "x")


def test_rows_are_named_by_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableOptions, "part_rows", lambda self, row_bytes: 10)
    labels = [[0, 1] * 12, [1, 0] * 12]
    labels[1][5] = labels[1][17] = 7
    for name, some in zip("ab", labels, strict=True):
        pl.DataFrame({"x": some, "n": range(24)}).write_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, row 6, column x: the label is not 0 or 1"):
        convert_table(tmp_path / "*.parquet", tmp_path / "out", {"columns": {"x": {"kind": "label"}}})
    schema = {"columns": {"x": {"kind": "label"}, "n": {"kind": "numeric"}}, "split": {"kind": "all", "only": "train"}}
    report = convert_table(tmp_path / "*.parquet", tmp_path / "out", schema, on_bad_row="quarantine")
    assert report.quarantined == 2
    lines = [json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(Path(x["file"]).name, x["row"], x["raw"]) for x in lines] == [
        ("b.parquet", 6, "7"),
        ("b.parquet", 18, "7"),
    ]
    data = open_dataset(tmp_path / "out")
    kept = data.read("train", 0, 46)
    assert kept.dense[:, 0].tolist() == [*range(24), *(i for i in range(24) if i not in (5, 17))]
    assert (data.manifest.rows_read, data.manifest.quarantined) == (48, 2)


def test_rows_that_the_reader_left_out_count() -> None:
    gone = [*range(0, 4000, 2), 4001]
    kept = [n for n in range(7, 6000) if n not in gone]
    chunk = Chunk(0, 7, pl.DataFrame({"x": kept}), tuple(BadRow(0, n, "", "", "") for n in gone if n >= 7))
    assert row_numbers(chunk).tolist() == kept
    good, bad = find_bad_rows(chunk, [("x", Fault(chunk.frame["x"] % 5 == 0, "of five"))])
    assert [r.row for r in bad] == sorted([n for n in gone if n >= 7] + [n for n in kept if n % 5 == 0])
    assert all(r.row == int(r.raw) for r in bad if r.reason)
    assert good.sum() == len(kept) - sum(n % 5 == 0 for n in kept)


def test_the_quarantine_of_joined_files_tells_lines(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("item,x\n1,0\n2,7\n")
    side = Side("items", pl.DataFrame({"item": [1, 2], "genre": ["a", "b"]}), "item")
    joined = Joined(open_source(tmp_path / "events.csv"), [side])
    assert joined.place(0, 1).endswith("line 3")
    assert json.loads(bad_row_line(joined, BadRow(0, 1, "x", "", "7")))["line"] == 3


def test_many_faults_are_told_in_short(tmp_path: Path) -> None:
    with pytest.raises(DataError) as e:
        convert(pl.DataFrame({"x": [3] * 9}), tmp_path / "out", {"kind": "label"})
    assert str(e.value).startswith("9 faults in the data:\n  - the frame, row 1, column x")
    assert "and 4 more in this part" in str(e.value)
    with pytest.raises(DataError, match="no row could be read"):
        convert(pl.DataFrame({"x": [3] * 9}), tmp_path / "out", {"kind": "label"}, "quarantine")
