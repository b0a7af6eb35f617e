"""Types of columns of text by what the schema makes of them, and by what a model learned of earlier rows."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from recsys_embed.data.columns import Column, Encoder, Label, Time
from recsys_embed.data.columns.categorical import VocabularyEncoder
from recsys_embed.data.columns.lists import ListSettings
from recsys_embed.data.sources.base import Source
from recsys_embed.data.sources.csv import CsvFiles
from recsys_embed.data.sources.text import TextFiles
from recsys_embed.data.sources.values import NumberCount


def read_floats(source: TextFiles, columns: Iterable[Column]) -> None:
    """Read columns that are numbers as numbers, where the first rows hold integers, nothing, or some text besides."""
    readers: dict[str, list[Column]] = {}
    for column in columns:
        readers.setdefault(column.source, []).append(column)
    narrow = {n for n, t in source.types.items() if t.is_integer()} | source.empty
    counts = source.number_counts([n for n, some in readers.items() if all(_takes_numbers(c) for c in some)])
    wanted: dict[str, pl.DataType] = {}
    for name, some in readers.items():
        if name in narrow and all(c.takes_floats for c in some):
            wanted[name] = pl.Float64()
        elif name in counts:
            kinds = [_number_type(c, counts[name]) for c in some]
            if None not in kinds:
                wanted[name] = pl.Float64() if pl.Float64() in kinds else pl.Int64()
    source.assume(wanted)


def _takes_numbers(column: Column) -> bool:
    return column.takes_floats or isinstance(column, Time | Label)


def _number_type(column: Column, count: NumberCount) -> pl.DataType | None:
    """The type of numbers that a column of numbers and other texts is read as, or None: as text."""
    if column.takes_floats:
        return pl.Float64()
    # A time may be text as well, and a label words: what most of the values are is what the column is.
    most = count.number > count.known / 2
    if isinstance(column, Time) and column.format is None and most:
        return pl.Int64() if count.whole == count.number else pl.Float64()
    if isinstance(column, Label) and column.positive is None and most and count.whole < count.number:
        return pl.Float64()
    return None


def read_as_learned(source: Source, encoders: Iterable[Encoder]) -> None:
    """Read columns of text as what was learned from, where their first rows look like something else."""
    if not isinstance(source, TextFiles):
        return
    types, wanted = source.types, dict[str, pl.DataType]()
    encoders = list(encoders)
    counts = source.number_counts([e.column.source for e in encoders if isinstance(e.column, Time)])
    for encoder in encoders:
        dtype = types.get(encoder.column.source)
        if dtype is None:
            continue
        narrow = encoder.column.takes_floats and (dtype.is_integer() or encoder.column.source in source.empty)
        if isinstance(encoder, VocabularyEncoder):
            narrow = encoder.writes_numbers(dtype)
        found = (
            _text_type(encoder, dtype, isinstance(source, CsvFiles))
            if narrow or encoder.refuse(dtype) is not None
            else None
        )
        if found is None and isinstance(encoder.column, Time) and encoder.column.source in counts:
            found = _number_type(encoder.column, counts[encoder.column.source])
        if found is not None:
            wanted[encoder.column.source] = found
    source.assume(wanted, learned=True)


def _text_type(encoder: Encoder, dtype: pl.DataType, csv: bool) -> pl.DataType | None:
    """The type that a column of text is read as, for an encoder that does not take ``dtype``, which it looks like."""
    if encoder.column.takes_floats:
        return pl.Float64()
    plain = (pl.String(), pl.Int64(), pl.UInt64(), pl.Boolean())
    if isinstance(dtype, pl.List):
        # CSV reads lists as lists of any type; JSON says of which they are, and writes numbers as texts.
        if isinstance(encoder, VocabularyEncoder) and (csv or encoder.writes_numbers(dtype)):
            return pl.List(encoder.dtype)
        return None
    if dtype == pl.Boolean and not csv:
        return None
    if isinstance(encoder.column, ListSettings):
        return None if encoder.column.separator is None else pl.String()
    if isinstance(encoder, VocabularyEncoder) and encoder.dtype in plain:
        return encoder.dtype
    return None
