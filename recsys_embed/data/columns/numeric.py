"""Numbers: one column of floats, or quantile buckets as ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.columns.base import (
    Encoded,
    Encoder,
    Fault,
    FeatureOutput,
    LearnedColumn,
    Limits,
    Vocabularies,
    cast_faults,
    learned_value,
    read_saved,
    saved_values,
)
from recsys_embed.data.columns.vocabulary import ValueVocabulary, vocabulary_file
from recsys_embed.data.field_counts import FieldCounts
from recsys_embed.data.random_bits import random_bits
from recsys_embed.utils.settings import FilePart, param
from recsys_embed.utils.types import JSON

_BLOCK = 1 << 14
MAX_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Numeric(LearnedColumn):
    """A number per row.

    Null and NaN are missing and become ``fill``; the model standardises its numeric columns itself. Infinite numbers
    are faults, unless ``clip`` bounds them. Steps in order: ``clip``, ``transform``, ``standardise``, ``fill``.

    Args:
        name: of the numeric column, or of the feature with ``buckets``.
        column: of the table; by default ``name``.
        transform: ``"log"``: ``sign(x) * log(1 + |x|)``; None: the number itself.
        standardise: subtract the mean of the training rows and divide by their standard deviation.
        clip: lowest and highest value, others become these.
        buckets: quantile buckets of the training rows, so many at most; they are the ids of a categorical feature, in
            which a missing number is 0.
        fill: ``"mean"`` or ``"median"`` of the training rows, after the other steps, or a number as it stands then.
        indicator: also a column ``NAME_missing``, 1 where the number is missing, else 0.

    >>> Numeric("price", transform="log", indicator=True).entry()
    {'name': 'price', 'kind': 'numeric', 'transform': 'log', 'indicator': True}
    """

    kind: ClassVar[str] = "numeric"
    transform: Literal["log"] | None = None
    standardise: bool = False
    clip: tuple[float, float] | None = param(None)
    buckets: int | None = param(None, low=2, high=1 << 16)
    fill: float | Literal["mean", "median"] = param("mean", low=-MAX_FLOAT, high=MAX_FLOAT)
    indicator: bool = False

    def conflicts(self) -> list[str]:
        faults = []
        if self.clip is not None and self.clip[0] > self.clip[1]:
            faults.append(f"`clip` must be the lowest and the highest value; got {self.clip}")
        if self.buckets is not None:
            given = [n for n, d in (("fill", "mean"), ("indicator", False), ("standardise", False), ("transform", None))
                     if getattr(self, n) != d]  # fmt: skip
            faults += [f"`{n}` does not go with `buckets`, whose ids depend on the order of the numbers alone"
                       for n in given]  # fmt: skip
        return faults

    @property
    def learns(self) -> str:
        return f"numeric:{self.name}"

    def refuse(self, dtype: pl.DataType) -> str | None:
        if dtype.is_numeric() or dtype in (pl.Boolean, pl.Null):
            return None
        of_text = (
            f" (of CSV files, --source types.{self.source}=float makes other values bad rows, and --source decimal=, "
            "reads numbers such as 1,5)"
        )
        cure = of_text if dtype == pl.String else ""
        return f"numbers are integers, floats, decimals or booleans; got {dtype}: cast it, or make it categorical{cure}"

    @property
    def takes_floats(self) -> bool:
        return True

    def checks(self, dtype: pl.DataType) -> bool:
        return self.clip is None and not dtype.is_integer() and dtype not in (pl.Boolean, pl.Null)

    def faults(self, values: pl.Series) -> list[Fault]:
        number = values.cast(pl.Float64).fill_nan(None)
        if self.clip is not None:
            return []
        wrong = number.abs() > (MAX_FLOAT if self.transform is None else math.inf)
        wrong = wrong | number.is_infinite()
        return cast_faults(values, wrong, "infinite, or too large for a 32-bit float: clip it or take its logarithm")

    def numbers(self, values: pl.Series) -> pl.Series:
        """Float64, clipped and transformed; null where missing."""
        x = values.cast(pl.Float64).fill_nan(None)
        if self.clip is not None:
            x = x.clip(*self.clip)
        if self.transform == "log":
            x = x.sign() * x.abs().log1p()
        return x

    def learner(self, dtypes: Sequence[pl.DataType], limits: Limits) -> NumericLearner:
        return NumericLearner(self, limits)


class Moments:
    """Count, mean and squared deviations of a stream, which do not depend on the pieces it comes in.

    >>> a, b = Moments(), Moments()
    >>> x = np.random.default_rng(0).normal(5, 2, 100_000)
    >>> a.add(x); b.add(x[:12_345]); b.add(x[12_345:])
    >>> a.finish() == b.finish(), round(a.mean, 2)
    (True, 5.0)
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self._rest: NDArray[np.float64] = np.zeros(0)

    def add(self, values: NDArray[np.float64]) -> None:
        """Some more values."""
        joined = np.concatenate([self._rest, values]) if len(self._rest) else values
        whole = len(joined) // _BLOCK * _BLOCK
        for block in joined[:whole].reshape(-1, _BLOCK):
            self._merge(block)
        self._rest = joined[whole:].copy()

    def _merge(self, x: NDArray[np.float64]) -> None:
        # Means of blocks are joined (Chan et al., 1979), so that large numbers of a small spread keep their digits.
        mean, total = float(x.mean()), self.count + len(x)
        shift = mean - self.mean
        self.squares += float(np.square(x - mean).sum()) + shift * shift * self.count * len(x) / total
        self.mean += shift * len(x) / total
        self.count = total

    def finish(self) -> tuple[float, float]:
        """Mean and standard deviation of all values; 0 where there are none."""
        if len(self._rest):
            self._merge(self._rest)
            self._rest = np.zeros(0)
        return self.mean, math.sqrt(self.squares / self.count) if self.count else 0.0


