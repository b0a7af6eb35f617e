"""Gradients that a backward leaves for ``step()``: rows are computed when something reads them, else not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.indexes import ArrayVersions
from recsys_embed.optim import FusedOptimizer, RowGradient


class DeferredLookup(Protocol):
    """A lookup whose backward has come, with all that it recorded."""

    @property
    def tables(self) -> Sequence[Tensor]: ...

    @property
    def read(self) -> Sequence[Tensor | None]: ...

    def check(self) -> None:
        """Refuse it, with a ConfigError, where ids no longer read the rows that they have read."""

    def gradients(self, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """A :class:`RowGradient` of each wanted table."""

    def step(
        self,
        rule: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        logs: Sequence[StepLog],
        frozen: Sequence[int],
    ) -> None:
        """One step of the optimizer on the rows that were read, in place."""


class RecordedLookup:
    """A lookup and what its backward was given, see :class:`DeferredLookup`.

    Args:
        ids, tables, gradients, kept: as the kernels' backward takes them.
        pool: where the kernels allocate the values of rows, if they do.
        arrays: versions of the index arrays, where the kernels read these again.
    """

    def __init__(
        self,
        lookup: Any,
        ids: Any,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Any,
        *pool: Any,
        arrays: ArrayVersions = (),
    ) -> None:
        self.tables, self.read = tables, gradients
        self._lookup, self._given, self._pool, self._arrays = lookup, (ids, tables, gradients, kept), pool, arrays

    def check(self) -> None:
        self._lookup.check_arrays(self._arrays)

    def gradients(self, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = self._lookup.gradients(*self._given, "rows", wanted, *self._pool)
        return found

    def step(
        self,
        rule: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        logs: Sequence[StepLog],
        frozen: Sequence[int],
    ) -> None:
        self._lookup.update(*self._given, rule, states, logs, frozen)


class DeferredGradients:
    """The gradients of all tables of one lookup, of which a step by themselves needs no copy.

    Args:
        lookup: what backward was given; it has copies of the ids, which a loader may overwrite. ``read`` are tensors
            whose values must stay as they are.
        wanted: tables that have a gradient.
    """

    def __init__(self, lookup: DeferredLookup, wanted: Sequence[bool]) -> None:
        self._lookup: DeferredLookup | None = lookup
        self._tables, self.wanted = tuple(lookup.tables), tuple(wanted)
        self._versions = [0 if t is None else t._version for t in lookup.read]
        self._found: list[Tensor | None] | None = None

    def of_tables(self) -> list[Tensor | None]:
        """What backward returns: a :class:`RowGradient` for each table that has one."""
        return [RowGradient.deferred(self, i, t) if self.wanted[i] else None for i, t in enumerate(self._tables)]

    def rows_and_values(self, number: int) -> tuple[Tensor, Tensor]:
        if self._found is None:
            lookup = self._checked()
            with torch.no_grad():
                self._found = list(lookup.gradients(self.wanted))
            # Gradients of the outputs are not needed again.
            self._lookup = None
        found = cast("RowGradient", self._found[number])
        self._found[number] = None
        return found.rows, found.values

    def is_of(self, tables: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
        """Whether these are the gradients of these tables, and nothing has read any."""
        return self._found is None and all(
            t is own and (g is None) is not want and (g is None or (isinstance(g, RowGradient) and g.source is self))
            for t, own, g, want in zip(tables, self._tables, gradients, self.wanted, strict=True)
        )

    def step(self, rule: FusedOptimizer, states: Sequence[Mapping[str, Tensor]], logs: Sequence[StepLog]) -> None:
        """One step of the optimizer, in place; ``logs`` are advanced to it."""
        self._checked().step(rule, states, logs, [i for i, want in enumerate(self.wanted) if not want])

    def check(self) -> None:
        """Refuse gradients that can no longer be computed, with a ConfigError."""
        if self._lookup is None:
            return
        self._lookup.check()
        if self._versions != [0 if t is None else t._version for t in self._lookup.read]:
            raise ConfigError(
                "gradients of the looked up vectors were changed in place between backward and step(); give backward "
                "a copy of them, or change them by hooks"
            )

    def _checked(self) -> DeferredLookup:
        self.check()
        return cast("DeferredLookup", self._lookup)
