"""Categories: one value per row becomes one id."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import polars as pl

from recsys_embed.core.hashing import EMPTY_ID, string_ids
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
)
from recsys_embed.data.columns.vocabulary import (
    MAX_WHOLE,
    TYPE_NAMES,
    VALUE_TYPES,
    ValueCounter,
    ValueVocabulary,
    joint_value_type,
    plain,
    refuse_values,
    value_type,
    vocabulary_file,
)
from recsys_embed.data.field_counts import FieldCounter, FieldCounts
from recsys_embed.features import MAX_ROWS
from recsys_embed.utils.settings import FilePart, param
from recsys_embed.utils.types import JSON

RESERVED = EMPTY_ID[64]


@dataclass(frozen=True)
class VocabularyColumn(LearnedColumn):
    """Settings of every kind whose values become ids.

    Args:
        name: of the feature.
        column: of the table; by default ``name``.
        ids: ``"vocab"``: ids by falling training frequency, 0 for unknown values; ``"raw"``: 64-bit ids without a
            vocabulary, for hashing methods: strings as :func:`recsys_embed.string_ids` has them, integers themselves.
        min_count: training occurrences a value needs to get an id. The default 2 sends values seen once to the unknown
            id: one example cannot train a row, and it is what trains the row that new values will use.
        max_size: most values a vocabulary keeps, the most frequent ones; None: all.
        vocab: name of a vocabulary that several columns share, e.g. of a target item and the history.
    """

    ids: Literal["vocab", "raw"] = "vocab"
    min_count: int = param(2, low=1)
    max_size: int | None = param(None, low=1)
    vocab: str | None = param(None)

    @property
    def learns(self) -> str:
        return f"{self.ids}:{self.vocab or self.name}"

    def conflicts(self) -> list[str]:
        faults = []
        if self.ids == "raw":
            changed = [n for n, d in (("min_count", 2), ("max_size", None)) if getattr(self, n) != d]
            faults += [f'`{n}` is of a vocabulary, which `ids = "raw"` does without' for n in changed]
        if self.vocab is not None and (not self.vocab or "." in self.vocab or "#" in self.vocab):
            faults.append(f"`vocab` must not be empty, nor contain '.' or '#'; got {self.vocab!r}")
        return faults

    # -- what a kind says of its values ------------------------------------------------------------------------------

    def flat(self, values: pl.Series) -> pl.Series:
        """All values of some rows."""
        return values

    def flat_type(self, dtype: pl.DataType) -> pl.DataType:
        """Their type, by that of the column."""
        return dtype

    @abstractmethod
    def encoder(self, **learned: Any) -> VocabularyEncoder:
        """The encoder of this kind."""

    # -- learning ----------------------------------------------------------------------------------------------------

    def learner(self, dtypes: Sequence[pl.DataType], limits: Limits) -> VocabularyLearner | RawLearner:
        dtype = joint_value_type(dtypes, self.vocab or self.name)
        return RawLearner(limits) if self.ids == "raw" else VocabularyLearner(self, dtype, limits)

    def whole_faults(self, flat: pl.Series) -> pl.Series | None:
        """Where values are floats that are no integers, or integers that raw ids keep for the missing value."""
        if flat.dtype.is_float():
            number = flat.fill_nan(None)
            return (number != number.floor()) | (number.abs() > MAX_WHOLE)
        if self.ids == "raw" and flat.dtype in (pl.Int64, pl.UInt64):
            return flat == (RESERVED if flat.dtype == pl.Int64 else 1 << 63)
        return None


@dataclass(frozen=True)
class Categorical(VocabularyColumn):
    """One category per row.

    Strings, booleans, integers of every width, dates, times to the microsecond, and floats that hold whole numbers.
    Null, the empty string and NaN are one missing value; it gets an id of its own where training has it ``min_count``
    times, else 0.

    >>> Categorical("user", min_count=5).entry()
    {'name': 'user', 'kind': 'categorical', 'min_count': 5}
    """

    kind: ClassVar[str] = "categorical"

    def refuse(self, dtype: pl.DataType) -> str | None:
        return refuse_values(dtype)

    def checks(self, dtype: pl.DataType) -> bool:
        return dtype.is_float() or (self.ids == "raw" and dtype in (pl.Int64, pl.UInt64))

    def faults(self, values: pl.Series) -> list[Fault]:
        wrong = self.whole_faults(values)
        return [] if wrong is None else cast_faults(values, wrong, reason(values.dtype))

    def encoder(self, **learned: Any) -> CategoricalEncoder:
        return CategoricalEncoder(self, **learned)


def reason(dtype: pl.DataType) -> str:
    """Why a value of a type is refused by ``whole_faults``."""
    if dtype.is_float():
        return "not a whole number up to 2^53, as a category must be: make the column integers or strings"
    return f"{RESERVED} is the id of the missing value"


class VocabularyLearner:
    """Counts the values of all columns of one vocabulary."""

    def __init__(self, column: VocabularyColumn, dtype: pl.DataType, limits: Limits) -> None:
        self.name, self.dtype = column.vocab or column.name, dtype
        self.settings = column
        self.counter = ValueCounter(self.name, dtype, limits.distinct)
        self._made: ValueVocabulary | None = None

    def add(self, column: LearnedColumn, values: pl.Series) -> None:
        if not isinstance(column, VocabularyColumn):
            raise TypeError(f"{column.name} has no vocabulary")
        keys, _ = plain(column.flat(values), self.dtype)
        # A missing value inside of a list is none of its values.
        self.counter.add(keys, keys.null_count() if column.kind == Categorical.kind else 0)

    def counts(self) -> FieldCounts:
        """What was counted."""
        found = self.counter.counted()
        return FieldCounts(found["value"].to_numpy(), found["count"].to_numpy(), self.counter.missing)

    def vocabulary(self) -> ValueVocabulary:
        """The vocabulary of everything added."""
        if self._made is None:
            self._made = ValueVocabulary.of_counts(
                self.name,
                self.counter.counted(),
                self.counter.missing,
                min_count=self.settings.min_count,
                max_size=self.settings.max_size,
            )
        return self._made

    def result(self, column: LearnedColumn) -> VocabularyEncoder:
        if not isinstance(column, VocabularyColumn):
            raise TypeError(f"{column.name} has no vocabulary")
        return column.encoder(known=self.vocabulary(), dtype=self.dtype)


class RawLearner:
    """Estimates how many distinct raw ids a column has."""

    def __init__(self, limits: Limits) -> None:
        self.counter = FieldCounter(max_rows=limits.sample, max_distinct=min(limits.distinct, limits.sample))
        self.dtypes: dict[str, pl.DataType] = {}
        self.strings = StringIds()

    def add(self, column: LearnedColumn, values: pl.Series) -> None:
        if not isinstance(column, VocabularyColumn):
            raise TypeError(f"{column.name} has no ids")
        flat = column.flat(values)
        dtype = self.dtypes[column.name] = value_type(flat.dtype) or pl.String()
        keys, _ = plain(flat, dtype)
        # A missing value inside of a list is none of its values.
        keys = keys if column.kind == Categorical.kind else keys.drop_nulls()
        self.counter.add(raw_ids(keys, self.strings).to_numpy(), keys.is_null().to_numpy())

    def counts(self) -> FieldCounts:
        """What was counted, or a sample of it."""
        return self.counter.result()

    def result(self, column: LearnedColumn) -> VocabularyEncoder:
        if not isinstance(column, VocabularyColumn):
            raise TypeError(f"{column.name} has no ids")
        counts = self.counter.result()
        distinct = (len(counts.values) << counts.level) + (counts.missing > 0)
        dtype = self.dtypes.get(column.name, pl.String())
        return column.encoder(known=None, dtype=dtype, distinct=max(1, distinct), estimated=counts.level > 0)


class StringIds:
    """Ids of strings, each hashed once while there is room for it, since Python hashes them one by one."""

    def __init__(self, room: int = 1 << 20) -> None:
        self._room = room
        self._known: pl.DataFrame | None = None

    def __call__(self, keys: pl.Series) -> pl.Series:
        """Int64 ids of strings without nulls; may run in several threads."""
        frame, known = keys.to_frame("value"), self._known
        if known is None:
            fresh = keys.unique()
        else:
            fresh = frame.join(known, on="value", how="anti")["value"].unique()
        if len(fresh):
            more = pl.DataFrame({"value": fresh, "id": string_ids(fresh.to_list()).numpy()})
            known = more if known is None else pl.concat([known, more])
            if len(known) <= self._room:
                self._known = known
        if known is None:
            return pl.Series("id", [], dtype=pl.Int64)
        return frame.join(known, on="value", how="left", maintain_order="left")["id"]


def raw_ids(keys: pl.Series, strings: StringIds) -> pl.Series:
    """64-bit ids of values in a vocabulary's type, as :func:`recsys_embed.string_ids` has them: Int64, no nulls.

    A missing string has the id that it gives an empty one; a missing number the one that no number may have.
    """
    if keys.dtype == pl.String:
        return strings(keys.fill_null(""))
    if keys.dtype == pl.UInt64:
        return pl.Series("id", keys.fill_null(1 << 63).to_numpy().view(np.int64))
    return keys.to_physical().cast(pl.Int64).fill_null(RESERVED)


@dataclass(frozen=True)
class SavedIds(FilePart):
    """What a column whose values become ids learned besides its vocabulary, see :class:`VocabularyEncoder`."""

    type: Literal["string", "integer", "unsigned", "bool", "date", "time"]
    vocab: str | None = None
    missing_count: int = 0
    unknown_count: int = 0
    distinct: int = param(1, low=1)
    estimated: bool = False


@dataclass(frozen=True)
class VocabularyEncoder(Encoder):
    """Values to ids.

    Args:
        known: the vocabulary; None: raw ids.
        dtype: type of the values.
        distinct: raw ids: distinct values in training, or an estimate.
    """

    saved = SavedIds
    known: ValueVocabulary | None
    dtype: pl.DataType
    distinct: int = 1
    estimated: bool = False

    @property
    def vocabulary(self) -> ValueVocabulary | None:
        return self.known

    @cached_property
    def _strings(self) -> StringIds:
        return StringIds()

    @property
    def missing_id(self) -> int:
        """Id of a missing value."""
        if self.known is not None:
            return self.known.missing_id
        return EMPTY_ID[32] if self.dtype == pl.String else RESERVED

    @property
    def num_embeddings(self) -> int:
        """Rows that a table needs, or distinct values."""
        return self.known.size if self.known is not None else min(self.distinct, MAX_ROWS)

    def refuse(self, dtype: pl.DataType) -> str | None:
        column: Any = self.column
        if self.writes_numbers(dtype):
            return None
        why = column.refuse(dtype)
        flat = None if why is not None else column.flat_type(dtype)
        found = None if flat is None or flat == pl.Null else value_type(flat)
        if found is None or found == self.dtype or (found.is_integer() and self.dtype.is_integer()):
            return why
        return f"it learned values of type {TYPE_NAMES[str(self.dtype)]}; got {dtype}: cast the column"

    def writes_numbers(self, dtype: pl.DataType) -> bool:
        """Whether values of a type are numbers where texts were learned: they are read as their decimals."""
        column: Any = self.column
        if self.dtype != pl.String or isinstance(dtype, pl.List | pl.Array) != hasattr(column, "lists"):
            return False
        return bool(column.flat_type(dtype).is_numeric())

    def checks(self, dtype: pl.DataType) -> bool:
        column: Any = self.column
        return bool(column.flat_type(dtype).is_float()) if self.writes_numbers(dtype) else super().checks(dtype)

    def faults(self, values: pl.Series) -> list[Fault]:
        column: Any = self.column
        if not self.writes_numbers(values.dtype):
            return super().faults(values)
        if not column.flat_type(values.dtype).is_float():
            return []
        if values.dtype.is_numeric():
            wrong = values.is_infinite()
        else:
            wrong = column.lists(values).list.eval(pl.element().is_infinite()).list.any()
        return cast_faults(values, wrong, "infinity is no category")

    def keys(self, values: pl.Series) -> tuple[pl.Series, int]:
        """Values in the vocabulary's type, see :func:`plain`; raw integers in their own, with a sign or without."""
        own = value_type(values.dtype)
        raw = self.known is None and own is not None and own.is_integer() and self.dtype.is_integer()
        return plain(values, own if raw and own is not None else self.dtype)

    def ids(self, keys: pl.Series) -> pl.Series:
        """Ids of values that were made plain; nulls become 0, or the raw id of the missing value."""
        return raw_ids(keys, self._strings) if self.known is None else self.known.find(keys)

    def learned(self) -> JSON:
        of_type = {"type": TYPE_NAMES[str(self.dtype)]}
        if self.known is None:
            return {**of_type, "distinct": self.distinct, "estimated": self.estimated}
        known = self.known
        return {
            **of_type,
            "vocab": vocabulary_file(known.name),
            "size": known.size,
            "missing_count": known.missing_count,
            "unknown_count": known.unknown_count,
        }

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        where = column.where()
        dtype = VALUE_TYPES[learned_value(learned, "type", where)]
        if column.ids == "raw":
            return cls(column, None, dtype, learned_value(learned, "distinct", where), bool(learned.get("estimated")))
        file = learned_value(learned, "vocab", where)
        known = vocabularies.read(
            file,
            column.vocab or column.name,
            missing_count=learned_value(learned, "missing_count", where),
            unknown_count=learned_value(learned, "unknown_count", where),
        )
        return cls(column, known, dtype)


