"""Encoded columns of a frame as the tensors of a batch: of a shard to train on, of raw rows to serve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_embed.data.list_ids import ListIds

_VECTOR_PART = re.compile(r"\[\d+\]$")


def dense_sources(dense: Iterable[str]) -> list[str]:
    """The columns that hold numeric columns: a vector is one for all its components.

    >>> dense_sources(["price", "title[0]", "title[1]"])
    ['price', 'title']
    """
    return list(dict.fromkeys(_VECTOR_PART.sub("", name) for name in dense))


def frame_inputs(
    frame: pl.DataFrame, dense: Sequence[str], ids: pl.DataFrame, lists: Sequence[str]
) -> tuple[Tensor, Tensor, ListIds | None]:
    """Numeric columns, single ids and lists of a batch.

    Args:
        frame: encoded columns.
        dense: its numeric columns, as :func:`dense_sources` names them.
        ids: the columns of single ids, in the features' order.
        lists: columns of lists of ids.

    Returns:
        float32 ``[B, num_dense]``, int32 or int64 ``[B, F]``, and lists where there are some.
    """
    rows = len(frame)
    numbers = _dense(frame, dense) if dense else np.zeros((rows, 0), "f4")
    single = ids.to_numpy(order="c") if ids.width else np.zeros((rows, 0), np.int32)
    bags = ListIds.of([_list_ids(frame[name]) for name in lists]) if lists else None
    return as_tensor(numbers), as_tensor(single), bags


def _list_ids(column: pl.Series) -> tuple[Tensor, Tensor]:
    """Values ``[n]`` and offsets ``[rows + 1]`` of a column of lists, none of which is null."""
    lengths = column.list.len().to_numpy().astype(np.int64)
    # `explode` makes one null of an empty list.
    values = column.filter(column.list.len() > 0).explode().to_numpy()
    return as_tensor(values), torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def _dense(frame: pl.DataFrame, columns: Sequence[str]) -> NDArray[Any]:
    """Numeric columns as one array [rows, num_dense]; a vector's components stand side by side."""
    vectors = [c for c in columns if isinstance(frame[c].dtype, pl.Array)]
    if not vectors:
        return frame.select(columns).to_numpy(order="c")
    numbers = [c for c in columns if c not in vectors]
    parts = [frame.select(numbers).to_numpy()] if numbers else []
    return np.ascontiguousarray(np.concatenate([*parts, *(frame[c].to_numpy() for c in vectors)], axis=1))


def as_tensor(values: NDArray[Any]) -> Tensor:
    """A tensor over the memory of an array, or of a copy where that is read-only."""
    return torch.from_numpy(np.require(values, requirements="W"))
