"""Weights of rows in the loss; metrics count every row alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import polars as pl

from recsys_embed.data.columns.base import Encoded, Encoder, Fault, FixedColumn, Vocabularies, cast_faults
from recsys_embed.data.columns.numeric import MAX_FLOAT
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class Weight(FixedColumn):
    """How much a row counts: a finite number of at least 0; anything else, null too, is a fault.

    >>> Weight("weight", column="w").entry()
    {'name': 'weight', 'kind': 'weight', 'column': 'w'}
    """

    kind: ClassVar[str] = "weight"

    @property
    def part(self) -> str | None:
        return "weight"

    @property
    def takes_floats(self) -> bool:
        return True

    def refuse(self, dtype: pl.DataType) -> str | None:
        return None if dtype.is_numeric() or dtype == pl.Boolean else f"a weight is a number; got {dtype}"

    def checks(self, dtype: pl.DataType) -> bool:
        return True

    def faults(self, values: pl.Series) -> list[Fault]:
        number = values.cast(pl.Float64).fill_nan(None)
        found = cast_faults(values, number.is_null(), "the weight is missing")
        return found + cast_faults(values, (number < 0) | (number > MAX_FLOAT), "the weight is not in [0, infinity)")

    def fixed(self, dtype: pl.DataType) -> WeightEncoder:
        return WeightEncoder(self)


@dataclass(frozen=True)
class WeightEncoder(Encoder):
    """A weight to the folder's ``weight``, Float32."""

    def encode(self, values: pl.Series) -> Encoded:
        weight = values.cast(pl.Float32).alias("weight")
        return Encoded({"weight": weight}, {"zero": int((weight == 0).sum())})

    def learned(self) -> JSON:
        return {}

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        return cls(column)
