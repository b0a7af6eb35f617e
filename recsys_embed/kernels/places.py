"""Vocabulary of every backend: the place of a table in a storage, the gather function, and absent ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_embed.errors import IdRangeError


class Place(NamedTuple):
    """Where a table lives: rows ``[offset, offset + table.rows)`` of a storage."""

    storage: str
    offset: int


Gather = Callable[[str, Tensor, bool], Tensor]
"""Reads rows of a storage: its name, int64 ``[n]``, whether some rows may be -1; to ``[n, width]``."""


def absent_ids(ids: Tensor) -> Tensor | None:
    """Where ids are -1, "none": bool of their shape; None if nowhere, which only the CPU tells without a wait."""
    absent = ids < 0
    eager = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if eager and not bool(absent.any()) else absent


def check_rows(rows: Tensor, size: Tensor | int, transform: str) -> None:
    """Refuse rows beyond their table, which in a storage of many tables would be those of another feature.

    Args:
        rows: int64, of any shape.
        size: rows of the table; broadcasts with ``rows``.
        transform: the name to blame.

    Raises:
        IdRangeError: on the CPU; elsewhere, and in compiled code, an assertion of torch fails.
    """
    beyond = rows >= size
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~beyond.any(), f"{transform} gave a row beyond its table")
    elif bool(beyond.any()):
        row = int(rows[beyond][0])
        most = int(torch.as_tensor(size).expand(rows.shape)[beyond][0])
        raise IdRangeError(
            f"{transform} gave row {row} of a table of {most} rows: its `map` must give rows below that, or -1 where "
            "an id has none"
        )
