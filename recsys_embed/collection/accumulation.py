"""What becomes of gradients of an optimizer of torch: several backwards are added up in them, or others change them."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from weakref import ref

from torch.optim import Optimizer

from recsys_embed.collection.optimizer_watch import Backwards
from recsys_embed.utils.dynamo import uncompiled

# An optimizer that makes no step for so many backwards is not looked at any longer.
_FORGOTTEN_AFTER = 64
# Backwards after which gradients are compared with those of the step: what clips them does so from the first step on.
_COMPARED = 8


class _Seen:
    """What is known of an optimizer that has stepped.

    Gradients are those it holds, by identity, with the number of writes in place.
    """

    __slots__ = ("added", "before", "held", "left", "optimizer", "stepped_at")

    def __init__(self, optimizer: Optimizer, stepped_at: int) -> None:
        self.optimizer, self.stepped_at = ref(optimizer), stepped_at
        # When the last lookup began; and those to which its backward has added.
        self.held: dict[int, int] = {}
        self.added: dict[int, int] = {}
        # When the last lookup began; and when its backward ended, of those that it has written.
        self.before: dict[int, int] | None = None
        self.left: dict[int, int] = {}

    def gradients(self) -> dict[int, int]:
        groups = getattr(self.optimizer(), "param_groups", ())
        held = (p.grad for group in groups for p in group["params"])
        return {id(grad): grad._version for grad in held if grad is not None}


class BackwardCount:
    """Backwards of some tables, as each optimizer of torch that steps sees them."""

    def __init__(self) -> None:
        self._count = self._any_stepped_at = 0
        self._optimizers: dict[int, _Seen] = {}
        self._lock = threading.Lock()
        # Whether gradients are held, to be compared with those after the backward.
        self.holds = False
        # Whether somebody has said that gradients of the other parameters change between backward and step.
        self.changes_are_known = False
        # The optimizer whose step runs, and the backwards before it.
        self._inside: tuple[ref[Optimizer], int] | None = None

    @property
    def so_far(self) -> int:
        """Number of backwards."""
        return self._count

    @property
    def _compares(self) -> bool:
        """Whether gradients after a backward are compared with those of the step."""
        return self._count <= _COMPARED and not self.changes_are_known

    @property
    def looks_after_backward(self) -> bool:
        """Whether :meth:`after_backward` is to be called."""
        return self.holds or self._compares

    def note_gradients(self) -> None:
        """Look at the gradients before a lookup: those of other models are not written by its backward."""
        if self._compares:
            with self._lock:
                for seen in self._optimizers.values():
                    seen.before = seen.gradients()

    def step_begins(self, optimizer: Optimizer) -> None:
        """A step of an optimizer begins, whose closure may run backwards."""
        self._inside = ref(optimizer), self._count

    def stepping_again(self) -> str | None:
        """Of a lookup: the optimizer in whose running step a backward has stepped the tables already."""
        if self._inside is None or self._inside[1] == self._count:
            return None
        optimizer = self._inside[0]()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and optimizer is not None:
            if frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals.get("self") is optimizer:
                return type(optimizer).__name__
            frame = frame.f_back
        # That step has failed.
        self._inside = None
        return None

    def before_lookup(self) -> None:
        """Look at the gradients of optimizers that have not stepped since the last backward."""
        count = self._count
        with self._lock:
            behind = [(key, seen) for key, seen in self._optimizers.items() if seen.stepped_at < count]
            for key, seen in behind:
                if seen.optimizer() is None or (count - seen.stepped_at > _FORGOTTEN_AFTER and not seen.added):
                    del self._optimizers[key]
                else:
                    seen.held = seen.gradients()
            self.holds = bool(behind)

    def add(self) -> None:
        """One more backward has stepped the tables."""
        with self._lock:
            self._count += 1

    @uncompiled
    def after_backward(self) -> None:
        """Compare the gradients with those before the lookup, and remember them until the step."""
        with self._lock:
            for seen in self._optimizers.values():
                if seen.before is not None:
                    written = seen.gradients().items()
                    seen.left = {g: version for g, version in written if version > seen.before.get(g, -1)}
                    seen.before = None
                if seen.held:
                    now = seen.gradients()
                    seen.added.update({g: now[g] for g, before in seen.held.items() if now.get(g, 0) > before})
                    seen.held = {}
            self.holds = False

    def changed_since_backward(self, optimizer: Optimizer) -> bool:
        """Whether somebody has written to an optimizer's gradients between the last backward and its step, as clipping
        does; looked at for the first backwards only."""
        if not self._compares:
            return False
        with self._lock:
            seen = self._optimizers.get(id(optimizer))
            if seen is None or not seen.left or seen.optimizer() is not optimizer:
                return False
            now, left = seen.gradients(), seen.left
            seen.left = {}
            return any(now.get(g, written) > written for g, written in left.items())

    def before_step(self, optimizer: Optimizer) -> Backwards | None:
        """What an optimizer's step is made of that begins, or that ends, whose closure may have run backwards.

        None where that is one backward at most.
        """
        with self._lock:
            seen, since_any = self._optimizers.get(id(optimizer)), self._count - self._any_stepped_at
            if seen is None or seen.optimizer() is not optimizer:
                return (
                    Backwards(since_any, since_any, accumulated=False, stepped_before=False) if since_any > 1 else None
                )
            since_own = self._count - seen.stepped_at
            if since_own <= 1:
                return None
            # Gradients that were discarded since are nobody's sum.
            now = seen.gradients() if seen.added else {}
            accumulated = any(now.get(g, -1) >= written for g, written in seen.added.items())
            return Backwards(since_own, since_any, accumulated, stepped_before=True)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count anew."""
        with self._lock:
            self._inside = None
            self._any_stepped_at = self._count
            seen = self._optimizers.get(id(optimizer))
            if seen is None or seen.added or seen.held or seen.optimizer() is not optimizer:
                self._optimizers[id(optimizer)] = _Seen(optimizer, self._count)
            else:
                seen.stepped_at = self._count
