"""Arrow IPC files (Feather version 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from recsys_embed.data.sources.base import Chunk, Source, file_record, unreadable, want_columns
from recsys_embed.errors import DataError
from recsys_embed.utils.types import JSON

_STREAM = b"\xff\xff\xff\xff"
_FEATHER1 = b"FEA1"


class ArrowFiles(Source):
    """Arrow IPC files of one table.

    Args:
        paths: the files in order.
    """

    format = "arrow"
    endings = (".arrow", ".feather", ".ipc")
    options_type = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.files = tuple(map(str, paths))
        self._lengths: dict[int, int] = {}

    @property
    def inputs(self) -> list[JSON]:
        return [file_record(p) for p in self.paths]

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        path = self.paths[file]
        try:
            with path.open("rb") as f:
                magic = f.read(4)
            if magic in (_STREAM, _FEATHER1):
                kind = "an Arrow stream" if magic == _STREAM else "of Feather's first version"
                raise DataError(
                    f"{path}: is {kind}; write an Arrow IPC file (pyarrow.feather.write_feather) or Parquet"
                )
            return pl.read_ipc_schema(path)
        except (OSError, pl.exceptions.PolarsError) as e:
            raise unreadable(path, e) from e

    def length(self, file: int) -> int:
        if file not in self._lengths:
            try:
                counted = pl.scan_ipc(self.paths[file]).select(pl.len()).collect()
            except (OSError, pl.exceptions.PolarsError) as e:
                raise unreadable(self.paths[file], e) from e
            self._lengths[file] = int(counted.item())
        return self._lengths[file]

    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        wanted = want_columns(self, columns)
        for at in range(start, self.length(file), rows):
            count = min(rows, self.length(file) - at)
            try:
                frame = pl.scan_ipc(self.paths[file]).slice(at, count).select(wanted).collect()
            except (OSError, pl.exceptions.PolarsError) as e:
                raise unreadable(self.paths[file], e) from e
            yield Chunk(file, at, frame.select(pl.col(c).cast(self.types[c]) for c in wanted))
