"""Tables that several drop-ins share."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ref

import torch
from torch import nn

from recsys_embed.core import hashing
from recsys_embed.core.program import Table
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.low_precision_states import new_table


def described(table: Table) -> str:
    """How the rows of a table are stored, in words."""
    served = f"rows served at {table.precision}"
    return served if table.training is None else f"{served} that train as {table.training}"


class SharedTables:
    """Physical tables that several drop-ins read, each stored once: every reader registers the very same parameter.

    What exchanges parameters module by module (``to_empty``, ``load_state_dict(assign=True)``) would leave every reader
    with one of its own; readers ask here which parameter has followed which, and so stay together.

    Args:
        tables: distinct by name.
        seed: of the initial weights, which are those of a collection's tables of the same names.

    >>> import recsys_embed as rse
    >>> from recsys_embed.core.program import Initializer
    >>> tables = SharedTables([Table("unified", 100, 4, Initializer("uniform", 0.05), shared=True)])
    >>> a, b = (rse.UnifiedEmbedding(1000, 16, num_buckets=100, name=n, shared=tables) for n in "ab")
    >>> a.table("unified") is b.table("unified"), sum(p.numel() for p in nn.ModuleList([a, b]).parameters())
    (True, 400)
    """

    def __init__(
        self,
        tables: Iterable[Table],
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.values: dict[str, nn.Parameter] = {}
        self._rows: dict[str, str] = {}
        for table in tables:
            where = None if device is None else torch.device(device)
            values = nn.Parameter(new_table(table, seed, where, dtype))
            with torch.no_grad():
                table.init.fill_(values, hashing.salt(seed, "init", table.name))
            self.values[table.name], self._rows[table.name] = values, described(table)
        self._moved: dict[int, tuple[ref[nn.Parameter], ref[nn.Parameter]]] = {}

    def take(self, table: Table, where: str) -> nn.Parameter:
        """The parameter of a table, which must have the shape and the rows of ``table``."""
        values = self.values[table.name]
        if values.shape != (table.rows, table.width):
            raise ConfigError(
                f"shared table {table.name!r} is {values.shape[0]} x {values.shape[1]}; {where} needs it "
                f"{table.rows} x {table.width}; give all that share it the same options"
            )
        rows = self._rows.get(table.name, described(table))
        if rows != described(table):
            raise ConfigError(
                f"shared table {table.name!r} has {rows}; {where} needs {described(table)}; give all that share it the "
                "same options"
            )
        return values

    def follow(self, before: nn.Parameter, after: nn.Parameter) -> nn.Parameter:
        """What has taken the place of ``before``: ``after``, unless another reader exchanged it already."""
        known = self._moved.get(id(before))
        if known is not None and known[0]() is before and (first := known[1]()) is not None:
            return first
        self._moved[id(before)] = (ref(before), ref(after))
        self.values = {name: after if held is before else held for name, held in self.values.items()}
        return after

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_moved": {}}  # a copy starts anew, and weak references cannot be written
