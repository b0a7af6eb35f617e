"""Sequences of categories, such as the items that a user saw last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from recsys_embed.data.columns.base import Form
from recsys_embed.data.columns.lists import ListSettings
from recsys_embed.utils.settings import param


@dataclass(frozen=True)
class Sequence(ListSettings):
    """Categories in an order that matters, oldest first; the newest ``max_length`` are kept.

    What is missing or unknown is treated as in a list. A folder holds every sequence oldest first.

    Args:
        newest: where the newest value stands in the table's lists.

    >>> Sequence("last_items", vocab="item", max_length=20).entry()
    {'name': 'last_items', 'kind': 'sequence', 'vocab': 'item', 'max_length': 20}
    """

    kind: ClassVar[str] = "sequence"
    form: ClassVar[Form] = "sequence"
    max_length: int | None = param(50, low=1)
    newest: Literal["last", "first"] = "last"

    def kept(self, lists: pl.Series) -> pl.Series:
        if self.newest == "first":
            lists = lists.list.reverse()
        return lists if self.max_length is None else lists.list.tail(self.max_length)
