"""Steps in backward: several lookups of one backward are one step; scaled losses, replicas and the like are refused."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recsys_embed.errors import ConfigError
from recsys_embed.optim.replicas import active_replica, refuse_sharding

_WAY_OUT = (
    "make the update at step() instead: optimizer = recsys_embed.optim.fused_optimizer(model, dense_optimizer), then "
    "optimizer.step()"
)


class LookupRecord:
    """One lookup with gradients, alive until its backward can no longer run."""

    __slots__ = ("__weakref__", "deferred", "done", "taken", "thread")

    def __init__(self, taken: int, thread: int, deferred: bool) -> None:
        self.taken, self.thread, self.deferred = taken, thread, deferred
        self.done: set[str] = set()


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
        self.backwards = 0
        # Gradients that optimizers held when the last lookup began; those to which its backward has added.
        self._held: dict[int, tuple[int, int]] = {}
        self._accumulating: set[int] = set()
        # Whether several backwards came before a step; closures run them inside of the step.
        self._suspected = False

    def begin(self, deferred: bool) -> LookupRecord:
        """A lookup begins.

        Args:
            deferred: several parts of its backward update one storage, so that their gradients are collected.
        """
        if self._stepped_in >= 0 and torch._C._current_graph_task_id() == self._stepped_in:
            raise ConfigError(
                "a lookup in the middle of a backward that has already stepped its tables (activation checkpointing of "
                f"one of several lookups) would read the new rows; {_WAY_OUT}"
            )
        if self.backwards or self._suspected:
            self._held = _held_gradients()
        thread = threading.get_ident()
        record = LookupRecord(self._taken.get(thread, 0), thread, deferred)
        self._open.add(record)
        return record

    def collects(self, record: LookupRecord, parts: Collection[str]) -> bool:
        """Whether the gradients of some parts of a lookup are to be collected, rather than be stepped at once.

        Raises:
            ConfigError: the tables have changed since the lookup, so that a step would be another than torch's.
        """
        stale = not record.done and record.taken != self._taken.get(record.thread, 0)
        if stale or record.done.intersection(parts):
            what = "another backward came between" if stale else "backward ran twice through one lookup"
            raise ConfigError(
                "these tables step in backward, and they have been stepped since this lookup read them "
                f"({what}); sum the losses and call backward once, or {_WAY_OUT}"
            )
        first = not record.done
        if first and not record.deferred:
            record.deferred = torch._C._current_graph_task_id() in self._collected or any(
                other is not record and not other.done and (other.thread, other.taken) == (record.thread, record.taken)
                for other in list(self._open)
            )
        record.done.update(parts)
        if first and not record.deferred:
            self._count(record.thread)
        return record.deferred

    def collect(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add to the gradients by which the running backward steps the optimizer when it ends."""
        task, thread = torch._C._current_graph_task_id(), threading.get_ident()
        if task < 0:  # an operator that is called outside a backward
            self._apply({name: g for name, g in gradients.items() if g is not None})
            return
        if task not in self._collected:
            # What an earlier backward of this thread left behind, it failed.
            for other in [t for t, (of, _) in self._collected.items() if of == thread]:
                del self._collected[other]
            self._collected[task] = thread, {}
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, task))
        found = self._collected[task][1]
        for name, gradient in gradients.items():
            if gradient is not None:
                found[name] = found[name] + gradient if name in found else gradient

    def refuse_second_step(self) -> None:
        """Compiled lookups keep no record: refuse one whose backward has stepped the tables for another lookup.

        Raises:
            ConfigError: it has.
        """
        task = torch._C._current_graph_task_id()
        if task >= 0 and task == self._stepped_in:
            raise ConfigError(
                "one backward runs through lookups of compiled and of uncompiled code, which would step the same "
                f"tables twice; compile all of them, or {_WAY_OUT}"
            )

    def stepped_by_compiled_code(self) -> None:
        """A lookup of compiled code has stepped its tables."""
        self._count(threading.get_ident())

    def _end(self, task: int) -> None:
        thread, gradients = self._collected.pop(task)
        self._apply(gradients)
        self._count(thread)

    def _count(self, thread: int) -> None:
        self._taken[thread] = self._taken.get(thread, 0) + 1
        self._stepped_in = torch._C._current_graph_task_id()
        self.backwards += 1
        if self._held:
            now = _held_gradients()
            self._accumulating.update(
                k for k, was in self._held.items() if k in now and was[0] == now[k][0] and was < now[k]
            )
            self._held = {}

    def take(self) -> tuple[int, set[int]]:
        """Backwards since this was last asked, and optimizers whose gradients several of them were added to."""
        found = self.backwards, self._accumulating
        self._suspected = self._suspected or self.backwards > 1
        self.backwards, self._accumulating, self._held = 0, set(), {}
        return found


