"""The encoder of rows that a file holds, and rows as a user gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import polars as pl

from recsys_embed.data.serving.criteo_rows import CriteoEncoder
from recsys_embed.data.serving.row_encoder import RowEncoder
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.serving.table_rows import TableEncoder
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


def rows_of(rows: Any) -> Any:
    """Rows as :func:`recsys_embed.data.sources.open_source` takes them.

    A list of rows by column becomes a frame, and so does one row: a mapping of columns to single values.

    Raises:
        ConfigError: the rows have values of types that do not go together.
    """
    if isinstance(rows, Mapping) and any(v is None or isinstance(v, str | int | float | date) for v in rows.values()):
        rows = [rows]
    if isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) and isinstance(rows[0], Mapping):
        try:
            return pl.DataFrame([dict(row) for row in rows], infer_schema_length=None)
        except (TypeError, ValueError, pl.exceptions.PolarsError) as e:
            raise ConfigError(f"the rows are no table ({str(e).splitlines()[0]}): give each column one type") from e
    return rows
