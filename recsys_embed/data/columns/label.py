"""Labels: what is predicted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import polars as pl

from recsys_embed.data.columns.base import Encoded, Encoder, Fault, FixedColumn, Vocabularies, cast_faults
from recsys_embed.data.columns.numeric import MAX_FLOAT
from recsys_embed.utils.settings import param
from recsys_embed.utils.types import JSON

WORDS = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
"""Texts that are binary labels."""


@dataclass(frozen=True)
class Label(FixedColumn):
    """The label of a row; null and NaN are faults.

    Args:
        task: ``"binary"``: 0 or 1 (numbers, booleans, or the words true, false, yes, no); ``"real"``: any number.
        threshold: numbers from this one on are 1, others 0, as ratings of 4 and 5 stars become clicks.
        positive: the value that is 1, where all others are 0.

    >>> Label("stars", threshold=4.0).entry()
    {'name': 'stars', 'kind': 'label', 'threshold': 4.0}
    """

    kind: ClassVar[str] = "label"
    task: Literal["binary", "real"] = "binary"
    threshold: float | None = param(None)
    positive: str | int | None = param(None)

    def conflicts(self) -> list[str]:
        faults = []
        if self.threshold is not None and self.positive is not None:
            faults.append("give `threshold` or `positive`, not both")
        if self.task == "real" and (self.threshold is not None or self.positive is not None):
            faults.append("`threshold` and `positive` make a binary label; leave out `task`")
        return faults

    @property
    def part(self) -> str | None:
        return "label"

    @property
    def takes_floats(self) -> bool:
        return self.task == "real" or self.threshold is not None

    def refuse(self, dtype: pl.DataType) -> str | None:
        words = self.task == "binary" and self.threshold is None
        if dtype.is_numeric() or dtype == pl.Boolean or (words and dtype in (pl.String, pl.Categorical, pl.Enum)):
            return self._refuse_positive(dtype)
        return f"a label is a number{', a boolean or a word' if words else ''}; got {dtype}"

    def _refuse_positive(self, dtype: pl.DataType) -> str | None:
        """Why no label of a type can be ``positive``, or None."""
        if dtype == pl.Boolean and self.positive is not None and self._positive not in ("true", "false"):
            return f'`positive` of booleans is "true" or "false"; got {self.positive!r}'
        text = self._positive
        fits = re.fullmatch(r"[+-]?\d+", text) if dtype.is_integer() else _number(text) is not None
        if dtype.is_numeric() and self.positive is not None and not fits:
            return f"`positive` of {dtype} is one of its numbers; got {self.positive!r}"
        return None

    @property
    def _positive(self) -> str:
        return str(self.positive).strip().lower()

    def checks(self, dtype: pl.DataType) -> bool:
        return True

    def faults(self, values: pl.Series) -> list[Fault]:
        missing = values.is_null()
        if values.dtype.is_float():
            missing = missing | values.is_nan().fill_null(False)
        found = cast_faults(values, missing, "the label is missing")
        number = self.numbers(values)
        wrong = ~missing & (number.is_null() | (number.abs() > MAX_FLOAT))
        want = "a finite number" if self.task == "real" or self.threshold is not None else "0 or 1"
        cure = "" if self.task == "real" else ': give `threshold` or `positive`, or `task = "real"`'
        if self.task == "binary":
            wrong = wrong | (~missing & (number != 0) & (number != 1)).fill_null(False)
        return found + cast_faults(values, wrong, f"the label is not {want}{cure}")

    def numbers(self, values: pl.Series) -> pl.Series:
        """Float64 of each label, null where it is none."""
        if self.positive is not None:
            if values.dtype.is_numeric() and not values.dtype.is_integer():
                return (values.cast(pl.Float64).fill_nan(None) == _number(self._positive)).cast(pl.Float64)
            text = self._positive if values.dtype == pl.Boolean else str(self.positive)
            text = str(int(text)) if values.dtype.is_integer() else text
            return (values.cast(pl.String) == text).cast(pl.Float64)
        if values.dtype in (pl.String, pl.Categorical, pl.Enum):
            words = values.cast(pl.String).str.to_lowercase().str.strip_chars()
            return words.replace_strict(WORDS, default=None, return_dtype=pl.Float64)
        number = values.cast(pl.Float64)
        return number if self.threshold is None else (number >= self.threshold).cast(pl.Float64)

    def fixed(self, dtype: pl.DataType) -> LabelEncoder:
        return LabelEncoder(self)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class LabelEncoder(Encoder):
    """A label to the folder's ``label``: Int8 where it is binary, else Float32."""

    def encode(self, values: pl.Series) -> Encoded:
        column: Any = self.column
        kind = pl.Int8 if column.task == "binary" else pl.Float32
        return Encoded({"label": column.numbers(values).cast(kind).alias("label")})

    def learned(self) -> JSON:
        return {}

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        return cls(column)
