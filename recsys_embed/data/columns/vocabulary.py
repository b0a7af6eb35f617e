"""Vocabularies of any type of value: strings, integers of every width, booleans, dates, times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.vocab import OOV_ID, read_known, write_known
from recsys_embed.errors import ConfigError

MAX_WHOLE = 1 << 53
"""A float holds every integer up to this one."""
_MERGE_ROWS = 1 << 20
_ENUM_SIZE = 1 << 14
"""Up to so many strings a lookup through polars' enumerations is faster than a join, four times where they are few."""
_FILE_NAME = 200
"""Characters that a file's name may have before its ending; file systems take 255 with what is added while writing."""
DISTINCT_BYTES = 240
"""Measured peak per distinct value of a vocabulary, strings of 12 bytes."""
VALUE_TYPES: dict[str, pl.DataType] = {
    "string": pl.String(),
    "integer": pl.Int64(),
    "unsigned": pl.UInt64(),
    "bool": pl.Boolean(),
    "date": pl.Date(),
    "time": pl.Datetime("us"),
}
"""Types of vocabularies by their names in manifests and exported files."""
TYPE_NAMES = {str(dtype): name for name, dtype in VALUE_TYPES.items()}


def value_type(dtype: pl.DataType) -> pl.DataType | None:
    """The type in which a vocabulary holds values of a type; None where they are no categories.

    >>> value_type(pl.UInt8()), value_type(pl.UInt64()), value_type(pl.Categorical()), value_type(pl.Struct([]))
    (Int64, UInt64, String, None)
    """
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return pl.String()
    if dtype == pl.UInt64:
        return pl.UInt64()
    if dtype in (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32) or dtype.is_float():
        return pl.Int64()
    if dtype in (pl.Boolean, pl.Date):
        return dtype
    return pl.Datetime("us") if isinstance(dtype, pl.Datetime) else None


def refuse_values(dtype: pl.DataType) -> str | None:
    """Why values of a type are no categories, or None."""
    if dtype == pl.Null or value_type(dtype) is not None:
        return None
    return f"categories are strings, integers, booleans, dates or times; got {dtype}: cast the column to one of them"


def joint_value_type(dtypes: Iterable[pl.DataType], name: str) -> pl.DataType:
    """The type of a vocabulary for columns of several types.

    Raises:
        ConfigError: they do not go together.
    """
    found = {str(t): t for t in map(value_type, (d for d in dtypes if d != pl.Null)) if t is not None}
    if len(found) > 1:
        raise ConfigError(
            f"columns that share vocabulary {name!r} must hold one type of value; got {' and '.join(found)}: cast one "
            '(delimited text becomes integers with `values = "integer"`)'
        )
    return next(iter(found.values()), pl.String())


def plain(values: pl.Series, dtype: pl.DataType) -> tuple[pl.Series, int]:
    """Values in a vocabulary's type, null where they are missing or none of its type, and how many were empty or NaN.

    An empty string and NaN are missing values, as null is. Numbers are texts as :func:`number_texts` has them.
    """
    odd = 0
    if dtype == pl.String:
        if values.dtype.is_numeric():
            gone = int(values.is_nan().sum() or 0) if values.dtype.is_float() else 0
            return number_texts(values), gone
        values = values.cast(pl.String)
        empty = values.str.len_bytes() == 0
        odd = int(empty.sum() or 0)
        return (values.set(empty.fill_null(False), None) if odd else values), odd
    if values.dtype.is_float():
        odd = int(values.is_nan().sum() or 0)
    if values.dtype == pl.String and dtype.is_integer():
        odd = int((values.str.len_bytes() == 0).sum() or 0)
    if isinstance(values.dtype, pl.Datetime) and values.dtype.time_zone is not None:
        values = values.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return (values if values.dtype == dtype else values.cast(dtype, strict=False)), odd


