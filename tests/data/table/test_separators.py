"""Lists of a folder that was taught by text are taken as lists, and those taught by lists from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_embed.cli import main
from recsys_embed.data import convert_table, open_dataset
from recsys_embed.errors import ConfigError, DataError

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
    other = frame(ROWS["string"] if values == "integer" else [[True]] * 5)
    with pytest.raises(ConfigError, match=f"holds {values} values; the column holds List.*cast its values"):
        convert_table(other, tmp_path / "wrong", like=tmp_path / "old")


def test_files_of_two_formats_name_the_way_out(tmp_path: Path) -> None:
    frame(ROWS["string"], "|").write_csv(tmp_path / "a.csv")
    frame(ROWS["string"]).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"a\.csv and .*b\.parquet: give those of one format alone, or write all"):
        convert_table(str(tmp_path / "*"), tmp_path / "out", schema("list", separator="|"))


@pytest.mark.parametrize("values", ["string", "integer"])
def test_text_where_lists_were_learned(tmp_path: Path, values: str, capsys: pytest.CaptureFixture[str]) -> None:
    convert_table(frame(ROWS[values]), tmp_path / "old", schema("list"))
    path = tmp_path / "new.csv"
    frame(ROWS[values], ";").write_csv(path)
    like = ["data", "table", str(path), str(tmp_path / "new"), "--like", str(tmp_path / "old")]
    assert main(like) == 2
    assert "--source lists.tags='|'" in capsys.readouterr().err
    assert main([*like, "--source", "lists.tags=;"]) == 0
    assert ids(tmp_path / "new", "test") == ids(tmp_path / "old", "train")


def test_text_with_another_separator_than_was_learned(tmp_path: Path) -> None:
    # Values that look like integers were learned as strings.
    rows: list[list[Any] | None] = [["1", "2"], ["2"], None, ["1", "3", "2"], []]
    convert_table(frame(rows, "|"), tmp_path / "old", schema("list", separator="|"))
    frame(rows, ";").write_csv(tmp_path / "new.csv")
    convert_table(tmp_path / "new.csv", tmp_path / "new", like=tmp_path / "old", options={"lists": {"tags": ";"}})
    assert ids(tmp_path / "new", "test") == ids(tmp_path / "old", "train")


def test_lists_of_a_schema(tmp_path: Path) -> None:
    lines = ["click,user,tags", "0,u,1|2", "1,v,", "0,u,2|x", "1,v, 2 | 1 "]
    (tmp_path / "t.csv").write_text("\n".join([*lines, ""]))
    made = {**schema("list"), "source": {"lists": {"tags": "|"}, "types": {"tags": "integer"}}}
    with pytest.raises(DataError, match=r"line 4, column tags: .* as `types` says; got 2\|x"):
        convert_table(tmp_path / "t.csv", tmp_path / "out", made)
    assert convert_table(tmp_path / "t.csv", tmp_path / "out", made, on_bad_row="quarantine").quarantined == 1
    assert [len(row) for row in ids(tmp_path / "out", "train")] == [2, 0, 2]
    with pytest.raises(ConfigError, match="`lists` names 'tag', which is no column"):
        convert_table(tmp_path / "t.csv", tmp_path / "no", {**schema("list"), "source": {"lists": {"tag": "|"}}})
