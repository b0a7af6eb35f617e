"""Parquet files, with the columns that the names of their folders hold (hive partitions: ``day=2024-01-01/``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import polars as pl

from recsys_embed.data.sources.base import Chunk, Source, file_record, unreadable, want_columns
from recsys_embed.utils.types import JSON

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class ParquetFiles(Source):
    """Parquet files of one table.

    Args:
        paths: the files in order.
    """

    format = "parquet"
    endings = (".parquet", ".pq")
    options_type = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.files = tuple(map(str, paths))
        self._lengths: dict[int, int] = {}

    @property
    def inputs(self) -> list[JSON]:
        return [file_record(p) for p in self.paths]

    @cached_property
    def _partitions(self) -> list[dict[str, str | None]]:
        """What the folders of each file say."""
        found = []
        for path in self.paths:
            parts = (re.fullmatch(r"([^=]+)=(.*)", folder) for folder in path.parent.parts)
            values = {m[1]: unquote(m[2]) for m in parts if m}
            found.append({k: None if v in (_NULL_PARTITION, "") else v for k, v in values.items()})
        return found

    @cached_property
    def _partition_types(self) -> dict[str, pl.DataType]:
        names = dict.fromkeys(name for values in self._partitions for name in values)
        return {name: _type_of([v.get(name) for v in self._partitions]) for name in names}

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        try:
            own = pl.read_parquet_schema(self.paths[file])
        except (OSError, pl.exceptions.PolarsError) as e:
            raise unreadable(self.paths[file], e) from e
        return {**own, **{k: t for k, t in self._partition_types.items() if k not in own}}

    def length(self, file: int) -> int:
        if file not in self._lengths:
            try:
                counted = pl.scan_parquet(self.paths[file], hive_partitioning=False).select(pl.len()).collect()
            except (OSError, pl.exceptions.PolarsError) as e:
                raise unreadable(self.paths[file], e) from e
            self._lengths[file] = int(counted.item())
        return self._lengths[file]

    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        wanted = want_columns(self, columns)
        path = self.paths[file]
        own = pl.read_parquet_schema(path)
        read = [c for c in wanted if c in own]
        for at in range(start, self.length(file), rows):
            count = min(rows, self.length(file) - at)
            try:
                frame = pl.scan_parquet(path, hive_partitioning=False).slice(at, count).select(read).collect()
            except (OSError, pl.exceptions.PolarsError) as e:
                raise unreadable(path, e) from e
            known, types = self._partitions[file], self._partition_types
            from_folders = [
                pl.repeat(_parsed(known.get(c), types[c]), count, dtype=types[c], eager=True).alias(c)
                for c in wanted
                if c not in own
            ]
            # A frame without columns has no rows to add to.
            frame = frame.with_columns(from_folders) if read else pl.DataFrame(from_folders)
            yield Chunk(file, at, frame.select(pl.col(c).cast(self.types[c]) for c in wanted))


def _type_of(values: Sequence[str | None]) -> pl.DataType:
    """Integers, dates, or text: what all of the values are."""
    known = [v for v in values if v is not None]
    if known and all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", v) for v in known):
        return pl.Int64()
    try:
        if known and all(date.fromisoformat(v).isoformat() == v for v in known):
            return pl.Date()
    except ValueError:
        pass
    return pl.String()


def _parsed(value: str | None, dtype: pl.DataType) -> int | date | str | None:
    if value is None:
        return None
    return int(value) if dtype == pl.Int64 else date.fromisoformat(value) if dtype == pl.Date else value
