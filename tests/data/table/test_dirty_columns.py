"""Columns of text that hold a few values of another kind: bad rows, told and set aside, not another kind of column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_embed.cli import main
from recsys_embed.data import TableSchema, convert_table, open_dataset
from recsys_embed.errors import ConfigError, DataError

GOOD = [3, 1, 4, 1, 5, 9]


def write(path: Path, name: str, cells: list[Any], labels: list[Any] | None = None) -> Path:
    """A table of a label, an item and a column."""
    labels = labels or [0, 1] * 4
    if path.suffix == ".csv":
        rows = [f"{label},{'ab'[i % 2]},{cell}" for i, (label, cell) in enumerate(zip(labels, cells, strict=False))]
        path.write_text("\n".join([f"click,item,{name}", *rows, ""]))
    else:
        rows = [
            {"click": label, "item": "ab"[i % 2], name: cell}
            for i, (label, cell) in enumerate(zip(labels, cells, strict=False))
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def column_of(out: Path, part: str) -> list[float]:
    shards = open_dataset(out).manifest.splits["train"].shards
    return pl.concat([pl.read_parquet(out / s.file) for s in shards])[part].to_list()


@pytest.mark.parametrize(
    ("kind", "cells", "part"),
    [
        ("numeric", [2, "n/a", 4.5, 7], "x"),
        ("numeric", [2, 4, "n/a", 7], "x"),
        ("weight", [2, 4, 0.5, "?"], "weight"),
        ("time", [1_700_000_000, 1_700_000_009, 1_700_000_003, "oops"], "time"),
    ],
)
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_cell_that_is_no_number_is_a_bad_row(
    tmp_path: Path, kind: str, cells: list[Any], part: str, ending: str
) -> None:
    path = write(tmp_path / f"t{ending}", "x", cells)
    schema = TableSchema.of(label="click", categorical="item", split={"kind": "all", "only": "train"}, **{kind: "x"})
    at = next(i for i, c in enumerate(cells) if isinstance(c, str))
    line = at + (2 if ending == ".csv" else 1)
    with pytest.raises(DataError, match=rf"line {line}, column x: not .* as the schema has it.*; got") as error:
        convert_table(path, tmp_path / "out", schema)
    assert ('`nulls = ["' in str(error.value)) == (ending == ".csv")
    report = convert_table(path, tmp_path / "out", schema, on_bad_row="quarantine")
    assert report.quarantined == 1
    told = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert (told["row"], told["line"], told["column"], told["raw"]) == (at + 1, line, "x", cells[at])
    assert column_of(tmp_path / "out", part) == [c for c in cells if not isinstance(c, str)]


def test_real_and_binary_labels_with_a_dirty_cell(tmp_path: Path) -> None:
    for name, setting in (("real", {"task": "real"}), ("binary", {})):
        path = write(tmp_path / f"{name}.csv", "x", GOOD, ["1.0", "0.0", "n/a", "1.0", "0.0", "1.0"])
        columns = {"click": {"kind": "label", **setting}, "item": {"kind": "categorical"}}
        schema = TableSchema.from_dict({"columns": columns, "split": {"kind": "all", "only": "train"}})
        assert convert_table(path, tmp_path / name, schema, on_bad_row="quarantine").quarantined == 1
        assert column_of(tmp_path / name, "label") == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_files_of_which_one_is_dirty_and_rows_like_them(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "ts", [1_700_000_000 + i for i in range(8)])
    write(tmp_path / "b.csv", "ts", ["?", 1_700_000_100, "-"])
    schema = TableSchema.of(label="click", categorical="item", time="ts", split={"kind": "all", "only": "train"})
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    report = convert_table(files, tmp_path / "out", schema, on_bad_row="quarantine")
    assert (report.rows, report.quarantined) == ({"train": 9}, 2)
    write(tmp_path / "new.csv", "ts", ["?", 1_700_000_100, 1_700_000_101])
    report = convert_table(tmp_path / "new.csv", tmp_path / "new", like=tmp_path / "out", on_bad_row="quarantine")
    assert (report.rows, report.quarantined) == ({"test": 2}, 1)


def test_columns_without_any_number_are_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "x", ["red", "blue", "red"])
    with pytest.raises(ConfigError, match=r"column 'x' as numeric.*make it categorical.*types.x=float.*decimal"):
        convert_table(path, tmp_path / "out", TableSchema.of(label="click", categorical="item", numeric="x"))


def test_types_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "t.csv", "x", [1, 2, 3, "4.0", "n/a", "bad"]))
    table = ["data", "table", path, str(tmp_path / "out"), "--label", "click", "--categorical", "item,x"]
    source = ["--source", "types.x=float", "--source", "types.item=string", "--source", "nulls=n/a"]
    assert main([*table, *source]) == 2
    assert "line 7, column x: not a float, as `types` says; got bad" in capsys.readouterr().err
    assert main([*table, "--source", "types=x=float"]) == 2
    assert "--source types.price=float" in capsys.readouterr().err
    schema = tmp_path / "s.toml"
    schema.write_text('[columns.click]\nkind = "label"\n[columns.x]\nkind = "categorical"\n[split]\nkind = "all"\n'
                      'only = "train"\n[source.types]\nclick = "integer"\nx = "float"\n')  # fmt: skip
    joined = ["data", "table", path, str(tmp_path / "o"), "--schema", str(schema), "--source", "types.x=string"]
    assert main(joined) == 0
    assert open_dataset(tmp_path / "o").manifest.settings["schema"]["source"]["types"] == {
        "click": "integer",
        "x": "string",
    }


def test_the_command_line_gives_each_fault_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "t.csv", "x", [1, "a", 3, "b"]))
    assert main(["data", "table", path, str(tmp_path / "out"), "--label", "click", "--numeric", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("  - ") for line in lines] == [False, True, True, False]
    assert "quarantine" in lines[-1]
