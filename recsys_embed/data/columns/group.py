"""Groups of rows that metrics are taken within: a user, a query, a session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import polars as pl

from recsys_embed.data.columns.base import Encoded, Encoder, FixedColumn, Vocabularies
from recsys_embed.data.columns.categorical import StringIds, raw_ids
from recsys_embed.data.columns.vocabulary import plain, refuse_values, value_type
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class Group(FixedColumn):
    """The group of a row, as a 64-bit id: of strings that of :func:`recsys_embed.string_ids`, of integers themselves.

    Rows whose value is missing are one group.

    >>> Group("group", column="user").entry()
    {'name': 'group', 'kind': 'group', 'column': 'user'}
    """

    kind: ClassVar[str] = "group"

    @property
    def part(self) -> str | None:
        return "group"

    def refuse(self, dtype: pl.DataType) -> str | None:
        if dtype.is_float():
            return f"groups are integers or strings; got {dtype}: cast the column"
        return refuse_values(dtype)

    def fixed(self, dtype: pl.DataType) -> GroupEncoder:
        return GroupEncoder(self)


@dataclass(frozen=True)
class GroupEncoder(Encoder):
    """A group to the folder's ``group``, Int64."""

    @cached_property
    def _strings(self) -> StringIds:
        return StringIds()

    def encode(self, values: pl.Series) -> Encoded:
        keys, odd = plain(values, value_type(values.dtype) or pl.String())
        return Encoded(
            {"group": raw_ids(keys, self._strings).alias("group")}, {"null": values.null_count(), "empty": odd}
        )

    def learned(self) -> JSON:
        return {}

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        return cls(column)
