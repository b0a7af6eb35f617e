"""Lists of categories: a bag of ids per row."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl

from recsys_embed.data.columns.base import Encoded, Fault, FeatureOutput, Form, cast_faults
from recsys_embed.data.columns.categorical import VocabularyColumn, VocabularyEncoder, reason
from recsys_embed.data.columns.vocabulary import refuse_values
from recsys_embed.utils.settings import param

_CHOOSES = "empty_as_null" in signature(pl.Series.explode).parameters
_DENSE: dict[str, Any] = {"empty_as_null": False, "keep_nulls": False} if _CHOOSES else {}


@dataclass(frozen=True)
class ListSettings(VocabularyColumn):
    """Settings of lists and sequences: those of a category, and these.

    Args:
        separator: of delimited text, such as ``"a|b|c"``; None: the column holds lists. A column that holds lists of
            ``values`` is taken with a separator too.
        values: what the pieces of delimited text are.
        max_length: most values of a row that are kept; None: all.
    """

    form: ClassVar[Form]
    separator: str | None = param(None)
    values: Literal["string", "integer"] = "string"
    max_length: int | None = param(None, low=1)

    def conflicts(self) -> list[str]:
        faults = super().conflicts()
        if self.separator == "":
            faults.append("`separator` must not be empty")
        if self.separator is None and self.values != "string":
            faults.append("`values` is of delimited text: give its `separator`; lists have the type of their values")
        return faults

    def refuse(self, dtype: pl.DataType) -> str | None:
        if dtype == pl.Null:
            return None
        if dtype in (pl.String, pl.Categorical, pl.Enum):
            if self.separator is None:
                return (
                    "it holds text: name the `separator` of its values, or make the column a list (of CSV files the "
                    f"reader does: --source lists.{self.source}='|', or `lists` under [source])"
                )
            return None
        if not isinstance(dtype, pl.List | pl.Array):
            return f"expected lists, or text with a `separator`; got {dtype}"
        own = inner(dtype)
        fits = own.is_integer() if self.values == "integer" else own in (pl.String, pl.Categorical, pl.Enum)
        if self.separator is not None and not fits and own != pl.Null:
            return f"`separator` is of text that holds {self.values} values; the column holds {dtype}: cast its values"
        return refuse_values(inner(dtype))

    def flat_type(self, dtype: pl.DataType) -> pl.DataType:
        if self._splits(dtype):
            return pl.Int64() if self.values == "integer" else pl.String()
        return inner(dtype) if isinstance(dtype, pl.List | pl.Array) else dtype

    def _splits(self, dtype: pl.DataType) -> bool:
        """Whether values of a type are text that the separator splits."""
        return self.separator is not None and not isinstance(dtype, pl.List | pl.Array)

    def checks(self, dtype: pl.DataType) -> bool:
        flat = self.flat_type(dtype)
        if self._splits(dtype):
            return self.values == "integer"
        return flat.is_float() or (self.ids == "raw" and flat in (pl.Int64, pl.UInt64))

    def faults(self, values: pl.Series) -> list[Fault]:
        lists = self.lists(values)
        flat = exploded(lists)
        if self._splits(values.dtype) and self.values == "integer":
            text = flat.str.strip_chars()
            wrong: pl.Series | None = text.cast(pl.Int64, strict=False).is_null() & (text.str.len_bytes() > 0)
            why = "a value is no integer of 64 bits"
        else:
            wrong, why = self.whole_faults(flat), f"a value is {reason(flat.dtype)}"
        if wrong is None or not wrong.any():
            return []
        rows = np.zeros(len(values), bool)
        rows[row_numbers(lists)[wrong.fill_null(False).to_numpy()]] = True
        return cast_faults(values, pl.Series(rows), why)

    def lists(self, values: pl.Series) -> pl.Series:
        """Values as a list column."""
        if isinstance(values.dtype, pl.Array):
            return values.arr.to_list()
        if values.dtype == pl.Null:
            return values.cast(pl.List(pl.String))
        if self.separator is None or not self._splits(values.dtype):
            return values
        return values.cast(pl.String).str.split(self.separator)

    def flat(self, values: pl.Series) -> pl.Series:
        return self.typed(exploded(self.kept(self.lists(values))))

    def typed(self, flat: pl.Series) -> pl.Series:
        """Pieces of text as what they are."""
        if self.separator is None or flat.dtype != pl.String:
            return flat
        text = flat.str.strip_chars()
        return text.cast(pl.Int64, strict=False) if self.values == "integer" else text

    def kept(self, lists: pl.Series) -> pl.Series:
        """Lists of at most ``max_length`` values."""
        return lists if self.max_length is None else lists.list.head(self.max_length)

    def encoder(self, **learned: Any) -> ListEncoder:
        return ListEncoder(self, **learned)


@dataclass(frozen=True)
class ListColumn(ListSettings):
    """Any number of categories per row, in no order that matters; of more than ``max_length`` the first are kept.

    Null and the empty list are no values at all, and null, the empty string and NaN inside of a list are left out.
    Unknown values get id 0, as everywhere.

    >>> ListColumn("tags", separator="|").entry()
    {'name': 'tags', 'kind': 'list', 'separator': '|'}
    """

    kind: ClassVar[str] = "list"
    form: ClassVar[Form] = "list"


def inner(dtype: Any) -> pl.DataType:
    """Type of a list's values."""
    found: Any = dtype.inner
    made: pl.DataType = found() if isinstance(found, type) else found
    return made