class NumericLearner:
    """Moments of the training rows, and a sample of them for quantiles: all of them up to ``limits.sample``."""

    def __init__(self, column: Numeric, limits: Limits) -> None:
        self.missing, self.moments = 0, Moments()
        self.sample = Sample(limits.sample) if column.buckets or column.fill == "median" else None

    def add(self, column: LearnedColumn, values: pl.Series) -> None:
        if not isinstance(column, Numeric):
            raise TypeError(f"{column.name} is not numeric")
        x = column.numbers(values).drop_nulls().to_numpy()
        self.missing += len(values) - len(x)
        self.moments.add(x)
        if self.sample is not None:
            self.sample.add(x)

    def result(self, column: LearnedColumn) -> NumericEncoder | BucketEncoder:
        if not isinstance(column, Numeric):
            raise TypeError(f"{column.name} is not numeric")
        if column.buckets is not None and self.sample is not None:
            return BucketEncoder.of_sample(column, self.sample, self.missing)
        mean, std = self.moments.finish()
        shift, scale = (mean, std or 1.0) if column.standardise else (0.0, 1.0)
        if isinstance(column.fill, str):
            middle = mean
            if self.sample is not None:
                middle = float(np.median(self.sample.values())) if self.moments.count else 0.0
            fill = (middle - shift) / scale
        else:
            fill = column.fill
        return NumericEncoder(column, float(fill), shift, scale, mean, std, self.missing)