def number_texts(values: pl.Series) -> pl.Series:
    """Numbers as their shortest decimals, null where they are not finite.

    >>> number_texts(pl.Series([7.0, -0.25, 1e-7, 1e21, float("nan")])).to_list()
    ['7', '-0.25', '0.0000001', '1000000000000000000000', None]
    """
    if not values.dtype.is_float():
        return values.cast(pl.String)
    known = values.cast(pl.Float64).set(~values.is_finite().fill_null(False), None)
    whole = ((known == known.round(0)) & (known.abs() <= MAX_WHOLE)).fill_null(True)
    texts = known.set(~whole, None).cast(pl.Int64).cast(pl.String)
    if whole.all():
        return texts
    # Polars writes some with an exponent.
    written = {value: format(Decimal(repr(value)), "f") for value in known.filter(~whole).unique().to_list()}
    return texts.zip_with(whole, known.replace_strict(written, default=None, return_dtype=pl.String))


@dataclass(frozen=True)
class ValueVocabulary:
    """The known values of one or several columns and their ids, most frequent first; unknown values get id 0.

    Args:
        name: of the vocabulary.
        values: [K], without nulls, in order of their ids.
        ids: int32 [K], from 1; one number is left out where ``missing_id`` stands.
        counts: training occurrences of each value.
        missing_id: id of a missing value (null, empty string, NaN), or 0 where training had none or too few.
        missing_count: training occurrences of a missing value.
        unknown_count: training occurrences of values that are too rare to be known.
    """

    name: str
    values: pl.Series
    ids: NDArray[np.int32]
    counts: NDArray[np.int64]
    missing_id: int
    missing_count: int
    unknown_count: int

    @property
    def size(self) -> int:
        """Rows a table needs: the unknown id, every known value, and the missing one if it has an id."""
        return 1 + len(self.values) + (self.missing_id != OOV_ID)

    @property
    def dtype(self) -> pl.DataType:
        """Type of the values."""
        return self.values.dtype

    @classmethod
    def of_counts(
        cls, name: str, counted: pl.DataFrame, missing: int, *, min_count: int, max_size: int | None
    ) -> ValueVocabulary:
        """Keep values seen ``min_count`` times, at most ``max_size``; ids by falling count, ties by value.

        Args:
            counted: columns ``value`` and ``count``.
            missing: occurrences of a missing value, which comes after its ties.
        """
        total = int(counted["count"].sum() or 0)
        kept = counted.filter(pl.col("count") >= min_count).sort(["count", "value"], descending=[True, False])
        kept = kept if max_size is None else kept.head(max_size)
        counts = kept["count"].to_numpy().astype(np.int64)
        ids = np.arange(1, len(kept) + 1, dtype=np.int32)
        missing_id, unknown = OOV_ID, total - int(counts.sum())
        if missing >= max(1, min_count):
            before = int(np.searchsorted(-counts, -missing, side="right"))
            missing_id = before + 1
            ids[before:] += 1
        return cls(name, kept["value"].rechunk(), ids, counts, missing_id, missing, unknown)

    @cached_property
    def _known(self) -> pl.DataFrame:
        return pl.DataFrame({"value": self.values, "id": self.ids})

    @cached_property
    def _enum(self) -> tuple[pl.Enum, NDArray[np.int32]]:
        """The values as an enumeration, and the id of each of its numbers, 0 behind them."""
        return pl.Enum(self.values), np.append(self.ids, np.int32(OOV_ID))

    def find(self, keys: pl.Series) -> pl.Series:
        """Ids of values in the vocabulary's type: Int32, 0 for unknown ones and nulls."""
        if self.dtype == pl.String and len(self.values) <= _ENUM_SIZE:
            enum, ids = self._enum
            numbers = keys.cast(enum, strict=False).to_physical().cast(pl.UInt32).fill_null(len(self.values))
            return pl.Series("id", ids[numbers.to_numpy()])
        known = self._known
        if 8 * len(keys) < len(known):
            # A table of the few keys is built sooner than one of the vocabulary.
            known = known.join(keys.unique().to_frame("value"), on="value", how="semi")
        found = keys.to_frame("value").join(known, on="value", how="left", maintain_order="left")
        return found["id"].fill_null(OOV_ID)

    def write(self, path: Path, *, durable: bool = True) -> None:
        """Store as Parquet: ``value`` (null for the missing one), ``id``, ``count``."""
        frame = pl.DataFrame({"value": self.values, "id": self.ids, "count": self.counts})
        write_known(path, frame, self.missing_id, self.missing_count, durable=durable)

    @classmethod
    def read(cls, path: Path, name: str, *, missing_count: int = 0, unknown_count: int = 0) -> ValueVocabulary:
        """Inverse of :meth:`write`; the counts that are not of a known value stand in the manifest.

        Raises:
            DataError: the file is damaged or is no vocabulary.
        """
        known, missing_id, counted = read_known(path, name)
        ids, counts = known["id"].to_numpy(), known["count"].to_numpy()
        missing_count = missing_count if missing_id == OOV_ID else counted
        return cls(name, known["value"], ids, counts, missing_id, missing_count, unknown_count)


