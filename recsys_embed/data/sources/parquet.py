"""Parquet files, with the columns that the names of their folders hold (hive partitions: ``day=2024-01-01/``)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import polars as pl

from recsys_embed.data.sources.parquet_footer import column_bytes
from recsys_embed.data.sources.scanned import ScannedFiles, readable

_SMALL = 32 << 20
"""Bytes of a file whose row groups are not looked at."""
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class ParquetFiles(ScannedFiles):
    """Parquet files of one table, see :class:`ScannedFiles`."""

    format = "parquet"
    endings = (".parquet", ".pq")

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

    def scan(self, file: int) -> pl.LazyFrame:
        return pl.scan_parquet(self.paths[file], hive_partitioning=False)

    def own_types(self, path: Path) -> Mapping[str, pl.DataType]:
        return pl.read_parquet_schema(path)

    @cached_property
    def _row_groups(self) -> list[tuple[str, dict[str, int]]]:
        """The columns' bytes of each row group of files that are not small."""
        found = []
        for path in self.paths:
            with readable(path):
                large = path.stat().st_size > _SMALL
                found += [(str(path), group) for group in column_bytes(path)] if large else []
        return found

    def held_besides(self, columns: Collection[str]) -> tuple[int, str]:
        # Of a row group polars reads the columns whole as they are stored, and decodes the rows that are asked for.
        held = ((sum(group.get(c, 0) for c in columns), path) for path, group in self._row_groups)
        return max(held, default=(0, ""))

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        own = super().file_types(file)
        return {**own, **{k: t for k, t in self._partition_types.items() if k not in own}}

    def added(self, file: int, columns: Sequence[str], rows: int) -> list[pl.Series]:
        known, types = self._partitions[file], self._partition_types
        values = {c: _parsed(known.get(c), types[c]) for c in columns}
        return [pl.repeat(v, rows, dtype=types[c], eager=True).alias(c) for c, v in values.items()]


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
