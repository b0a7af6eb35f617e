"""Learning-rate schedules that tables which step in backward follow."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple
from weakref import ref

from torch.nn import Parameter
from torch.optim import Optimizer

from recsys_embed.optim.base import refuse_maximize

# References to a table: the module's parameters, its list of tables of its own, `Schedules`, and the call that counts.
_OF_ITS_MODULE = 4


class _Followed(NamedTuple):
    """A param group that holds the tables."""

    optimizer: ref[Optimizer]
    number: int
    first_lr: float
    """When it was first seen."""


class Schedules:
    """Param groups of torch's optimizers that were given tables which step in backward: their schedules are followed.

    Args:
        tables: of one module.
    """

    def __init__(self, tables: Sequence[Parameter | None]) -> None:
        self._first = next((p for p in tables if p is not None), None)
        self._groups: list[_Followed] = []
        self._warned = False

    def find_optimizers(self) -> None:
        """Find optimizers that have not stepped yet, if something else than the module holds its first table."""
        if sys.getrefcount(self._first) > _OF_ITS_MODULE:
            for held in gc.get_objects():
                if issubclass(type(held), Optimizer):
                    self.follow(held)

    def are_of(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer was given the tables."""
        return any(p is self._first for group in optimizer.param_groups for p in group["params"])

    def follow(self, optimizer: Optimizer) -> None:
        """Follow an optimizer from now on, if it was given the tables.

        Raises:
            ConfigError: it ascends.
        """
        if any(known.optimizer() is optimizer for known in self._groups):
            return
        for number, group in enumerate(optimizer.param_groups):
            if not any(p is self._first for p in group["params"]):
                continue
            refuse_maximize([group], type(optimizer).__name__)
            if group.get("lr") is not None:
                self._groups.append(_Followed(ref(optimizer), number, float(group["lr"])))

    def factor(self) -> float:
        """The part of the rate of its schedule's start, or peak, that the last of these optimizers has now."""
        while self._groups:
            known = self._groups[-1]
            optimizer = known.optimizer()
            # Loading an optimizer's state makes new groups.
            if optimizer is not None and known.number < len(optimizer.param_groups):
                return self._part(optimizer, known)
            self._groups.pop()
        return 1.0

    def _part(self, optimizer: Optimizer, known: _Followed) -> float:
        group = optimizer.param_groups[known.number]
        now = float(group["lr"])
        # Cyclic schedules name their peak; others begin there.
        peak = group.get("max_lr", group.get("initial_lr"))
        if peak is None:
            default = float(optimizer.defaults.get("lr", known.first_lr))
            peak = max(known.first_lr, default)
            if known.first_lr != default and not self._warned:
                # Set by hand since, resumed, or the group's own from the start: nothing tells.
                self._warned = True
                warnings.warn(
                    f"a param group of {type(optimizer).__name__} holds tables that step in backward and has another "
                    f"lr ({now:g}) than its optimizer was made with ({default:g}), without a scheduler: the tables "
                    f"scale their own rate by {now:g} / {float(peak):g}; set `lr` of the collection for another",
                    stacklevel=2,
                )
        return now / float(peak) if peak else float(now > 0)
