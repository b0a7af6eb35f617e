"""Every split of a table puts the rows where plain Python does, also where parts and files cut them."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_embed.cli import main
from recsys_embed.data import TableSchema, TableSplit, convert_table, open_dataset
from recsys_embed.data.table.rows import TableOptions
from recsys_embed.errors import ConfigError, DataError

ROWS = 211


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableOptions, "part_rows", lambda self, row_bytes: 17)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rng = random.Random(5)
    return [
        {
            "row": i,
            "click": rng.randrange(2),
            "user": rng.choice([None, *"abcdefghij"]) if i < 200 else f"new{i}",
            "ts": rng.choice([rng.randrange(50), 1_700_000_000 + rng.randrange(10**9), -5]),
            "part": rng.choice(["train", "valid", "test"]),
        }
        for i in range(ROWS)
    ]


def found(folder: Path) -> dict[int, str]:
    """The split of every row."""
    data = open_dataset(folder)
    return {int(r): name for name, n in data.splits.items() for r in data.read(name, 0, n).dense[:, 0]}


def converted(rows: list[dict[str, Any]], folder: Path, split: dict[str, Any], **columns: Any) -> dict[int, str]:
    frame = pl.DataFrame(rows)
    # Two files, so that the numbers of rows go on over their ends.
    frame.head(100).write_parquet(folder / "a.parquet")
    frame.slice(100).write_parquet(folder / "b.parquet")
    known = {"click": {"kind": "label"}, "row": {"kind": "numeric"}, "ts": {"kind": "time", "parts": []}, **columns}
    convert_table(folder / "*.parquet", folder / "out", TableSchema.from_dict({"columns": known, "split": split}))
    return found(folder / "out")


def shares(order: list[int], n: int) -> dict[int, str]:
    test, valid = int(n / 6 + 0.5), int(n / 10 + 0.5)
    return {r: "test" if i >= n - test else "valid" if i >= n - test - valid else "train" for i, r in enumerate(order)}


def test_order(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert converted(rows, tmp_path, {"kind": "order"}) == shares(list(range(ROWS)), ROWS)


def test_time_keeps_equal_times_together(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    times = sorted(r["ts"] for r in rows)
    test, valid = int(ROWS / 6 + 0.5), int(ROWS * (1 / 6 + 1 / 10) + 0.5)
    first_test, first_valid = times[ROWS - test], times[ROWS - valid]
    wanted = {
        r["row"]: "test" if r["ts"] >= first_test else "valid" if r["ts"] >= first_valid else "train" for r in rows
    }
    assert converted(rows, tmp_path, {"kind": "time"}) == wanted


def test_time_by_dates(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    split = {"kind": "time", "valid_from": "1970-01-01T00:00:20", "test_from": "2024-01-01"}
    wanted = {r["row"]: "test" if r["ts"] >= 1_704_067_200 else "valid" if r["ts"] >= 20 else "train" for r in rows}
    assert converted(rows, tmp_path, split) == wanted


def test_column(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert converted(rows, tmp_path, {"kind": "column", "column": "part"}) == {r["row"]: r["part"] for r in rows}


def test_column_of_other_values(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    split = {"kind": "column", "column": "click", "values": {"train": [0], "test": 1}}
    assert converted(rows, tmp_path, split) == {r["row"]: "test" if r["click"] else "train" for r in rows}


@pytest.mark.parametrize("timed", [True, False])
def test_last_of_each_user(rows: list[dict[str, Any]], tmp_path: Path, timed: bool) -> None:
    columns = {} if timed else {"ts": {"kind": "numeric"}}
    of_user = defaultdict(list)
    for r in rows:
        if r["user"] is not None:
            of_user[r["user"]].append(((r["ts"] if timed else 0, r["row"]), r["row"]))
    wanted = {r["row"]: "train" for r in rows}
    for times in of_user.values():
        times.sort()
        if len(times) >= 3:
            wanted[times[-1][1]], wanted[times[-2][1]] = "test", "valid"
    assert converted(rows, tmp_path, {"kind": "last", "column": "user"}, **columns) == wanted


def test_file_and_random(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    by_file = converted(rows, tmp_path, {"kind": "file", "test_files": ["b*"]})
    assert by_file == {r["row"]: "train" if r["row"] < 100 else "test" for r in rows}
    (tmp_path / "other").mkdir()
    by_seed = converted(rows, tmp_path / "other", {"kind": "random", "seed": 3})
    codes = TableSplit("random", seed=3).rule
    assert codes is not None
    import numpy as np

    wanted = [("train", "valid", "test")[c] for c in codes.codes(ROWS, np.arange(ROWS), 0)]
    assert [by_seed[i] for i in range(ROWS)] == wanted


def test_only_training_rows_teach(tmp_path: Path) -> None:
    """A value, a number and a time of the test rows alone change nothing that was learned."""
    frame = pl.DataFrame({"click": [0, 1, 0, 1], "item": ["a", "a", "b", "b"], "price": [1.0, 3.0, 100.0, None],
                          "part": ["train", "train", "test", "valid"]})  # fmt: skip
    split = {"kind": "column", "column": "part"}
    schema = TableSchema.of(label="click", categorical="item", numeric="price", split=split)
    convert_table(frame, tmp_path / "out", schema)
    data = open_dataset(tmp_path / "out")
    assert data.vocabulary("item").values.to_list() == ["a"]
    assert data.read("valid", 0, 1).dense.tolist() == [[2.0]]
    assert data.read("test", 0, 1).ids.tolist() == [[0]]
    assert data.stats["fields"]["item"]["oov_rate"] == {"train": 0.0, "valid": 1.0, "test": 1.0}


def test_splits_that_cannot_be(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves no rows to train on; it gave test 211"):
        converted(rows, tmp_path, {"kind": "time", "test_from": "1950-01-01"}, user={"kind": "categorical"})
    with pytest.raises(ConfigError, match=r"2 faults in split:(.|\n)*needs `column`(.|\n)*`valid_from` needs"):
        TableSplit("last", valid_from="2024-01-01")
    with pytest.raises(ConfigError, match="split 'time' needs a column of kind time"):
        TableSchema.of(label="click", split={"kind": "time"})
    with pytest.raises(DataError, match=r"a\.parquet, row \d+, column user: the split's column does not hold"):
        converted(rows, tmp_path, {"kind": "column", "column": "user"})


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("order", "only", "train"),
        ("time", "seed", 3),
        ("last", "valid", 0.2),
        ("file", "test", 0.2),
        ("all", "seed", 1),
    ],
)
def test_settings_that_a_split_does_not_have_are_refused(kind: str, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"`{setting}` is of split .*; got split '{kind}'"):
        TableSplit.from_dict({"kind": kind, setting: value})


@pytest.mark.parametrize("command", ["data criteo", "data table"])
def test_options_that_a_split_does_not_have_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("label,item\n1,2\n")
    columns = ["--label", "label", "--categorical", "item"] if command == "data table" else []
    assert main([*command.split(), str(tmp_path / "in.csv"), str(tmp_path / "out"), *columns, "--only", "valid"]) == 2
    assert "`only` is of split 'all'; got split 'order'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
