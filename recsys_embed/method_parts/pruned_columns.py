"""Lookup programs of pruned tables: columns that some ids lack are zeros or shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table

_GAP = Table("gap", 1, 1, Initializer("constant"))


def column_runs(patterns: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Runs of neighbouring columns with equal patterns: (pattern, first column, number of columns).

    >>> list(column_runs("aab"))
    [('a', 0, 2), ('b', 2, 1)]
    """
    at = 0
    for pattern, members in groupby(patterns):
        count = len(list(members))
        yield pattern, at, count
        at += count


class ColumnBuilder:
    """Builds the tables and row lookups of a program, column by column from the left.

    Args:
        width: of the output; columns that are not filled are zeros.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._tables: dict[str, Table] = {}
        self._row_lookups: list[RowLookup] = []

    def add(self, table: Table, row_lookup: RowLookup) -> None:
        """Add a table and its row lookup."""
        self._tables[table.name] = table
        self._row_lookups.append(row_lookup)

    def share(self, column: int, count: int) -> None:
        """Add one row that all ids read in these columns, besides rows of their own."""
        # Starts at zero, so that ids with rows of their own keep their initial vectors.
        table = Table(f"shared_{column}", 1, count, Initializer("constant"))
        self.add(table, RowLookup(table.name, MixedRadixDigit(mod=1), column=column))

    def skip(self, column: int, count: int) -> None:
        """Add columns of zeros before other columns; their one table is scaled by 0 and so never learned."""
        self.add(_GAP, RowLookup(_GAP.name, MixedRadixDigit(mod=1), column=column, scale=0.0, width=count))

    def program(self) -> LookupProgram:
        """The program; at least one column must have been filled."""
        tables = tuple(self._tables.values())
        filled = LookupProgram(tables, tuple(self._row_lookups)).combined_width
        return LookupProgram(tables, tuple(self._row_lookups), padding=self.width - filled)
