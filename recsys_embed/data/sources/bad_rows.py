"""Rows whose values cannot be used: found, told, and written down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.columns.base import Fault
from recsys_embed.data.conversion import SHOWN_FAULTS
from recsys_embed.data.sources.base import BadRow, Chunk, Source
from recsys_embed.errors import DataError

QUARANTINE = "correct the table, or pass --on-bad-row quarantine to set such rows aside and count them"


def find_bad_rows(chunk: Chunk, faults: Iterable[tuple[str, Fault]]) -> tuple[NDArray[np.bool_], list[BadRow]]:
    """Which rows of a chunk's frame are good, and the bad ones in order, the reader's among them.

    Args:
        chunk: the rows.
        faults: column and fault, of which a row has the first.
    """
    frame = chunk.frame
    good = np.ones(len(frame), bool)
    bad = list(chunk.bad)
    numbers: NDArray[np.int64] | None = None
    for name, fault in faults:
        for at in np.flatnonzero(fault.rows.to_numpy() & good).tolist():
            numbers = row_numbers(chunk) if numbers is None else numbers
            bad.append(BadRow(chunk.file, int(numbers[at]), name, fault.reason, _shown(frame[name][at])))
            good[at] = False
    return good, sorted(bad, key=lambda row: row.row)


def row_numbers(chunk: Chunk) -> NDArray[np.int64]:
    """Numbers in their file of the rows of a chunk's frame; those that the reader left out stand between them.

    >>> row_numbers(Chunk(0, 5, pl.DataFrame({"x": [1, 2]}), (BadRow(0, 5, "x", "", ""), BadRow(0, 7, "x", "", ""))))
    array([6, 8])
    """
    gone = np.array([row.row for row in chunk.bad], np.int64)
    return np.setdiff1d(np.arange(chunk.first, chunk.stop), gone)


def _shown(value: Any) -> str:
    return str(value.to_list() if isinstance(value, pl.Series) else value)[:200]


def bad_rows_error(source: Source, rows: Sequence[BadRow], cure: str = QUARANTINE) -> DataError:
    """The error that names the first of some bad rows."""
    named = ((source.place(r.file, r.row) + (f", column {r.column}" if r.column else ""), r) for r in rows)
    shown = [f"{place}: {r.reason}; got {r.raw}" for place, r in named][:SHOWN_FAULTS]
    more = f"\n  and {len(rows) - SHOWN_FAULTS} more in this part" if len(rows) > SHOWN_FAULTS else ""
    head = "" if len(shown) == 1 else f"{len(rows)} faults in the data:\n  - "
    return DataError(head + "\n  - ".join(shown) + more + ("\n" if len(shown) > 1 else "; ") + cure)


def bad_row_line(source: Source, row: BadRow) -> str:
    """A line of a quarantine file."""
    line = source.line(row.file, row.row)
    value = {
        "file": source.files[row.file],
        "row": row.row + 1,
        **({} if line is None else {"line": line}),
        "column": row.column,
        "reason": row.reason,
        "raw": row.raw,
    }
    return json.dumps(value) + "\n"
