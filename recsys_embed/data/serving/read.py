"""The encoder of rows that a file holds, and rows as a user gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recsys_embed.data.serving.criteo_rows import CriteoEncoder
from recsys_embed.data.serving.row_encoder import RowEncoder
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.serving.table_rows import TableEncoder
from recsys_embed.data.sources.python_values import frame_of_rows, refuse_one_row
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
    if isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) and isinstance(rows[0], Mapping):
        return frame_of_rows(rows, encoder.columns)
    return rows