def exploded(lists: pl.Series) -> pl.Series:
    """The values of all lists, one after another; null and the empty list are one null each.

    >>> exploded(pl.Series([[1, 2], [], None])).to_list()
    [1, 2, None, None]
    """
    # Not by default in every version of polars.
    options: dict[str, Any] = {"empty_as_null": True, "keep_nulls": True} if _CHOOSES else {}
    return lists.explode(**options)


def row_numbers(lists: pl.Series) -> Any:
    """The row of each value of :func:`exploded`."""
    lengths = lists.list.len().fill_null(0).to_numpy()
    return np.repeat(np.arange(len(lists)), np.maximum(lengths, 1))


@dataclass(frozen=True)
class ListEncoder(VocabularyEncoder):
    """Lists of values to lists of ids."""

    @property
    def features(self) -> tuple[FeatureOutput, ...]:
        column: Any = self.column
        vocab = None if self.known is None else self.known.name
        return (
            FeatureOutput(
                column.name, column.form, self.num_embeddings, 0 if self.known is not None else self.missing_id, vocab,
                self.estimated, column.vocab, column.max_length,
            ),
        )  # fmt: skip

    def encode(self, values: pl.Series) -> Encoded:
        column: Any = self.column
        name = column.name
        lists = column.lists(values)
        kept = column.kept(lists)
        lengths = kept.list.len()
        null, empty = values.null_count(), int((lengths == 0).sum() or 0)
        counts = {"null": null, "empty": empty}
        if column.max_length is not None:
            cut = lists.list.len().fill_null(0).cast(pl.Int64).sum() - lengths.fill_null(0).cast(pl.Int64).sum()
            counts["cut"] = int(cut)
        kind = pl.Int32 if self.known is not None else pl.Int64
        flat = kept.explode(**_DENSE) if _DENSE else kept.filter(lengths > 0).explode()
        keys, _ = self.keys(column.typed(flat))
        rows = pl.Series("row", np.repeat(np.arange(len(kept), dtype=np.uint32), lengths.fill_null(0).to_numpy()))
        counts["left_out"] = keys.null_count()
        if counts["left_out"]:
            there = keys.is_not_null()
            keys, rows = keys.filter(there), rows.filter(there)
        ids = self.ids(keys).cast(kind)
        counts["values"] = len(ids)
        if self.known is not None:
            counts["unknown"] = int((ids == 0).sum())
        return Encoded({name: _bags(ids, rows, len(values)).alias(name)}, counts)


def _bags(ids: pl.Series, rows: pl.Series, count: int) -> pl.Series:
    """Lists of the ids of each of ``count`` rows; ``rows`` are their numbers, in order."""
    frame = pl.DataFrame([rows.set_sorted(), ids.alias("ids")])
    bags = frame.group_by("row", maintain_order=True).agg("ids")
    if len(bags) == count:
        return bags["ids"]
    # Rows without values take the empty list behind all others.
    empty = pl.Series("ids", [[]], dtype=bags["ids"].dtype)
    places = np.full(count, len(bags), np.uint32)
    places[bags["row"].to_numpy()] = np.arange(len(bags), dtype=np.uint32)
    return pl.concat([bags["ids"], empty]).gather(pl.Series(places))
