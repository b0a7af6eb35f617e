"""The split of every row of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.columns.vocabulary import plain
from recsys_embed.data.conversion import PROCESS
from recsys_embed.data.folder import write_file
from recsys_embed.data.table.rows import Part, TableRows
from recsys_embed.data.table.split import TableSplit, TimeBounds, last_codes, time_bounds

_USER_BYTES = 400
"""Measured peak bytes per user of leave-one-out."""


class SplitCodes:
    """Codes of the rows of each part.

    Args:
        rows: the table, scanned.
        split: how its rows are assigned.
    """

    def __init__(self, rows: TableRows, split: TableSplit) -> None:
        self.rows, self.split = rows, split
        self._files = [] if split.rule is None else rows.file_codes(split.rule)
        if split.kind == "last":
            self._find_last()

    @cached_property
    def _bounds(self) -> TimeBounds:
        paths = [self.rows.times_path(part.index) for part, _ in self.rows.firsts()]
        return time_bounds(self.split, paths, self.rows.total)

    def of(self, part: Part, first: int) -> NDArray[np.int8]:
        """Codes of the good rows of a part, of which ``first`` is the number of the first among all."""
        rule = self.split.rule
        if rule is not None:
            numbers = np.arange(first, first + part.good)
            return rule.codes(self.rows.total, numbers, self._files[part.file])
        if self.split.kind == "time":
            return self._bounds.codes(np.fromfile(self.rows.times_path(part.index), np.int64))
        if self.split.kind == "column":
            name = self.split.columns[0]
            return self.split.column_codes(self.rows.read(part, [name])[name])
        return np.fromfile(self._path, np.int8, part.good, offset=first)

    def counts(self) -> Counter[int]:
        """Rows of every code."""
        found: Counter[int] = Counter()
        for part, first in self.rows.firsts():
            codes, sizes = np.unique(self.of(part, first), return_counts=True)
            found.update(dict(zip(codes.tolist(), sizes.tolist(), strict=True)))
        return found

    # -- leave-one-out ----------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self.rows.work / "split.i8"

    def _find_last(self) -> None:
        if self._path.exists():
            return
        rows, codes = last_codes(self._users(), (self.rows.options.max_memory - PROCESS) // _USER_BYTES)

        def save(path: Path) -> None:
            # A new file is all TRAIN, which is 0.
            of_rows = np.memmap(path, np.int8, "w+", shape=self.rows.total)
            of_rows[rows] = codes
            of_rows.flush()

        write_file(self._path, save, durable=False)

    def _users(self) -> Iterator[tuple[pl.Series, NDArray[np.int64] | None, int]]:
        user, event = self.split.columns[0], self.rows.schema.event_time
        for part, first in self.rows.firsts():
            frame = self.rows.read(part, list(dict.fromkeys([user] + ([event.source] if event else []))))
            times = None if event is None else event.seconds(frame[event.source]).to_numpy()
            users = frame[user]
            # As everywhere, an empty string and NaN are missing.
            users = plain(users, pl.String())[0] if users.dtype == pl.String else users
            yield (users.fill_nan(None) if users.dtype.is_float() else users), times, first
