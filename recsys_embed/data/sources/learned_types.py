"""Types of columns of text by what the schema makes of them, and by what a model learned of earlier rows."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from recsys_embed.data.columns import Column, Encoder
from recsys_embed.data.columns.categorical import VocabularyEncoder
from recsys_embed.data.columns.lists import ListSettings
from recsys_embed.data.sources.base import Source
from recsys_embed.data.sources.text import TextFiles


def read_floats(source: TextFiles, columns: Iterable[Column]) -> None:
    """Read columns that are numbers of any kind as floats, where the first rows hold integers or nothing."""
    readers: dict[str, list[Column]] = {}
    for column in columns:
        readers.setdefault(column.source, []).append(column)
    narrow = {n for n, t in source.types.items() if t.is_integer()} | source.empty
    source.assume({n: pl.Float64() for n, some in readers.items() if n in narrow and all(c.takes_floats for c in some)})


def read_as_learned(source: Source, encoders: Iterable[Encoder]) -> None:
    """Read columns of text as what was learned from, where their first rows look like something else."""
    if not isinstance(source, TextFiles):
        return
    types, wanted = source.types, dict[str, pl.DataType]()
    for encoder in encoders:
        dtype = types.get(encoder.column.source)
        if dtype is None:
            continue
        narrow = encoder.column.takes_floats and (dtype.is_integer() or encoder.column.source in source.empty)
        found = _text_type(encoder) if narrow or encoder.refuse(dtype) is not None else None
        if found is not None:
            wanted[encoder.column.source] = found
    source.assume(wanted)


def _text_type(encoder: Encoder) -> pl.DataType | None:
    """The type that a column of text is read as, for an encoder that does not take what it looks like."""
    if encoder.column.takes_floats:
        return pl.Float64()
    if isinstance(encoder.column, ListSettings):
        return None if encoder.column.separator is None else pl.String()
    if isinstance(encoder, VocabularyEncoder) and encoder.dtype in (pl.String(), pl.Int64(), pl.UInt64(), pl.Boolean()):
        return encoder.dtype
    return None
