"""Arrow IPC files (Feather version 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from recsys_embed.data.sources.scanned import ScannedFiles
from recsys_embed.errors import DataError

_STREAM = b"\xff\xff\xff\xff"
_FEATHER1 = b"FEA1"


class ArrowFiles(ScannedFiles):
    """Arrow IPC files of one table, see :class:`ScannedFiles`."""

    format = "arrow"
    endings = (".arrow", ".feather", ".ipc")

    def scan(self, file: int) -> pl.LazyFrame:
        return pl.scan_ipc(self.paths[file])

    def own_types(self, path: Path) -> Mapping[str, pl.DataType]:
        with path.open("rb") as f:
            magic = f.read(4)
        if magic in (_STREAM, _FEATHER1):
            kind = "an Arrow stream" if magic == _STREAM else "of Feather's first version"
            raise DataError(f"{path}: is {kind}; write an Arrow IPC file (pyarrow.feather.write_feather) or Parquet")
        return pl.read_ipc_schema(path)
