"""What file formats have in common that polars scans lazily: a part of the rows is read without those before it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from recsys_embed.data.polars_errors import POLARS_ERRORS
from recsys_embed.data.sources.base import Chunk, Source, file_record, unreadable, want_columns
from recsys_embed.utils.types import JSON


class ScannedFiles(Source):
    """Files of one table.

    Args:
        paths: the files in order.
    """

    options_type = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.files = tuple(map(str, paths))
        self._lengths: dict[int, int] = {}

    @abstractmethod
    def scan(self, file: int) -> pl.LazyFrame:
        """The columns that the file itself holds."""

    @abstractmethod
    def own_types(self, path: Path) -> Mapping[str, pl.DataType]:
        """The types of those columns."""

    @property
    def inputs(self) -> list[JSON]:
        return [file_record(p) for p in self.paths]

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        with readable(self.paths[file]):
            return self.own_types(self.paths[file])

    def length(self, file: int) -> int:
        if file not in self._lengths:
            with readable(self.paths[file]):
                self._lengths[file] = int(self.scan(file).select(pl.len()).collect().item())
        return self._lengths[file]

    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        wanted = want_columns(self, columns)
        path = self.paths[file]
        with readable(path):
            own = self.own_types(path)
        read = [c for c in wanted if c in own]
        for at in range(start, self.length(file), rows):
            count = min(rows, self.length(file) - at)
            with readable(path):
                frame = self.scan(file).slice(at, count).select(read).collect()
                if read and len(frame) != count:
                    raise ValueError(f"its {self.length(file)} rows, as it tells them, are not those it holds")
            added = self.added(file, [c for c in wanted if c not in own], count)
            # A frame without columns has no rows to add to.
            frame = frame.with_columns(added) if read else pl.DataFrame(added)
            yield Chunk(file, at, frame.select(pl.col(c).cast(self.types[c]) for c in wanted))

    def added(self, file: int, columns: Sequence[str], rows: int) -> list[pl.Series]:
        """Columns that the file itself does not hold, ``rows`` values each."""
        return []


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Tell which file could not be read."""
    try:
        yield
    except (OSError, ValueError, *POLARS_ERRORS) as e:
        raise unreadable(path, e) from e
