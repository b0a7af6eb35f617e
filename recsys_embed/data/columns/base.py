"""What a column of a table is: how it is checked, learned from the training rows, and encoded.

A kind of column is two small classes: a :class:`Column`, the configuration a user writes, and an :class:`Encoder`, what
the training rows taught. Converting, ``--like``, the export and serving use the same encoder, so they cannot disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, Self

import polars as pl

from recsys_embed.errors import DataError
from recsys_embed.utils.settings import FilePart, Settings, build, param
from recsys_embed.utils.types import JSON, JSONMapping

Form = Literal["single", "list", "sequence"]
PARTS = ("label", "weight", "group", "time")
"""Columns of a shard that are no features: the training's own names."""


@dataclass(frozen=True)
class Limits:
    """What learning may hold: distinct values of one vocabulary, and values of a column's sample."""

    distinct: int = 1 << 62
    sample: int = 1 << 20


@dataclass(frozen=True)
class Fault:
    """Values that cannot be used: a mask over the rows, and why."""

    rows: pl.Series
    reason: str


@dataclass(frozen=True)
class FeatureOutput:
    """A feature that a column gives: ids in a column of the shards.

    Args:
        name: of the feature.
        form: ``"single"``: one id per row; ``"list"`` and ``"sequence"``: any number.
        num_embeddings: rows a table needs, or the distinct training values (raw ids), ``estimated`` or exact.
        missing_id: id of a value that is missing.
        vocab: name of the vocabulary that it shares or has; None with raw ids.
        table: the vocabulary, where the schema says that columns share it.
        max_length: of a list or a sequence.
    """

    name: str
    form: Form
    num_embeddings: int
    missing_id: int
    vocab: str | None
    estimated: bool = False
    table: str | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Encoded:
    """Encoded rows: columns of the shards by name, and counts of what needed a treatment, e.g. ``{"null": 3}``."""

    columns: dict[str, pl.Series]
    counts: dict[str, int] = field(default_factory=dict)


class Learner(Protocol):
    """Learns a column, or the vocabulary of several, from the training rows, chunk by chunk."""

    def add(self, column: LearnedColumn, values: pl.Series) -> None:
        """Some more training rows of a column."""
        ...

    def result(self, column: LearnedColumn) -> Encoder:
        """The encoder of a column, once all rows were added."""
        ...


class Vocabularies(Protocol):
    """Where the vocabularies of encoders that are read back come from: a data folder, or an exported file."""

    def read(self, file: str, name: str, *, missing_count: int = 0, unknown_count: int = 0) -> Any:
        """A vocabulary by its file in the data folder that it was learned in."""
        ...


@dataclass(frozen=True)
class Column(Settings, ABC):
    """A column of a table, as the schema has it; each kind is a :class:`LearnedColumn` or a :class:`FixedColumn`.

    Args:
        name: of what it gives: a feature, a numeric column, ...
        column: of the table it is read from; by default ``name``.
    """

    kind: ClassVar[str]
    noun: ClassVar[str] = "setting"
    name: str
    column: str | None = param(None)

    def where(self) -> str:
        return f"column {self.name!r:.80}, kind {self.kind}"

    @classmethod
    def from_dict(cls, data: JSONMapping) -> Self:
        return build(cls, data, cls.noun, where=f"column {data.get('name')!r:.80}, kind {cls.kind}")

    @property
    def source(self) -> str:
        """The table's column it is read from."""
        return self.name if self.column is None else self.column

    @property
    def learns(self) -> str | None:
        """Columns of one such name learn together: the vocabulary's name, the column's own, or None: nothing."""
        return None

    @property
    def part(self) -> str | None:
        """The part of a batch that this column gives (one of ``PARTS``), or None."""
        return None

    @property
    def takes_floats(self) -> bool:
        """Whether its values are numbers of any kind, so that text which looks like integers is read as floats."""
        return False

    @abstractmethod
    def refuse(self, dtype: pl.DataType) -> str | None:
        """Why values of a type cannot be encoded, or None."""

    def checks(self, dtype: pl.DataType) -> bool:
        """Whether values of a type may be faulty; where not, they are not read to be checked."""
        return False

    def faults(self, values: pl.Series) -> list[Fault]:
        """Rows whose values cannot be used."""
        return []

    def entry(self) -> JSON:
        """JSON: name, kind and the settings that differ from their defaults."""
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "name" and value != f.default:
                changed[f.name] = list(value) if isinstance(value, tuple) else value
        return {"name": self.name, "kind": self.kind, **changed}


