"""A table of events beside tables of what their users or items are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recsys_embed.data.sources.base import Chunk, Source, file_record, want_columns
from recsys_embed.errors import DataError
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class Side:
    """A table with one row per value of ``key``, which a column of the events has by the same name."""

    name: str
    frame: pl.DataFrame
    key: str
    inputs: tuple[JSON, ...] = ()


def read_side(name: str, source: Source, key: str, lists: Mapping[str, Sequence[str]]) -> Side:
    """Read a table whole.

    Args:
        name: for messages.
        source: the table.
        key: its column that the events have too.
        lists: by name, columns of 0 and 1 that become one list: the names of those that are 1.

    Raises:
        DataError: a row cannot be read, or the key occurs twice.
    """
    frames = []
    for file in range(len(source.files)):
        for chunk in source.chunks(file, 0, 1 << 20):
            if chunk.bad:
                row = chunk.bad[0]
                raise DataError(f"{source.place(file, row.row)}: {row.reason}; got {row.raw}")
            frames.append(chunk.frame)
    frame = pl.concat(frames)
    for made, flags in lists.items():
        parts = [pl.when(pl.col(f).cast(pl.String) == "1").then(pl.lit(f)) for f in flags]
        frame = frame.with_columns(pl.concat_list(parts).list.drop_nulls().alias(made)).drop(flags)
    if frame[key].n_unique() != len(frame):
        twice = frame.filter(pl.col(key).is_duplicated())[key][0]
        raise DataError(f"{source.files[0]}: {key} {twice!r} has several rows; keep one of each")
    return Side(name, frame, key, tuple(_records(source)))


def _records(source: Source) -> Iterator[JSON]:
    yield from (file_record(Path(f)) for f in source.files)


class Joined(Source):
    """Events with the columns of other tables, null where these lack the key.

    Args:
        events: the rows.
        sides: tables that are held in memory.
    """

    def __init__(self, events: Source, sides: Sequence[Side]) -> None:
        self.events, self.sides = events, tuple(sides)
        self.files = events.files
        self.seekable = events.seekable  # type: ignore[misc]

    @property
    def inputs(self) -> list[JSON]:
        return [*self.events.inputs, *(record for side in self.sides for record in side.inputs)]

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        types = dict(self.events.types)
        for side in self.sides:
            own = dict(side.frame.schema)
            if types.get(side.key) != own[side.key]:
                raise DataError(
                    f"{side.name}: {side.key} is {own[side.key]}; in the events, {types.get(side.key, 'absent')}"
                )
            types |= {n: t for n, t in own.items() if n != side.key}
        return types

    def length(self, file: int) -> int:
        return self.events.length(file)

    def place(self, file: int, row: int) -> str:
        return self.events.place(file, row)

    def line(self, file: int, row: int) -> int | None:
        return self.events.line(file, row)

    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        wanted = want_columns(self, columns)
        own = self.events.types
        used = [s for s in self.sides if any(c in s.frame.columns and c not in own for c in wanted)]
        read = dict.fromkeys([c for c in wanted if c in own] + [s.key for s in used])
        for chunk in self.events.chunks(file, start, rows, list(read)):
            frame = chunk.frame.with_row_index("#row")
            for side in used:
                taken = [c for c in side.frame.columns if c == side.key or (c in wanted and c not in own)]
                frame = frame.join(side.frame.select(taken), on=side.key, how="left")
            yield Chunk(chunk.file, chunk.first, frame.sort("#row").select(wanted), chunk.bad)