@dataclass(frozen=True)
class FolderVocabularies:
    """The vocabularies of a data folder."""

    folder: Path

    def read(self, file: str, name: str, *, missing_count: int = 0, unknown_count: int = 0) -> ValueVocabulary:
        """See :meth:`ValueVocabulary.read`."""
        return ValueVocabulary.read(self.folder / file, name, missing_count=missing_count, unknown_count=unknown_count)


def streamed(query: pl.LazyFrame) -> pl.DataFrame:
    """The result of a query, computed in pieces; the order of its rows is not fixed."""
    try:
        return query.collect(engine="streaming")
    except (TypeError, ValueError):
        # A polars whose streaming engine is none yet.
        return query.collect()


class ValueCounter:
    """Counts the values of columns that share a vocabulary.

    Args:
        name: of the vocabulary.
        dtype: of its values.
        max_distinct: values that memory has room for.
    """

    def __init__(self, name: str, dtype: pl.DataType, max_distinct: int) -> None:
        self.name, self.dtype, self.max_distinct = name, dtype, max_distinct
        self.missing = 0
        self._pending: list[pl.DataFrame] = []
        self._rows = 0

    def add(self, keys: pl.Series, missing: int) -> None:
        """Count values in the vocabulary's type; nulls among them are left out, ``missing`` is added as it is.

        Raises:
            ConfigError: more distinct values than there is memory for.
        """
        self.missing += missing
        known = keys.to_frame("value").lazy().drop_nulls()
        # The streaming engine groups twice as fast.
        counted = streamed(known.group_by("value").agg(pl.len().cast(pl.Int64).alias("count")))
        self._pending.append(counted)
        self._rows += len(counted)
        if self._rows > max(_MERGE_ROWS, 2 * len(self._pending[0])):
            self._merge()

    def _merge(self) -> None:
        merged = pl.concat(self._pending).group_by("value").agg(pl.col("count").sum())
        if len(merged) > self.max_distinct:
            raise ConfigError(
                f"vocabulary {self.name!r} has more than {self.max_distinct:,} values, all that --max-memory has room "
                'for: raise --max-memory, or use `ids = "raw"`, which needs no vocabulary, with hashing methods'
            )
        self._pending, self._rows = [merged], len(merged)

    def counted(self) -> pl.DataFrame:
        """Columns ``value`` and ``count`` of everything added."""
        if not self._pending:
            return pl.DataFrame(schema={"value": self.dtype, "count": pl.Int64})
        self._merge()
        return self._pending[0]


def vocabulary_file(name: str) -> str:
    """The file of a vocabulary in a data folder: long names cut, characters that no file's name may have spelt out.

    >>> vocabulary_file("a/b")
    'vocab/a%2Fb.parquet'
    """
    spelt = quote(name, safe=" ")
    if len(spelt) > _FILE_NAME:
        spelt = f"{spelt[: _FILE_NAME // 2]}-{hashlib.sha256(spelt.encode()).hexdigest()[:16]}"
    return f"vocab/{spelt}.parquet"
