"""The encoder of rows that a file holds, and rows as a user gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recsys_embed.data.serving.criteo_rows import CriteoEncoder
from recsys_embed.data.serving.row_encoder import RowEncoder
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.serving.table_rows import TableEncoder
from recsys_embed.data.sources.frames import FrameSource
from recsys_embed.data.sources.python_values import (
    frame_of_columns,
    frame_of_rows,
    holds_numbers,
    numbers_as_texts,
    refuse_one_row,
)
from recsys_embed.errors import ConfigError, DataError


def read_row_encoder(stored: StoredEncoders) -> RowEncoder:
    """The encoder of rows that a file holds.

    Raises:
        DataError: what the file says contradicts itself.
    """
    try:
        return CriteoEncoder(stored) if stored.about["kind"] == "criteo" else TableEncoder(stored)
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"the encoders of the file cannot be used ({e})") from e


def rows_of(rows: Any, encoder: RowEncoder) -> Any:
    """Rows as :func:`recsys_embed.data.sources.open_source` takes them: a list of rows by column becomes a frame.

    Raises:
        ConfigError: a dict that is not columns of equal length, as one row is.
        DataError: columns that hold values of several types.
    """
    if isinstance(rows, Mapping):
        refuse_one_row(rows, encoder.nested, encoder.columns)
        plain = {n: rows[n] for n in encoder.texts if type(rows.get(n)) in (list, tuple)}
        found = {n: numbers_as_texts(v) for n, v in plain.items() if holds_numbers(v)}
        return FrameSource(frame_of_columns({**rows, **found}), written=found) if found else rows
    if isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) and isinstance(rows[0], Mapping):
        written = {}
        if encoder.texts and all(isinstance(row, Mapping) for row in rows):
            plain = {n: [row.get(n) for row in rows] for n in encoder.texts}
            written = {n: numbers_as_texts(v) for n, v in plain.items() if holds_numbers(v)}
        if not written:
            return frame_of_rows(rows, encoder.columns)
        texts = ({n: v[i] for n, v in written.items()} for i in range(len(rows)))
        changed = ({**row, **more} for row, more in zip(rows, texts, strict=True))
        return FrameSource(frame_of_rows(changed, encoder.columns), written=written)
    return rows
