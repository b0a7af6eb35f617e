"""What polars raises where it cannot read a file."""

from __future__ import annotations

import polars as pl

POLARS_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""Some damage polars does not expect: it then panics, by an exception that is no ``Exception``."""
