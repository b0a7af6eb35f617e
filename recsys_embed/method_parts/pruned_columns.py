"""Parts of programs whose ids lack columns: what fills a gap, and whose columns are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table

_GAP = Table("gap", 1, 1, Initializer("constant"))


def segments(patterns: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Neighbouring columns of one pattern: (pattern, first column, number of columns).

    >>> list(segments("aab"))
    [('a', 0, 2), ('b', 2, 1)]
    """
    at = 0
    for pattern, members in groupby(patterns):
        count = len(list(members))
        yield pattern, at, count
        at += count


class Columns:
    """Tables and row lookups of a program that grows column by column from the left.

    Args:
        width: of the output; columns that nothing fills are zeros.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._tables: dict[str, Table] = {}
        self._row_lookups: list[RowLookup] = []

    def add(self, table: Table, row_lookup: RowLookup) -> None:
        """One more table and who reads it."""
        self._tables[table.name] = table
        self._row_lookups.append(row_lookup)

    def share(self, column: int, count: int) -> None:
        """Columns that all ids read from one row, beside whatever rows they own."""
        # Zeros, so that a shared row does not move the initial vectors of those with rows of their own.
        table = Table(f"shared_{column}", 1, count, Initializer("constant"))
        self.add(table, RowLookup(table.name, MixedRadixDigit(mod=1), column=column))

    def skip(self, column: int, count: int) -> None:
        """Columns of zeros in front of others; the number they are multiples of is never learned."""
        self.add(_GAP, RowLookup(_GAP.name, MixedRadixDigit(mod=1), column=column, scale=0.0, width=count))

    def program(self) -> LookupProgram:
        """The program; at least one column must have been filled."""
        tables = tuple(self._tables.values())
        filled = LookupProgram(tables, tuple(self._row_lookups)).combined_width
        return LookupProgram(tables, tuple(self._row_lookups), padding=self.width - filled)
