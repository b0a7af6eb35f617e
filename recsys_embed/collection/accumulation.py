"""Whether several backwards of some tables are added up in the gradients of an optimizer of torch."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from recsys_embed.collection.optimizer_watch import Backwards

# An optimizer that makes no step for so many backwards is not looked at any longer.
_FORGOTTEN_AFTER = 64


class _Seen:
    """What is known of an optimizer that has stepped.

    Gradients are those it holds, by identity, with the number of writes in place.
    """

    __slots__ = ("added", "held", "stepped_at")

    def __init__(self, stepped_at: int) -> None:
        self.stepped_at = stepped_at
        # When the last lookup began; and those to which its backward has added.
        self.held: dict[int, int] = {}
        self.added: dict[int, int] = {}


def _gradients(optimizer: Optimizer) -> dict[int, int]:
    held = (p.grad for group in optimizer.param_groups for p in group["params"])
    return {id(grad): grad._version for grad in held if grad is not None}


class BackwardCount:
    """Backwards of some tables, as each optimizer of torch that steps sees them."""

    def __init__(self) -> None:
        self._count = self._any_stepped_at = 0
        self._optimizers: WeakKeyDictionary[Optimizer, _Seen] = WeakKeyDictionary()
        self._lock = threading.Lock()
        # Whether gradients are held, to be compared with those after the backward.
        self.holds = False

    def before_lookup(self) -> None:
        """Look at the gradients of optimizers that have not stepped since the last backward."""
        count = self._count
        with self._lock:
            behind = [(o, seen) for o, seen in self._optimizers.items() if seen.stepped_at < count]
            for optimizer, seen in behind:
                if count - seen.stepped_at > _FORGOTTEN_AFTER and not seen.added:
                    del self._optimizers[optimizer]
                else:
                    seen.held = _gradients(optimizer)
            self.holds = bool(behind)

    def add(self) -> None:
        """One more backward has stepped the tables."""
        with self._lock:
            self._count += 1

    def after_backward(self) -> None:
        """Compare the gradients with those before the lookup."""
        with self._lock:
            for optimizer, seen in self._optimizers.items():
                if seen.held:
                    now = _gradients(optimizer)
                    seen.added.update({g: now[g] for g, before in seen.held.items() if now.get(g, 0) > before})
                    seen.held = {}
            self.holds = False

    def before_step(self, optimizer: Optimizer) -> Backwards:
        """What an optimizer's step is made of that begins, or that ends, whose closure may have run backwards."""
        with self._lock:
            seen, since_any = self._optimizers.get(optimizer), self._count - self._any_stepped_at
            if seen is None:
                return Backwards(since_any, since_any, accumulated=False, stepped_before=False)
            # Gradients that were discarded since are nobody's sum.
            now = _gradients(optimizer) if seen.added else {}
            accumulated = any(now.get(g, -1) >= written for g, written in seen.added.items())
            return Backwards(self._count - seen.stepped_at, since_any, accumulated, stepped_before=True)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count anew."""
        with self._lock:
            self._any_stepped_at = self._count
            self._optimizers[optimizer] = _Seen(self._count)
