"""Tables from Parquet files and from memory are the same table."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys_embed.data import TableSchema, convert_table, open_dataset
from recsys_embed.data.sources import open_source
from recsys_embed.data.sources import parquet as parquet_source
from recsys_embed.data.sources.base import joint_type
from recsys_embed.data.sources.parquet import ParquetFiles
from recsys_embed.data.sources.parquet_footer import column_bytes
from recsys_embed.data.table import rows as rows_module
from recsys_embed.data.table.rows import TableOptions
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


def test_bytes_of_row_groups_are_those_that_pyarrow_tells(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    frame = FRAME.with_columns(seen=pl.Series([[1, 2], [], None] * 2), ts=pl.from_epoch(pl.lit(7))).sample(
        20_000, with_replacement=True, seed=0
    )
    frame.write_parquet(tmp_path / "polars.parquet", row_group_size=1024)
    parquet.write_table(frame.to_arrow(), tmp_path / "arrow.parquet", row_group_size=999, compression="snappy")
    for name in ("polars", "arrow"):
        path = tmp_path / f"{name}.parquet"
        about = parquet.ParquetFile(path).metadata
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        wanted = [
            {(c := g.column(i)).path_in_schema.split(".")[0]: c.total_compressed_size for i in range(g.num_columns)}
            for g in groups
        ]
        assert column_bytes(path) == wanted
        assert len(wanted) > 15


@pytest.mark.parametrize(
    "footer",
    [
        b"\x1c" * 5000,  # structs within structs
        b"\x16" + b"\xff" * (1 << 20) + b"\x00",  # an integer without an end
        b"\x49\x1c\x19\x1c\x3c\x39\x15\x02\x49\x02\x00\x00\x00\x00",  # a name that is a number
        b"\x49\xfc\xff\xff\xff\xff\x0f",  # more row groups than bytes
    ],
)
def test_damaged_footers_are_told(footer: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="footer cannot be read"):
        column_bytes(path)


def number(n: int) -> bytes:
    """An integer of two bytes as footers have it."""
    return bytes([2 * n & 127 | 128, 2 * n >> 7])


def test_footers_that_lie_about_rows_are_told(tmp_path: Path) -> None:
    """Polars panics where their numbers contradict each other."""
    path, rows = tmp_path / "a.parquet", list(range(200))
    pl.DataFrame({"n": rows}).write_parquet(path, row_group_size=100, statistics=False)
    whole = path.read_bytes()
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    outcomes = []
    for told, other in ((200, 201), (200, 400), (100, 99), (100, 101), (100, 64), (100, 200)):
        places = [i for i in range(end, len(whole) - 8) if whole[i : i + 2] == number(told)]
        assert places
        for at in places:
            path.write_bytes(whole[:at] + number(other) + whole[at + 2 :])
            try:
                got = [n for c in open_source(path).chunks(0, 0, 70) for n in c.frame["n"].to_list()]
            except DataError as e:
                outcomes.append(str(e).startswith(f"{path}: cannot be read"))
            else:
                assert got == rows
    assert outcomes
    assert all(outcomes)
    at = whole.index(number(200), end)
    path.write_bytes(whole[:at] + number(150) + whole[at + 2 :])
    with pytest.raises(ValueError, match="150 rows, of which the row groups hold 200"):
        column_bytes(path)


def test_row_groups_that_memory_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    frame = pl.DataFrame({"y": [0, 1] * 40_000, "n": np.random.default_rng(0).random(80_000)})
    frame.write_parquet(path, row_group_size=80_000)
    monkeypatch.setattr(parquet_source, "_SMALL", 0)
    held = sum(column_bytes(path)[0].values())
    monkeypatch.setattr(rows_module, "PROCESS", (512 << 20) - held + 1)
    schema = TableSchema.of(label="y", numeric="n", split={"kind": "all", "only": "train"})
    says = (
        r"a\.parquet: a row group holds .* of the columns that are read, for which --max-memory 512.00 MiB has no room"
    )
    with pytest.raises(ConfigError, match=says):
        convert_table(path, tmp_path / "out", schema, max_memory=512 << 20)
    small = tmp_path / "b.parquet"
    frame.write_parquet(small, row_group_size=8_000)
    of_one = max(group["n"] for group in column_bytes(small))
    options = TableOptions(max_memory=512 << 20, workers=16)
    assert options.readers(ParquetFiles([small]), ["n"]) == (held - 1) // 2 // of_one == 4
    made = convert_table(small, tmp_path / "out", schema, max_memory=512 << 20)
    assert made.rows == {"train": 80_000}
