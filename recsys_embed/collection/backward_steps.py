"""Steps in backward: several lookups of one backward are one step; what would step otherwise than torch is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from recsys_embed.collection.accumulation import BackwardCount
from recsys_embed.collection.optimizer_watch import WAY_OUT
from recsys_embed.collection.scaled_losses import is_scaled
from recsys_embed.errors import ConfigError
from recsys_embed.optim.replicas import active_replica, refuse_sharding
from recsys_embed.utils.dynamo import in_compiled_autograd, uncompiled

_WATCHED = 2
"""Backwards that step when they end: a gradient that reaches a table outside a lookup is then refused before any
change, and a penalty is usually part of the first loss already."""


class LookupRecord:
    """One lookup with gradients, alive until its backward can no longer run."""

    __slots__ = ("__weakref__", "again_in", "deferred", "outer", "stepped", "steps_before", "thread")

    def __init__(self, steps_before: int, thread: int, deferred: bool, again_in: str | None) -> None:
        self.steps_before, self.thread, self.deferred = steps_before, thread, deferred
        # The optimizer in whose running step the tables have been stepped already.
        self.again_in = again_in
        self.stepped: set[str] = set()
        # The backward in which the lookup is made, of recomputed activations. Its own may be another one inside.
        self.outer: int = torch._C._current_graph_task_id()


class BackwardSteps:
    """The lookups of some tables whose optimizer steps in backward.

    Where one backward runs through a single lookup, that lookup steps the optimizer at once. Where it runs through
    several, their gradients are summed and the step follows when the backward ends, as torch's optimizers have it. A
    lookup whose tables have been stepped since it read them is refused.

    Args:
        apply: steps the optimizer by the gradients of storages.
    """

    def __init__(self, apply: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._apply = apply
        self._open: WeakSet[LookupRecord] = WeakSet()
        # Steps so far, by thread: threads that train at once step independently.
        self._taken: dict[int, int] = {}
        # Gradients by storage of each backward that collects them, which torch numbers; and its thread.
        self._collected: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self._stepped_in = -1
        # The last backward in which a lookup of uncompiled code has left its step to the end.
        self._deferred_in = -1
        self._looked_up_in = -1
        self._again_in: str | None = None
        # Of backwards inside of others (reentrant checkpointing), the backward around.
        self._outer: dict[int, int] = {}
        self.count = BackwardCount()
        # Of what several threads change; never held while tables step.
        self._lock = threading.Lock()

    def begin(self, deferred: bool) -> LookupRecord:
        """A lookup begins.

        Args:
            deferred: several parts of its backward update one storage, so that their gradients are collected.
        """
        # Checkpointing runs a backward of its own for what it looks up again.
        _refuse_backward()
        task = torch._C._current_graph_task_id()
        if 0 <= task == self._stepped_in:
            raise ConfigError(
                "a lookup in the middle of a backward that has already stepped its tables (activation checkpointing of "
                f"one of several lookups) would read the new rows; {WAY_OUT}"
            )
        self.count.before_lookup()
        self.count.note_gradients()
        if task >= 0:
            # Only here can the step follow this backward, where that of the lookup is another one inside of it.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, task))
        thread = threading.get_ident()
        record = LookupRecord(self._taken.get(thread, 0), thread, deferred, self.count.stepping_again())
        with self._lock:
            self._open.add(record)
        return record

    def collects(self, record: LookupRecord, parts: Collection[str]) -> bool:
        """Whether the gradients of some parts of a lookup are to be collected, rather than be stepped at once.

        Raises:
            ConfigError: the tables have changed since the lookup, so that a step would be another than torch's.
        """
        _refuse_backward()
        _refuse_again(record.again_in)
        task = torch._C._current_graph_task_id()
        if record.outer not in (-1, task):
            # Other parts are still to be looked up again, in the rows as they are.
            self._outer[task], record.deferred = record.outer, True
        stale = not record.stepped and record.steps_before != self._taken.get(record.thread, 0)
        if stale or record.stepped.intersection(parts):
            what = "another backward came between" if stale else "backward ran twice through one lookup"
            raise ConfigError(
                "these tables step in backward, and they have been stepped since this lookup read them "
                f"({what}); sum the losses and call backward once, or {WAY_OUT}"
            )
        first = not record.stepped
        if first and not record.deferred:
            with self._lock:
                record.deferred = self.watched or task in self._collected or self._others_may_follow(record)
        record.stepped.update(parts)
        if record.deferred:
            self._deferred_in = task
        elif first:
            self._count(record.thread, task)
        return record.deferred

    def _others_may_follow(self, record: LookupRecord) -> bool:
        """Whether the backward that has come to a lookup may come to others that read the same tables."""
        # Of any thread: the one that runs this backward may have waited for others to look up.
        return any(
            other is not record and not other.stepped and other.steps_before == self._taken.get(other.thread, 0)
            for other in self._open
        )

    def collect(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add to the gradients by which the running backward steps the optimizer when it ends."""
        task, thread = torch._C._current_graph_task_id(), threading.get_ident()
        _refuse_backward()
        if task < 0:  # an operator that is called outside a backward
            self._apply({name: g for name, g in gradients.items() if g is not None})
            return
        running, task = task, self._outer.get(task, task)
        if task not in self._collected:
            with self._lock:
                # What an earlier backward of this thread left behind, it failed.
                for other in [t for t, (of, _) in self._collected.items() if of == thread]:
                    del self._collected[other]
                self._collected[task] = thread, {}
            if task == running:
                torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, task))
        found = self._collected[task][1]
        for name, gradient in gradients.items():
            if gradient is not None:
                found[name] = found[name] + gradient if name in found else gradient

    def begin_compiled(self) -> None:
        """A compiled lookup begins; it keeps no record."""
        self._again_in = self.count.stepping_again()
        self.count.note_gradients()
        self._looked_up_in = torch._C._current_graph_task_id()

    def _compiled_task(self) -> int:
        """The backward that ends with the step: with checkpointing, not the one that runs inside of it."""
        return torch._C._current_graph_task_id() if self._looked_up_in < 0 else self._looked_up_in

    def check_compiled(self) -> None:
        """Refuse the backward of a compiled lookup that would step tables which it has stepped for another lookup.

        Raises:
            ConfigError: says so, or that the loss is scaled, or that an optimizer runs several backwards.
        """
        _refuse_backward()
        _refuse_again(self._again_in)
        task = self._compiled_task()
        if task >= 0 and task in (self._stepped_in, self._deferred_in):
            raise ConfigError(
                "one backward runs through lookups of compiled and of uncompiled code, or through compiled ones that "
                f"activation checkpointing makes again, which would step the same tables twice; {WAY_OUT}"
            )

    @property
    def watched(self) -> bool:
        """Whether the tables are stepped when the running backward ends, whatever it runs through."""
        return self.count.so_far < _WATCHED

    def stepped_by_compiled_code(self) -> None:
        """A lookup of compiled code steps its tables."""
        self._count(threading.get_ident(), self._compiled_task())

    @uncompiled
    def _end(self, task: int) -> None:
        with self._lock:
            self._outer = {inner: outer for inner, outer in self._outer.items() if outer != task}
            thread, gradients = self._collected.pop(task, (0, {}))
        if not gradients:
            return
        self._apply(gradients)
        self._count(thread, task)

    def _count(self, thread: int, task: int) -> None:
        with self._lock:
            self._taken[thread] = self._taken.get(thread, 0) + 1
        self._stepped_in = task
        self.count.add()
        if self.count.looks_after_backward and torch._C._current_graph_task_id() >= 0:
            # Other gradients may follow those of the tables.
            torch.autograd.Variable._execution_engine.queue_callback(self.count.after_backward)