class Sample:
    """A uniform sample of a stream, the same for the same stream: all values while there is room.

    >>> sample = Sample(100)
    >>> sample.add(np.arange(1000.0)); 50 < len(sample.values()) <= 100
    True
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen, self._level = size, 0, 0
        self._values: list[NDArray[np.float64]] = []
        self._marks: list[NDArray[np.uint64]] = []

    def add(self, values: NDArray[np.float64]) -> None:
        """Some more values."""
        marks = random_bits(0x5A3B1E, self.seen, len(values))
        self.seen += len(values)
        keep = self._kept(marks)
        self._values.append(values[keep])
        self._marks.append(marks[keep])
        while sum(map(len, self._values)) > self.size:
            self._level += 1
            joined, all_marks = np.concatenate(self._values), np.concatenate(self._marks)
            keep = self._kept(all_marks)
            self._values, self._marks = [joined[keep]], [all_marks[keep]]

    def _kept(self, marks: NDArray[np.uint64]) -> NDArray[np.bool_]:
        kept: NDArray[np.bool_] = (marks & np.uint64((1 << self._level) - 1)) == 0
        return kept

    def values(self) -> NDArray[np.float64]:
        """The sample, sorted."""
        return np.sort(np.concatenate(self._values)) if self._values else np.zeros(0)


@dataclass(frozen=True)
class SavedNumeric(FilePart):
    """What a numeric column learned, see :class:`NumericEncoder`."""

    fill: float
    shift: float
    scale: float
    mean: float
    std: float
    missing: int


@dataclass(frozen=True)
class SavedBuckets(FilePart):
    """What a column of buckets learned besides its vocabulary."""

    vocab: str
    missing_count: int


@dataclass(frozen=True)
class NumericEncoder(Encoder):
    """A number to a float, and to an indicator where it is missing.

    Args:
        fill: what a missing number becomes.
        shift, scale: subtracted and divided by.
        mean, std, missing: of the training rows, after clip and transform.
    """

    saved = SavedNumeric
    fill: float
    shift: float
    scale: float
    mean: float
    std: float
    missing: int

    @property
    def dense(self) -> tuple[str, ...]:
        column: Any = self.column
        return (column.name, f"{column.name}_missing") if column.indicator else (column.name,)

    def encode(self, values: pl.Series) -> Encoded:
        column: Any = self.column
        x = column.numbers(values)
        gone = x.is_null()
        y = (x - self.shift) / self.scale if column.standardise else x
        names = self.dense
        found = {names[0]: y.fill_null(self.fill).cast(pl.Float32).alias(names[0])}
        if column.indicator:
            found[names[1]] = gone.cast(pl.Float32).alias(names[1])
        null = values.null_count()
        return Encoded(found, {"null": null, "nan": int(gone.sum()) - null})

    def learned(self) -> JSON:
        return saved_values(self)

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Any:
        if column.buckets is not None:
            return BucketEncoder.restore(column, learned, vocabularies)
        return cls(column, **read_saved(SavedNumeric, learned, column.where()))


@dataclass(frozen=True)
class BucketEncoder(Encoder):
    """A number to the id of its bucket: 1 to n in order of the numbers, 0 where it is missing.

    Its vocabulary holds the lowest number of every bucket, minus infinity for the first.
    """

    saved = SavedBuckets
    known: ValueVocabulary

    @classmethod
    def of_sample(cls, column: Numeric, sample: Sample, missing: int) -> BucketEncoder:
        """Buckets of equally many values of a sample; those that are equal are one."""
        x = sample.values()
        n = column.buckets or 2
        inner = np.unique(x[[len(x) * i // n for i in range(1, n)]]) if len(x) else np.zeros(0)
        inner = inner[inner > x[0]] if len(x) else inner
        edges = np.concatenate([[-np.inf], inner])
        counts = np.bincount(np.searchsorted(inner, x, side="right"), minlength=len(edges))
        counts = np.round(counts * (sample.seen / max(1, len(x)))).astype(np.int64)
        ids = np.arange(1, len(edges) + 1, dtype=np.int32)
        known = ValueVocabulary(column.name, pl.Series("value", edges), ids, counts, 0, missing, 0)
        return cls(column, known)

    @property
    def vocabulary(self) -> ValueVocabulary:
        return self.known

    @property
    def features(self) -> tuple[FeatureOutput, ...]:
        return (FeatureOutput(self.column.name, "single", self.known.size, 0, self.known.name),)

    def encode(self, values: pl.Series) -> Encoded:
        column: Any = self.column
        x = column.numbers(values)
        gone = x.is_null()
        ids = np.searchsorted(self.known.values.to_numpy()[1:], x.fill_null(0.0).to_numpy(), side="right") + 1
        found = pl.Series(column.name, ids.astype(np.int32)).set(gone, 0)
        null = values.null_count()
        return Encoded({column.name: found}, {"null": null, "nan": int(gone.sum()) - null})

    def counts(self) -> FieldCounts:
        """Training rows of every bucket that has some."""
        filled = self.known.counts > 0
        return FieldCounts(self.known.ids[filled], self.known.counts[filled], self.known.missing_count)

    def learned(self) -> JSON:
        return {"vocab": vocabulary_file(self.known.name), "missing_count": self.known.missing_count}

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        missing = learned_value(learned, "missing_count", column.where())
        file = learned_value(learned, "vocab", column.where())
        return cls(column, vocabularies.read(file, column.name, missing_count=missing))
