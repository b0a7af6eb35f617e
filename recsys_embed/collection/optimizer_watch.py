"""What steps of torch's optimizers tell of tables with a fused rule: accumulated gradients, steps that miss tables."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import NamedTuple, Protocol
from weakref import ref

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from recsys_embed.collection.scaled_losses import watch_scalers, wrap_method
from recsys_embed.errors import ConfigError

WAY_OUT = (
    "make the update at step() instead: optimizer = recsys_embed.optim.fused_optimizer(model, dense_optimizer), then "
    "optimizer.step()"
)


_CHANGED = (
    "gradients were changed between backward() and step(), as clipping does; the tables of a collection, which step in "
    f"backward, had used theirs as they were. To clip them too {WAY_OUT}"
)


class Backwards(NamedTuple):
    """Backwards that stepped some tables before a step of an optimizer of torch."""

    since_own: int
    """Since its own last step."""
    since_any: int
    """Since the last step of any optimizer."""
    accumulated: bool
    """Whether several of them were added up in its gradients."""
    stepped_before: bool
    """Whether the optimizer has stepped before."""


class WatchedTables(Protocol):
    """Tables with a fused rule."""

    warned: bool

    def backwards_before(self, optimizer: Optimizer) -> Backwards | None: ...
    def gradients_changed(self, optimizer: Optimizer) -> bool: ...
    def after_step_of(self, optimizer: Optimizer) -> None: ...
    def find_schedules(self, optimizer: Optimizer) -> None: ...
    def follow_schedule_of(self, optimizer: Optimizer) -> None: ...
    def check_gradients_of(self, optimizer: Optimizer) -> None: ...
    def parameters(self) -> Iterator[Parameter]: ...


_TABLES: dict[int, ref[WatchedTables]] = {}
# What takes back all that watching has changed of torch.
_undo: list[Callable[[], None]] = []
_lock = threading.RLock()  # tables may be collected while others begin


def watch(tables: WatchedTables) -> None:
    """While the tables exist, steps of torch's optimizers tell when the tables' steps are not theirs.

    Torch has global hooks of steps. It has none of losses that a gradient scaler scales, nor of parameters that are
    given to an optimizer: ``GradScaler.scale`` and ``Optimizer.add_param_group`` are wrapped until no tables are left.
    """
    key = id(tables)
    if key in _TABLES:
        return
    with _lock:
        _TABLES[key] = ref(tables, partial(_forget, key))
        if not _undo:
            _undo.append(register_optimizer_step_pre_hook(_before_step).remove)
            _undo.append(register_optimizer_step_post_hook(_after_step).remove)
            _undo.append(wrap_method(Optimizer, "add_param_group", _telling_of_groups))
        _undo.extend(watch_scalers())


def _forget(key: int, _: object) -> None:
    with _lock:
        _TABLES.pop(key, None)
        while _undo and not _TABLES:
            _undo.pop()()


def _telling_of_groups(add: Callable[[Optimizer, dict[str, object]], None]) -> Callable[..., None]:
    """Let tables know of optimizers that are given them, before these step for the first time."""

    @torch._disable_dynamo
    @wraps(add)
    def watched(self: Optimizer, param_group: dict[str, object]) -> None:
        add(self, param_group)
        for tables in _watched():
            tables.find_schedules(self)

    return watched


@torch._disable_dynamo
def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Compare what tables did since the last step of an optimizer with what the optimizer is about to do."""
    for tables in _watched():
        tables.check_gradients_of(optimizer)
        tables.follow_schedule_of(optimizer)
        _refuse_accumulation(tables, optimizer)
        if tables.gradients_changed(optimizer):
            warnings.warn(_CHANGED, stacklevel=5)


@torch._disable_dynamo
def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """The same of the backwards that ran in the closure of the step."""
    for tables in _watched():
        try:
            _refuse_accumulation(tables, optimizer)
        finally:
            tables.after_step_of(optimizer)


def _watched() -> list[WatchedTables]:
    return [tables for known in tuple(_TABLES.values()) if (tables := known()) is not None]


def _refuse_accumulation(tables: WatchedTables, optimizer: Optimizer) -> None:
    found = tables.backwards_before(optimizer)
    if found is None:
        return
    held = {id(p) for p in tables.parameters()}
    if found.accumulated or any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(_accumulation(found.since_own, optimizer))
    # An optimizer of another model begins at any time.
    if found.since_any > 1 and found.stepped_before and not tables.warned:
        tables.warned = True
        warnings.warn(_accumulation(found.since_any, optimizer), stacklevel=5)


def _accumulation(backwards: int, optimizer: Optimizer) -> str:
    return (
        f"{backwards} backwards of a collection came before one step of {type(optimizer).__name__}, and its tables, "
        f"which step in backward, have made {backwards} steps (gradient accumulation?); {WAY_OUT}"
    )
