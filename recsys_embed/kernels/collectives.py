"""What processes may exchange of low-precision tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from recsys_embed.errors import ConfigError


def check_collective(func: Any, args: Any) -> None:
    """Refuse a collective operation that does not know codes: nobody can add them, and only equal tables take them.

    Raises:
        ConfigError: it adds, or its tensors are not all low-precision tables of one format.
    """
    name = func._schema.name.removeprefix("c10d::").strip("_")
    if "reduce" in name:
        raise ConfigError(
            f"{name}: processes cannot add the codes of low-precision tables; add their values, table.to_dense(), and "
            "write the result back, table.copy_(values)"
        )
    if len({getattr(t, "format", None) for t in _tensors_in(args)}) > 1:
        raise ConfigError(
            f"{name}: a low-precision table is exchanged with tables of its format alone; give table.to_dense(), or "
            "table.stored with tensors of its dtype"
        )


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors_in(value)
        elif isinstance(value, Tensor):
            yield value