def _refuse_backward() -> None:
    """Refuse the running backward where it began at a loss that a gradient scaler has scaled, or has no end.

    Raises:
        ConfigError: says so.
    """
    if is_scaled(torch._C._current_graph_task_id()):
        raise ConfigError(
            f"a GradScaler scales the loss, and these tables step in backward, by the scaled gradients; {WAY_OUT}"
        )
    if in_compiled_autograd():
        raise ConfigError(
            "compiled autograd runs this backward, and leaves out what these tables, which step in backward, do at its "
            f"end; {WAY_OUT}"
        )


def _refuse_again(optimizer: str | None) -> None:
    """Refuse a second backward in one step of an optimizer, whose closure evaluates the model several times."""
    if optimizer is not None:
        raise ConfigError(
            f"{optimizer} runs several backwards in one step, and these tables, which step in backward, would make a "
            "step in each; freeze them while it runs (table.requires_grad_(False)), or build the collection with "
            f"optimizer=None and give {optimizer} all parameters"
        )


def refuse_parts(table: Tensor) -> None:
    """Refuse the running backward where it is one that leaves no gradient in a table's ``.grad``.

    Raises:
        ConfigError: it is ``torch.autograd.grad``, or has ``inputs`` without the table.
    """
    try:
        wanted = torch._C._will_engine_execute_node(get_gradient_edge(table).node)
    except RuntimeError:  # as torch says that a leaf's gradient is asked for by torch.autograd.grad
        wanted = False
    if not wanted:
        raise ConfigError(
            "these tables step in backward, and torch.autograd.grad of a table, or backward(inputs=...) with some of "
            f"the tables, is to give gradients and step nothing; {WAY_OUT}"
        )


def refuse_replicas() -> None:
    """Refuse lookups inside DistributedDataParallel or FSDP, whose processes would step by their own gradients.

    Raises:
        ConfigError: says so.
    """
    if active_replica() is not None:
        raise ConfigError(
            "these tables step in backward, which DistributedDataParallel does not see: each replica would step by its "
            f"own gradients; {WAY_OUT}"
        )
    refuse_sharding()
