"""Text, which is read once and kept as Arrow files meanwhile, gives the folder that Parquet gives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys_embed.data import TableSchema, convert_table, open_dataset
from recsys_embed.data.table.rows import TableOptions
from recsys_embed.errors import DataError

SCHEMA = TableSchema.from_dict(
    {
        "columns": {
            "click": {"kind": "label"},
            "user": {"kind": "categorical"},
            "item": {"kind": "categorical", "vocab": "item"},
            "seen": {"kind": "sequence", "vocab": "item", "separator": "|", "values": "integer"},
            "price": {"kind": "numeric"},
        },
        "split": {"kind": "last", "column": "user"},
    }
)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableOptions, "part_rows", lambda self, row_bytes: 40)


def events(rows: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "click": rng.integers(0, 2, rows),
            "user": [f"u{i}" for i in rng.integers(0, rows // 8, rows)],
            "item": rng.integers(2**53, 2**53 + 50, rows),
            "seen": ["|".join(map(str, rng.integers(2**53, 2**53 + 60, k))) for k in rng.integers(1, 5, rows)],
            "price": [None if x < 0.2 else float(x) for x in rng.random(rows)],
        }
    )


def test_csv_and_parquet_are_the_same_table(tmp_path: Path) -> None:
    frame = events(150)
    frame.head(90).write_csv(tmp_path / "a.csv")
    frame.slice(90).write_csv(tmp_path / "b.csv")
    frame.write_parquet(tmp_path / "a.parquet")
    convert_table(tmp_path / "*.csv", tmp_path / "text", SCHEMA)
    convert_table(tmp_path / "a.parquet", tmp_path / "parquet", SCHEMA)
    text, parquet = open_dataset(tmp_path / "text"), open_dataset(tmp_path / "parquet")
    assert text.manifest.columns == parquet.manifest.columns
    for split in parquet.splits:
        of = [pl.concat([pl.read_parquet(d.path / s.file) for s in d.manifest.splits[split].shards])
              for d in (text, parquet)]  # fmt: skip
        assert of[0].equals(of[1])


def test_bad_rows_of_the_reader_and_of_the_columns(tmp_path: Path) -> None:
    lines = events(60).write_csv().splitlines()
    lines[10] = lines[10].replace("u", '"u"', 1) + ",one,too,many"
    lines[20] = "7" + lines[20][1:]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"2 faults(.|\n)*a\.csv, line 11(.|\n)*a\.csv, line 21, column click"):
        convert_table(tmp_path / "a.csv", tmp_path / "out", SCHEMA)
    report = convert_table(tmp_path / "a.csv", tmp_path / "out", SCHEMA, on_bad_row="quarantine")
    assert (sum(report.rows.values()), report.quarantined) == (58, 2)
    rows = [json.loads(x)["row"] for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert rows == [10, 20]


def test_text_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = events(150).write_csv().splitlines()
    lines[50] = "broken"
    lines[100] = "9" + lines[100][1:]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")

    def convert(out: Path) -> int:
        return convert_table(tmp_path / "a.csv", out, SCHEMA, on_bad_row="quarantine", workers=1).quarantined

    def contents(folder: Path) -> dict[str, bytes]:
        files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    assert convert(tmp_path / "whole") == 2
    real, left, stops = os.replace, 0, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(200):
        left = 6
        try:
            convert(tmp_path / "out")
            break
        except Killed:
            stops += 1
    assert stops > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
