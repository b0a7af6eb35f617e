"""Tables in memory: polars frames, eager and lazy, pandas frames, and Arrow tables of any library."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl

from recsys_embed.data.folder import file_hash, write_file
from recsys_embed.data.sources.base import Chunk, Source, want_columns
from recsys_embed.data.sources.parquet import ParquetFiles
from recsys_embed.data.sources.python_values import frame_of_columns
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.utils.types import JSON

_ROWS = 1 << 16


class FrameSource(Source):
    """A polars frame.

    Args:
        frame: the rows.
        name: for messages.
        written: columns of texts that were given as numbers.

    >>> source = FrameSource(pl.DataFrame({"item": [7, 8, 9]}))
    >>> [chunk.frame["item"].to_list() for chunk in source.chunks(0, 0, 2)]
    [[7, 8], [9]]
    """

    def __init__(self, frame: pl.DataFrame, name: str = "the frame", written: Collection[str] = ()) -> None:
        self.frame, self.written = frame, frozenset(written)
        self.files = (name,)

    @cached_property
    def inputs(self) -> list[JSON]:
        digest = hashlib.sha256(repr(dict(self.frame.schema)).encode())
        # Columns of Python objects are no columns of a schema.
        frame = self.frame.select(n for n, dtype in self.frame.schema.items() if dtype != pl.Object)
        for at in range(0, len(frame), _ROWS):
            digest.update(_row_bytes(frame.slice(at, _ROWS)))
        return [{"frame": self.files[0], "rows": len(self.frame), "content": digest.hexdigest()}]

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        return self.frame.schema

    def length(self, file: int) -> int:
        return len(self.frame)

    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        wanted = want_columns(self, columns)
        for at in range(start, len(self.frame), rows):
            yield Chunk(file, at, self.frame.slice(at, rows).select(wanted))


def _row_bytes(frame: pl.DataFrame) -> bytes:
    """Bytes that change with the rows."""
    try:
        return frame.hash_rows(seed=0).to_numpy().tobytes()
    except pl.exceptions.PolarsError:
        # Lists have no hash in some versions of polars.
        found = BytesIO()
        frame.write_ipc(found)
        return found.getvalue()


class LazySource(Source):
    """A lazy polars frame: a query, whose rows may come in another order each time, so they are written down first."""

    def __init__(self, frame: pl.LazyFrame) -> None:
        self.frame = frame
        self.files = ("the lazy frame",)

    @property
    def inputs(self) -> list[JSON]:
        raise TypeError("a lazy frame has no identity before its rows are staged")

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        return self.frame.collect_schema()

    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        query = self.frame if columns is None else self.frame.select(columns)
        yield Chunk(file, start, query.slice(start, rows).collect())

    def stage(self, work: Path) -> Source:
        path = work / "query.parquet"
        write_file(path, self._write, durable=False)
        return StagedQuery(path)

    def _write(self, path: Path) -> None:
        try:
            self.frame.sink_parquet(path, compression="lz4", row_group_size=_ROWS)
        except pl.exceptions.PolarsError as e:
            if "os error" in str(e):
                raise
            raise DataError(f"the lazy frame cannot be computed ({str(e).splitlines()[0]})") from e


class StagedQuery(ParquetFiles):
    """The rows of a query, known by their content."""

    def __init__(self, path: Path) -> None:
        super().__init__([path])
        self.files = ("the lazy frame",)

    @cached_property
    def inputs(self) -> list[JSON]:
        return [{"frame": self.files[0], "rows": self.length(0), "content": file_hash(self.paths[0])}]


def frame_source(table: Any) -> Source | None:
    """A source over a table in memory; None where it is none.

    Raises:
        ConfigError: a pandas frame that polars cannot take over, with the columns.
    """
    if isinstance(table, pl.LazyFrame):
        return LazySource(table)
    if isinstance(table, pl.DataFrame):
        return FrameSource(table)
    if type(table).__module__.partition(".")[0] == "pandas":
        return FrameSource(_of_pandas(table))
    if isinstance(table, Mapping) and table:
        return FrameSource(frame_of_columns(table))
    if hasattr(table, "__arrow_c_stream__"):
        return FrameSource(pl.DataFrame(table))
    return None


def _of_pandas(table: Any) -> pl.DataFrame:
    """A pandas frame, with the levels of its index that have a name, as ``to_parquet`` of pandas writes them."""
    repeated = sorted({str(n) for n in table.columns if list(table.columns).count(n) > 1})
    if repeated:
        raise ConfigError(f"the pandas frame has several columns {', '.join(map(repr, repeated))}: rename them")
    levels = [name for name in table.index.names if name is not None and name not in table.columns]
    if levels:
        table = table.copy(deep=False)
        for name in levels:
            # `reset_index` would make floats of objects that are integers and None.
            table[name] = table.index.get_level_values(name).array
    sparse = {name: dtype.subtype for name, dtype in table.dtypes.items() if hasattr(dtype, "fill_value")}
    table = table.astype(sparse) if sparse else table
    try:
        return pl.from_pandas(table)
    except ImportError as e:
        raise ConfigError(f"polars needs pyarrow to take over a pandas frame ({e}): pip install pyarrow") from e
    except (TypeError, ValueError, pl.exceptions.PolarsError) as e:
        faults = [f"column {name!r}: {why}" for name in table.columns if (why := _refused(table[[name]]))]
        raise_faults(faults or [str(e)], "the pandas frame; give each column values of one type")
        raise


def _refused(table: Any) -> str | None:
    """Why polars cannot take over a frame of one column, or None."""
    try:
        pl.from_pandas(table)
    except (TypeError, ValueError, pl.exceptions.PolarsError) as e:
        return str(e).splitlines()[0]
    return None
