"""Vocabulary of every backend: the place of a table in a storage, the gather function, and absent ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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