@dataclass(frozen=True)
class CategoricalEncoder(VocabularyEncoder):
    """One value to one id."""

    @property
    def features(self) -> tuple[FeatureOutput, ...]:
        column: Any = self.column
        vocab = None if self.known is None else self.known.name
        return (
            FeatureOutput(
                column.name, "single", self.num_embeddings, self.missing_id, vocab, self.estimated, column.vocab
            ),
        )

    def encode(self, values: pl.Series) -> Encoded:
        keys, odd = self.keys(values)
        null = values.is_null()
        counts = {"null": int(null.sum()), "empty": odd}
        ids = self.ids(keys)
        if self.known is not None:
            gone = null if not odd else null | _odd(values)
            unknown = int((ids == 0).sum())
            if gone.any():
                unknown -= int((gone & (ids == 0)).sum())
                ids = ids.set(gone, self.missing_id)
            counts["unknown"] = unknown
        return Encoded({self.column.name: ids.alias(self.column.name)}, counts)


def _odd(values: pl.Series) -> pl.Series:
    """Where a value is an empty string or NaN."""
    if values.dtype.is_float():
        return values.is_nan().fill_null(False)
    return (values.cast(pl.String).str.len_bytes() == 0).fill_null(False)


def all_unknown(counts: Mapping[str, int], rows: int) -> bool:
    """Whether some values were looked up in a vocabulary and none was known, by what encoders count.

    >>> all_unknown({"null": 1, "empty": 0, "unknown": 3}, 4), all_unknown({"null": 4, "empty": 0, "unknown": 0}, 4)
    (True, False)
    """
    values = counts["values"] if "values" in counts else rows - counts.get("null", 0) - counts.get("empty", 0)
    return values > 0 and counts.get("unknown", 0) == values
