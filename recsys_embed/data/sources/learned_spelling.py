"""Text that is written in another way than what was learned from, whose values would be unknown in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from recsys_embed.data.columns import Column, Encoder
from recsys_embed.data.columns.categorical import VocabularyEncoder
from recsys_embed.data.columns.lists import ListSettings, exploded, row_numbers
from recsys_embed.data.columns.vocabulary import ValueVocabulary, plain
from recsys_embed.data.sources.base import Source
from recsys_embed.data.sources.csv import CsvFiles
from recsys_embed.data.sources.csv_dialect import SEPARATORS
from recsys_embed.data.sources.frames import FrameSource
from recsys_embed.data.sources.text import TextFiles
from recsys_embed.errors import raise_faults

_ROWS, _BYTES = 1024, 1 << 18
_FILES = 64
"""Of more files than twice as many, only some are looked at."""
_PADDED = 12
"""Most digits of numbers that are looked for with zeros before them."""


def check_spelling(source: Source, encoders: Iterable[Encoder], given: Mapping[str, Any]) -> None:
    """Refuse text of which most first values are unknown, and known when a separator, quote or blank is taken away.

    Args:
        source: the table.
        encoders: those that were learned.
        given: options of these very files.

    Raises:
        ConfigError: names the columns, a value, and the option.
    """
    wanted = [e for e in encoders if isinstance(e, VocabularyEncoder) and _may_differ(source, e)]
    columns = list(dict.fromkeys(e.column.source for e in wanted))
    faults = []
    for file in range(0, len(source.files), max(1, len(source.files) // _FILES)) if columns else ():
        first = first_rows(source, file, columns)
        for encoder in wanted:
            name, separator = encoder.column.source, list_separator(source, encoder.column)
            why = _fault(source, first[name], encoder, separator, given) or _zeros(first[name], encoder.known)
            faults += [f"{source.files[file]}: column {name!r}: {why}"] if why else []
    raise_faults(faults, "the values are written in another way than those that were learned")


def _may_differ(source: Source, encoder: VocabularyEncoder) -> bool:
    """Whether values could be written in another way than the texts that were learned."""
    name = encoder.column.source
    if encoder.dtype != pl.String or name not in source.types:
        return False
    # Whatever rows in memory hold else was meant so, and one row is scored in no time.
    numbers = encoder.writes_numbers(source.types[name]) or (isinstance(source, FrameSource) and name in source.written)
    return numbers or isinstance(source, TextFiles) or list_separator(source, encoder.column) is not None


def list_separator(source: Source, column: Column) -> str | None:
    """What separates the values of a column that is a list written as text, or None."""
    if isinstance(source, CsvFiles) and column.source in source.options.lists:
        return str(source.options.lists[column.source])
    dtype = source.types[column.source]
    return column.separator if isinstance(column, ListSettings) and not dtype.is_nested() else None


def other_separator(values: pl.Series, separator: str) -> str | None:
    """A separator that more than half of some texts hold, none of which holds the one that they should have.

    >>> other_separator(pl.Series(["a;b", "c", "d;e;f"]), "|"), other_separator(pl.Series(["a;b", "c|d"]), "|")
    (';', None)
    """
    if values.str.contains(separator, literal=True).any():
        return None
    held = {s: int(values.str.contains(s, literal=True).sum()) for s in SEPARATORS if s != separator}
    best = max(held, key=lambda s: held[s])
    return best if held[best] > len(values) / 2 else None


def first_rows(source: Source, file: int, columns: Sequence[str]) -> pl.DataFrame:
    """The first rows of a file."""
    if isinstance(source, TextFiles):
        # A block of text is parsed whole, so that it is a small one.
        data, ends = next(source.blocks(file, _BYTES), (b"", np.zeros(0, np.int64)))
        ends = ends[:_ROWS]
        return source.parse(file, data[: ends[-1]] if len(ends) else b"", ends, 0, columns)[0]
    chunk = next(iter(source.chunks(file, 0, _ROWS, columns)), None)
    return pl.DataFrame(schema={c: source.types[c] for c in columns}) if chunk is None else chunk.frame


def distinct_texts(values: pl.Series, *, several: bool = False) -> pl.Series:
    """Distinct texts of a column; of lists, their values if none has several or those are wanted as well."""
    if values.dtype.is_nested():
        lists = values.arr.to_list() if isinstance(values.dtype, pl.Array) else values
        lists = lists.head(0) if not several and (lists.list.len() > 1).any() else lists
        values = exploded(lists)
    values = plain(values, pl.String())[0].drop_nulls().unique(maintain_order=True)
    return values.filter(values.str.len_bytes() > 0)


def _fault(
    source: Source, values: pl.Series, encoder: VocabularyEncoder, separator: str | None, given: Mapping[str, Any]
) -> str | None:
    name, known = encoder.column.source, encoder.known
    texts = distinct_texts(values)
    # Unless half of them are unknown, nothing below holds.
    if not len(texts) or (known is not None and 2 * int((known.find(texts) == 0).sum()) < len(texts)):
        return None
    reader = source if isinstance(source, CsvFiles) else None
    if separator is not None and name not in given.get("lists", ()):
        other = other_separator(texts, separator) if known is None else None
        if other is not None:
            why = f"no value holds the separator {separator!r}, and most hold {other!r}"
            return f"{why}: {_way(name, other, separator, reader)}"
        for other in SEPARATORS:
            parts = texts.str.split(other).list.eval(pl.element().str.strip_chars())
            text = None if known is None or other == separator else _known_by(known, texts, parts)
            if text is not None:
                why = f"{text!r} is unknown, and its parts by {other!r} are known"
                return f"{why}: {_way(name, other, separator, reader)}"
    if reader is None or known is None:
        return None
    text = _known_by(known, texts, texts.str.strip_chars()) if "separator" not in given else None
    if text is not None:
        way = f"--source separator={reader.separator + ' '!r}"
        return f"{text!r} is unknown, and known without the blanks around it: {way}"
    for quote in "\"'" if "quote" not in given else "":
        text = _known_by(known, texts, texts.str.strip_chars(quote))
        if text is not None:
            return f"{text!r} is unknown, and known without its quotes: --source quote={quote!r}"
    return None


def _zeros(values: pl.Series, known: ValueVocabulary | None) -> str | None:
    """Why numbers are not the texts that were learned: those begin with zeros."""
    if known is None:
        return None
    texts = distinct_texts(values, several=True)
    if texts.str.contains("^0[0-9]").any():
        return None
    numbers = texts.filter(texts.str.contains("^[0-9]+$"))
    numbers = numbers.filter(known.find(numbers) == 0)
    for width in range(2, _PADDED + 1) if len(numbers) else ():
        padded = numbers.str.zfill(width)
        lost = padded.filter((known.find(padded) > 0) & (padded != numbers))
        if len(lost):
            return (
                f"{str(lost[0]).lstrip('0')!r} is unknown, and {lost[0]!r} is known: give texts, which keep their zeros"
            )
    return None


def _way(name: str, other: str, separator: str, reader: CsvFiles | None) -> str:
    if reader is not None:
        return f"--source lists.{name}={other!r} (or {separator!r})"
    return f"give lists, or {separator!r} in place of {other!r}"


def _known_by(known: ValueVocabulary, texts: pl.Series, changed: pl.Series) -> str | None:
    """A text that is unknown as it is and known when changed, where those are at least half of all."""
    if changed.dtype.is_nested():
        found = pl.DataFrame({"row": row_numbers(changed), "known": known.find(exploded(changed)) > 0})
        better = found.group_by("row", maintain_order=True).agg(pl.col("known").all())["known"]
    else:
        better = known.find(changed) > 0
    better &= known.find(texts) == 0
    return str(texts.filter(better)[0]) if 2 * better.sum() >= len(texts) else None
