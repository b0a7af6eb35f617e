"""What all backends share: a table's place in a storage, the gather of rows, and absent ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.derivatives import transformed
from recsys_embed.kernels.recording import hidden, recording, unmapped


class Place(NamedTuple):
    """Where a table lives: rows ``[offset, offset + table.rows)`` of a storage."""

    storage: str
    offset: int


GradientLayout = Literal["dense", "sparse", "rows"]
"""Of a table's gradient: a tensor like the table, torch's sparse tensor, or a RowGradient."""

Gather = Callable[[str, Tensor, bool], Tensor]
"""Reads rows of a storage: (name, int64 ``[n]``, whether rows may be -1) -> ``[n, width]``."""


def absent_ids(ids: Tensor) -> Tensor | None:
    """Mask of ids that are -1, no id: bool of their shape; None if there are none, which is checked on the CPU only."""
    absent = ids == -1
    eager = ids.device.type == "cpu" and not hidden(ids)
    return None if eager and not bool(absent.any()) else absent


def check_rows(rows: Tensor, size: Tensor | int, transform: str) -> None:
    """Raise if rows lie beyond their table: in a storage of several tables they would belong to another one.

    Args:
        rows: int64, of any shape.
        size: rows of the table; broadcasts with ``rows``.
        transform: its name, for the message.

    Raises:
        IdRangeError: on the CPU; on a GPU and in compiled code, a torch assertion fails instead.
    """
    beyond = unmapped(rows) >= size
    if rows.device.type != "cpu" or recording():
        torch._assert_async(~beyond.any(), f"{transform} gave a row beyond its table")
    elif bool(beyond.any()):
        row = int(unmapped(rows)[beyond][0])
        most = int(torch.as_tensor(size).expand(beyond.shape)[beyond][0])
        raise IdRangeError(
            f"{transform} gave row {row} of a table of {most} rows: its `map` must give rows below that, or -1 where "
            "an id has none"
        )


def read_rows(weight: Tensor, rows: Tensor, partial: bool, sparse: bool) -> Tensor:
    """``weight[rows]`` of int64 ``rows [n]``, with ordinary gradients; with ``partial``, rows may be -1.

    Sparse gradients leave these rows out, because a sparse optimizer updates every row in its gradient.
    """
    if not partial or not sparse or transformed():
        return F.embedding(rows.clamp_min(0) if partial else rows, weight, sparse=sparse)
    present = (rows >= 0).nonzero().squeeze(1)
    read = F.embedding(rows[present], weight, sparse=True)
    return weight.new_zeros(rows.shape[0], weight.shape[1]).index_copy(0, present, read)
