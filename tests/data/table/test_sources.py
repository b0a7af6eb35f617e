"""Tables from Parquet files and from memory are the same table."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_embed.data import TableSchema, convert_table, open_dataset
from recsys_embed.data.sources import open_source
from recsys_embed.data.sources.base import joint_type
from recsys_embed.errors import ConfigError, DataError

FRAME = pl.DataFrame(
    {"y": [0, 1, 1, 0, 1, 0], "item": ["a", None, "b", "a", "", "a"], "n": [1.0, None, 2.5, 0.0, -1.0, 7.0]}
)
SCHEMA = TableSchema.of(label="y", categorical="item", numeric="n")


class Arrow:
    """A table of a library that speaks Arrow."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.frame.__arrow_c_stream__(requested_schema)


def digest(table: Any, out: Path) -> str:
    convert_table(table, out, SCHEMA)
    return open_dataset(out).digest


def test_frames_and_files_are_the_same_table(tmp_path: Path) -> None:
    wanted = digest(FRAME, tmp_path / "frame")
    FRAME.write_parquet(tmp_path / "a.parquet")
    forms = [FRAME.lazy(), Arrow(FRAME), FRAME.to_dict(as_series=False), tmp_path / "a.parquet",
             str(tmp_path / "*.parquet"), [tmp_path / "a.parquet"]]  # fmt: skip
    assert [digest(form, tmp_path / f"out{i}") for i, form in enumerate(forms)] == [wanted] * len(forms)


def test_pandas_frame(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(FRAME.to_dict(as_series=False))
    assert digest(frame, tmp_path / "out") == digest(FRAME, tmp_path / "frame")


def test_numbers_of_other_widths_in_other_files(tmp_path: Path) -> None:
    FRAME.head(2).with_columns(pl.col("y").cast(pl.Int8), pl.col("n").cast(pl.Float32)).write_parquet(
        tmp_path / "1.parquet"
    )
    FRAME.slice(2).write_parquet(tmp_path / "2.parquet")
    source = open_source(tmp_path)
    assert source.types == {"y": pl.Int64, "item": pl.String, "n": pl.Float64}
    rows = pl.concat([chunk.frame for i in range(2) for chunk in source.chunks(i, 0, 3)])
    assert rows.equals(FRAME)


def test_files_of_other_columns_are_refused_together(tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "1.parquet")
    FRAME.drop("n").write_parquet(tmp_path / "2.parquet")
    FRAME.with_columns(pl.col("item").cast(pl.Binary)).write_parquet(tmp_path / "3.parquet")
    with pytest.raises(DataError, match=r"2 faults(.|\n)*lacks n(.|\n)*column 'item' is Binary"):
        convert_table(tmp_path, tmp_path / "out", SCHEMA)


def test_hive_partitions_are_columns(tmp_path: Path) -> None:
    for day, country, n in (("2024-01-02", "de", 2), ("2024-01-01", "__HIVE_DEFAULT_PARTITION__", 1), ("2024-01-10", "a%2Fb", 3)):  # noqa: E501  # fmt: skip
        folder = tmp_path / "in" / f"day={day}" / f"country={country}" / "k=07"
        folder.mkdir(parents=True)
        FRAME.head(n).write_parquet(folder / "x.parquet")
    source = open_source(tmp_path / "in")
    assert source.types == {**FRAME.schema, "day": pl.Date, "country": pl.String, "k": pl.String}
    rows = pl.concat([chunk.frame for i in range(3) for chunk in source.chunks(i, 0, 9, ["country", "day"])])
    assert rows.rows() == [(None, dt.date(2024, 1, 1))] + [("de", dt.date(2024, 1, 2))] * 2 + [("a/b", dt.date(2024, 1, 10))] * 3  # noqa: E501  # fmt: skip


def test_rows_from_any_number_on(tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "a.parquet", row_group_size=2)
    for source in (open_source(tmp_path), open_source(FRAME)):
        for start in range(7):
            chunks = list(source.chunks(0, start, 4, ["n"]))
            assert [c.first for c in chunks] == list(range(start, 6, 4))
            assert [x for c in chunks for x in c.frame["n"].to_list()] == FRAME["n"].to_list()[start:]


def test_inputs_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no reader knows this ending"):
        open_source(tmp_path / "a.doc")
    with pytest.raises(ConfigError, match=r"2 faults(.|\n)*no such file(.|\n)*holds no files that end in"):
        open_source([tmp_path / "gone.parquet", tmp_path / "empty"])
    with pytest.raises(ConfigError, match="the table must be paths"):
        open_source(7)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match="cannot be read"):
        convert_table(tmp_path / "b.parquet", tmp_path / "out", SCHEMA)


@pytest.mark.parametrize(
    ("a", "b", "both"),
    [
        (pl.Int8(), pl.UInt32(), pl.Int64()),
        (pl.Int64(), pl.UInt64(), None),
        (pl.String(), pl.Int8(), None),
        (pl.Null(), pl.String(), pl.String()),
        (pl.List(pl.Int8), pl.List(pl.Int64), pl.List(pl.Int64)),
    ],
)
def test_joint_types(a: pl.DataType, b: pl.DataType, both: pl.DataType | None) -> None:
    assert joint_type(a, b) == joint_type(b, a) == both