@dataclass(frozen=True)
class LearnedColumn(Column):
    """A kind of column that learns from the training rows."""

    @property
    @abstractmethod
    def learns(self) -> str:
        """Columns of one such name learn together: the vocabulary's name, or the column's own."""

    @abstractmethod
    def learner(self, dtypes: Sequence[pl.DataType], limits: Limits) -> Learner:
        """What learns this column and those that it shares a vocabulary with; ``dtypes`` are the types of all."""


@dataclass(frozen=True)
class FixedColumn(Column):
    """A kind of column that learns nothing."""

    @abstractmethod
    def fixed(self, dtype: pl.DataType) -> Encoder:
        """The encoder."""


@dataclass(frozen=True)
class Encoder(ABC):
    """What turns values of a column into the columns of a shard; made by a :class:`Learner`, or read back."""

    column: Column
    saved: ClassVar[type[FilePart]]
    """What manifests and exported files hold of what an input of models learned: names and types of its values."""

    @property
    def features(self) -> tuple[FeatureOutput, ...]:
        """The features it gives."""
        return ()

    @property
    def dense(self) -> tuple[str, ...]:
        """The numeric columns it gives, as the manifest names them."""
        return ()

    def refuse(self, dtype: pl.DataType) -> str | None:
        """Why values of a type cannot be encoded, or None: what was learned may narrow what the column takes."""
        return self.column.refuse(dtype)

    def checks(self, dtype: pl.DataType) -> bool:
        """Whether values of a type may be faulty, see :meth:`Column.checks`."""
        return self.column.checks(dtype)

    def faults(self, values: pl.Series) -> list[Fault]:
        """Rows whose values cannot be used, see :meth:`Column.faults`."""
        return self.column.faults(values)

    @abstractmethod
    def encode(self, values: pl.Series) -> Encoded:
        """The columns of some rows; values must be without faults."""

    @abstractmethod
    def learned(self) -> JSON:
        """What was learned, as JSON; vocabularies are in files."""

    @classmethod
    @abstractmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        """Inverse of :meth:`learned`."""

    def to_dict(self) -> JSON:
        """An entry of ``columns`` of a manifest."""
        return {**self.column.entry(), "learned": self.learned()}

    @property
    def vocabulary(self) -> Any:
        """The vocabulary that its ids come from, or None."""
        return None


def saved_values(encoder: Encoder) -> JSON:
    """The values of an encoder that are saved under their own names."""
    return {f.name: getattr(encoder, f.name) for f in fields(encoder.saved) if f.name != "place"}


def read_saved(part: type[FilePart], learned: Mapping[str, Any], where: str) -> JSON:
    """Inverse of :func:`saved_values`.

    Raises:
        DataError: values are absent.
    """
    return {f.name: learned_value(learned, f.name, where) for f in fields(part) if f.name != "place"}


def learned_value(learned: Mapping[str, Any], key: str, where: str) -> Any:
    """What a manifest says that a column learned.

    Raises:
        DataError: it does not say.
    """
    if key not in learned:
        raise DataError(f"{where}: what was learned lacks {key!r}; convert the data again")
    return learned[key]


def cast_faults(values: pl.Series, wrong: pl.Series, reason: str) -> list[Fault]:
    """One fault for the rows where ``wrong`` is true; none where it never is."""
    wrong = wrong.fill_null(False)
    return [Fault(wrong, reason)] if wrong.any() else []
