"""Lists of a folder that was taught by text are taken as lists, and those taught by lists from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_embed.data import convert_table, open_dataset
from recsys_embed.errors import ConfigError

ROWS: dict[str, list[list[Any] | None]] = {
    "string": [["a", "b"], ["b"], None, ["a", "c", "b"], []],
    "integer": [[1, 2], [2], None, [1, 3, 2], []],
}


def frame(lists: list[list[Any] | None], separator: str | None = None) -> pl.DataFrame:
    cells: list[Any] = lists
    if separator is not None:
        cells = [None if not row else separator.join(map(str, row)) for row in lists]
    return pl.DataFrame({"click": [0, 1, 0, 1, 1], "user": ["u", "v", "u", "v", "u"], "tags": cells})


def ids(folder: Path, split: str) -> list[list[int]]:
    data = open_dataset(folder)
    shards = [pl.read_parquet(data.path / s.file) for s in data.manifest.splits[split].shards]
    return pl.concat(shards)["tags"].to_list()


def schema(kind: str, **settings: Any) -> dict[str, Any]:
    columns = {"click": {"kind": "label"}, "user": {"kind": "categorical"}, "tags": {"kind": kind, **settings}}
    return {"columns": columns, "split": {"kind": "all", "only": "train"}}


@pytest.mark.parametrize("kind", ["list", "sequence"])
@pytest.mark.parametrize("values", ["string", "integer"])
def test_lists_where_a_separator_was_learned(tmp_path: Path, kind: str, values: str) -> None:
    convert_table(frame(ROWS[values], "|"), tmp_path / "old", schema(kind, separator="|", values=values))
    convert_table(frame(ROWS[values]), tmp_path / "new", like=tmp_path / "old")
    assert ids(tmp_path / "new", "test") == ids(tmp_path / "old", "train")
    other = frame(ROWS["string" if values == "integer" else "integer"])
    with pytest.raises(ConfigError, match=f"holds {values} values; the column holds List.*cast its values"):
        convert_table(other, tmp_path / "wrong", like=tmp_path / "old")


def test_files_of_two_formats_name_the_way_out(tmp_path: Path) -> None:
    frame(ROWS["string"], "|").write_csv(tmp_path / "a.csv")
    frame(ROWS["string"]).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"a\.csv and .*b\.parquet: give those of one format alone, or write all"):
        convert_table(str(tmp_path / "*"), tmp_path / "out", schema("list", separator="|"))
