"""What steps of torch's optimizers tell of tables that step in backward: accumulation, scaled losses, second steps."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Protocol
from weakref import WeakSet, ref

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recsys_embed.errors import ConfigError

WAY_OUT = (
    "make the update at step() instead: optimizer = recsys_embed.optim.fused_optimizer(model, dense_optimizer), then "
    "optimizer.step()"
)


class WatchedTables(Protocol):
    """Tables whose optimizer steps in backward."""

    warned: bool

    def take_backwards(self) -> tuple[int, set[int]]: ...
    def follow_schedule_of(self, optimizer: Optimizer) -> None: ...
    def not_stepped_by(self, optimizer: Optimizer) -> bool: ...
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


def held_gradients() -> dict[int, tuple[int, int]]:
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
        if not tables.not_stepped_by(optimizer):
            raise ConfigError(
                f"{type(optimizer).__name__} holds tables that recsys_embed.optim.fused_optimizer steps, and would "
                "step them a second time; give it recsys_embed.optim.unfused_parameters(model)"
            )
        tables.follow_schedule_of(optimizer)
        backwards, accumulating = tables.take_backwards()
        if not backwards:
            continue
        if scaled:
            raise ConfigError(
                f"a GradScaler scales the loss, and these tables step in backward, by the scaled gradients; {WAY_OUT}"
            )
        if backwards == 1:
            continue
        held = {id(p) for p in tables.parameters()}
        related = id(optimizer) in accumulating or any(
            id(p) in held for group in optimizer.param_groups for p in group["params"]
        )
        message = (
            f"{backwards} backwards of a collection came before one step of {type(optimizer).__name__}, and its "
            f"tables, which step in backward, have made {backwards} steps (gradient accumulation?); {WAY_OUT}"
        )
        if related:
            raise ConfigError(message)
        # An optimizer of another model begins at any time.
        if not new and not tables.warned:
            tables.warned = True
            warnings.warn(message, stacklevel=4)