class Schedules:
    """Param groups of torch's optimizers that were given tables which step in backward: their schedules are followed.

    Args:
        tables: of one module.
    """

    def __init__(self, tables: Sequence[Parameter | None]) -> None:
        self._first = next((p for p in tables if p is not None), None)
        self._references = sys.getrefcount(self._first)
        self._groups: list[tuple[ref[Optimizer], Mapping[str, float], float]] = []

    def look(self) -> None:
        """Find optimizers that have not stepped yet, if something else than the module holds its first table."""
        references = sys.getrefcount(self._first)
        # Besides the module itself, whose attributes are complete only after this is made.
        if references > self._references + 1:
            for held in gc.get_objects():
                if issubclass(type(held), Optimizer):
                    self.meet(held)
        self._references = max(self._references, references)

    def meet(self, optimizer: Optimizer) -> None:
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
            f"the tables, is to give gradients and step nothing; {_WAY_OUT}"
        )


def refuse_replicas() -> None:
    """Refuse lookups inside DistributedDataParallel or FSDP, whose processes would step by their own gradients.

    Raises:
        ConfigError: says so.
    """
    if active_replica() is not None:
        raise ConfigError(
            "these tables step in backward, which DistributedDataParallel does not see: each replica would step by its "
            f"own gradients; {_WAY_OUT}"
        )
    refuse_sharding()


# -- optimizers of torch ---------------------------------------------------------------------------------------------


class WatchedTables(Protocol):
    """Tables whose optimizer steps in backward."""

    told: bool

    def take_backwards(self) -> tuple[int, set[int]]: ...
    def met(self, optimizer: Optimizer) -> None: ...
    def are_left_to(self, optimizer: Optimizer) -> bool: ...
    def parameters(self) -> Iterator[Parameter]: ...


_TABLES: WeakSet[WatchedTables] = WeakSet()
# Optimizers that have stepped, and whether a gradient scaler called them.
_KNOWN: dict[int, tuple[ref[Optimizer], bool]] = {}
_hook: list[object] = []


def watch(tables: WatchedTables) -> None:
    """From now on, steps of torch's optimizers tell when the tables' steps are not theirs."""
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_before_step))
    _TABLES.add(tables)


def _scaled(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler that scales called the optimizer; looked for at its first step."""
    key = id(optimizer)
    known = _KNOWN.get(key)
    if known is None or known[0]() is not optimizer:
        frame: FrameType | None = sys._getframe(2)
        found = False
        while frame is not None and not found:
            owner = frame.f_locals.get("self") if frame.f_code.co_name in ("step", "_maybe_opt_step") else None
            found = isinstance(owner, GradScaler) and owner.is_enabled()
            frame = frame.f_back
        known = _KNOWN[key] = ref(optimizer, lambda _: _KNOWN.pop(key, None)), found
    return known[1]


def _held_gradients() -> dict[int, tuple[int, int]]:
    """A gradient of each known optimizer, and how often it has been written in place."""
    found: dict[int, tuple[int, int]] = {}
    for key, (optimizer, _) in list(_KNOWN.items()):
        groups = getattr(optimizer(), "param_groups", ())
        grad = next((p.grad for group in groups for p in group["params"] if p.grad is not None), None)
        if grad is not None:
            found[key] = id(grad), grad._version
    return found


@torch._disable_dynamo
def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Compare what tables did since the last step of an optimizer with what the optimizer is about to do."""
    new = id(optimizer) not in _KNOWN
    scaled = _scaled(optimizer)
    for tables in list(_TABLES):
        if not tables.are_left_to(optimizer):
            raise ConfigError(
                f"{type(optimizer).__name__} holds tables that recsys_embed.optim.fused_optimizer steps, and would "
                "step them a second time; give it recsys_embed.optim.unfused_parameters(model)"
            )
        tables.met(optimizer)
        backwards, accumulating = tables.take_backwards()
        if not backwards:
            continue
        if scaled:
            raise ConfigError(
                f"a GradScaler scales the loss, and these tables step in backward, by the scaled gradients; {_WAY_OUT}"
            )
        if backwards == 1:
            continue
        held = {id(p) for p in tables.parameters()}
        related = id(optimizer) in accumulating or any(
            id(p) in held for group in optimizer.param_groups for p in group["params"]
        )
        message = (
            f"{backwards} backwards of a collection came before one step of {type(optimizer).__name__}, and its "
            f"tables, which step in backward, have made {backwards} steps (gradient accumulation?); {_WAY_OUT}"
        )
        if related:
            raise ConfigError(message)
        # An optimizer of another model begins at any time.
        if not new and not tables.told:
            tables.told = True
            warnings.warn(message, stacklevel=4)
