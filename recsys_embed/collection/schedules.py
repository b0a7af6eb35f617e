"""Learning-rate schedules that tables which step in backward follow."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from weakref import ref

from torch.nn import Parameter
from torch.optim import Optimizer


class Schedules:
    """Param groups of torch's optimizers that were given tables which step in backward: their schedules are followed.

    Args:
        tables: of one module.
    """

    def __init__(self, tables: Sequence[Parameter | None]) -> None:
        self._first = next((p for p in tables if p is not None), None)
        self._references = sys.getrefcount(self._first)
        self._groups: list[tuple[ref[Optimizer], Mapping[str, float], float]] = []

    def find_optimizers(self) -> None:
        """Find optimizers that have not stepped yet, if something else than the module holds its first table."""
        references = sys.getrefcount(self._first)
        # Besides the module itself, whose attributes are complete only after this is made.
        if references > self._references + 1:
            for held in gc.get_objects():
                if issubclass(type(held), Optimizer):
                    self.follow(held)
        self._references = max(self._references, references)

    def follow(self, optimizer: Optimizer) -> None:
        """Follow an optimizer from now on, if it was given the tables."""
        if any(known() is optimizer for known, _, _ in self._groups):
            return
        for group in optimizer.param_groups:
            if any(p is self._first for p in group["params"]):
                # Cyclic schedules name their peak; others begin there.
                first = group.get("max_lr", group.get("initial_lr", group["lr"]))
                self._groups.append((ref(optimizer), group, float(first)))

    def factor(self) -> float:
        """The part of their first rate that the last of these optimizers has now."""
        self._groups = [known for known in self._groups if known[0]() is not None]
        if not self._groups:
            return 1.0
        _, group, first = self._groups[-1]
        now = float(group["lr"])
        return now / first if first else float(now > 0)
