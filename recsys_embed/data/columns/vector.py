"""Vectors that were computed before, such as content embeddings: numeric columns, one per component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

import polars as pl

from recsys_embed.data.columns.base import (
    Encoded,
    Encoder,
    Fault,
    LearnedColumn,
    Limits,
    Vocabularies,
    cast_faults,
    learned_value,
)
from recsys_embed.data.columns.lists import inner
from recsys_embed.data.columns.numeric import MAX_FLOAT
from recsys_embed.utils.settings import FilePart, param
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class Vector(LearnedColumn):
    """A list or array of ``width`` numbers per row; its components are the numeric columns ``NAME[0]``, ``NAME[1]``...

    Null becomes the zero vector. A vector of another length, or with a component that is null, NaN or infinite, is a
    fault.

    Args:
        width: of every vector; None: that of the first row that has one.

    >>> Vector("title", width=384).entry()
    {'name': 'title', 'kind': 'vector', 'width': 384}
    """

    kind: ClassVar[str] = "vector"
    width: int | None = param(None, low=1, high=1 << 14)

    @property
    def learns(self) -> str:
        return f"vector:{self.name}"

    def refuse(self, dtype: pl.DataType) -> str | None:
        if dtype == pl.Null:
            return None
        if not isinstance(dtype, pl.List | pl.Array) or not inner(dtype).is_numeric():
            return f"expected lists or arrays of numbers; got {dtype}"
        if isinstance(dtype, pl.Array) and self.width not in (None, dtype.size):
            return f"`width` is {self.width}, and the column holds arrays of {dtype.size}"
        return None

    def checks(self, dtype: pl.DataType) -> bool:
        return dtype != pl.Null

    def faults(self, values: pl.Series) -> list[Fault]:
        lists = values.arr.to_list() if isinstance(values.dtype, pl.Array) else values
        lists = lists.cast(pl.List(pl.Float64))
        width = self.width or first_width(lists)
        lengths = lists.list.len()
        if width is None:
            return cast_faults(values, lengths == 0, "it has no components")
        found = cast_faults(values, lengths != width, f"expected {width} components")
        # Null components are skipped by the sum of the others; NaN and infinity are not.
        total = lists.list.eval(pl.element().abs()).list.max()
        odd = lists.list.eval(pl.element().is_null() | pl.element().is_nan()).list.any() | (total > MAX_FLOAT)
        return found + cast_faults(values, odd & (lengths == width), "a component is null, NaN or infinite")

    def learner(self, dtypes: Sequence[pl.DataType], limits: Limits) -> VectorLearner:
        return VectorLearner(self)


def first_width(values: pl.Series) -> int | None:
    """Components of the first vector that has some."""
    lists = values.arr.to_list() if isinstance(values.dtype, pl.Array) else values.cast(pl.List(pl.Float32))
    lengths = lists.list.len().drop_nulls()
    lengths = lengths.filter(lengths > 0)
    return int(lengths[0]) if len(lengths) else None


class VectorLearner:
    """Finds the width where the schema does not say it."""

    def __init__(self, column: Vector) -> None:
        self.width = column.width
        self.missing = 0

    def add(self, column: LearnedColumn, values: pl.Series) -> None:
        self.missing += values.null_count()
        if self.width is None:
            self.width = first_width(values)

    def result(self, column: LearnedColumn) -> VectorEncoder:
        return VectorEncoder(column, self.width or 1, self.missing)


@dataclass(frozen=True)
class SavedVector(FilePart):
    """What a vector learned, see :class:`VectorEncoder`."""

    missing: int
    width: int = param(MISSING, low=1, high=1 << 14)


@dataclass(frozen=True)
class VectorEncoder(Encoder):
    """A vector to an array of floats.

    Args:
        width: of every vector.
        missing: training rows without one.
    """

    saved = SavedVector
    width: int
    missing: int

    @property
    def dense(self) -> tuple[str, ...]:
        return tuple(f"{self.column.name}[{i}]" for i in range(self.width))

    def encode(self, values: pl.Series) -> Encoded:
        gone = values.is_null()
        array = pl.Array(pl.Float32, self.width)
        if gone.any():
            filler = pl.Series([[0.0] * self.width], dtype=pl.List(pl.Float32))
            lists = values.arr.to_list() if isinstance(values.dtype, pl.Array) else values
            values = lists.cast(pl.List(pl.Float32)).to_frame("x").select(
                pl.when(pl.col("x").is_null()).then(pl.lit(filler).first()).otherwise(pl.col("x"))
            ).to_series()  # fmt: skip
        return Encoded({self.column.name: values.cast(array).alias(self.column.name)}, {"null": int(gone.sum())})

    def learned(self) -> JSON:
        return {"width": self.width, "missing": self.missing}

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        where = column.where()
        width = learned_value(learned, "width", where)
        # Rows that come later have the width that was learned.
        return cls(column.replace(width=width), width, learned_value(learned, "missing", where))
