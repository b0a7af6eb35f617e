"""Backwards of losses that a gradient scaler has scaled, in which tables would step by scaled gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.utils._pytree import tree_leaves

# The backwards of scaled losses that are running, as torch numbers them.
_RUNNING: set[int] = set()
_Scale = Callable[[GradScaler, object], object]


def is_scaled(task: int) -> bool:
    """Whether a running backward began at a loss that a gradient scaler has scaled."""
    return task in _RUNNING


def watch_scalers() -> list[Callable[[], None]]:
    """Know the losses that gradient scalers scale in their backwards, until all that is returned has been called."""
    undo, kinds = [], [GradScaler]
    kinds += GradScaler.__subclasses__()
    for kind in kinds:
        scale = vars(kind).get("scale")
        if scale is not None and not hasattr(scale, "watched"):
            undo.append(wrap_method(kind, "scale", _watched))
    return undo


def wrap_method(kind: type, name: str, wrap: Callable[..., Callable[..., object]]) -> Callable[[], None]:
    """Replace a method of a class; what is returned puts it back, unless another has replaced it since."""
    before = vars(kind)[name]
    after = wrap(before)
    setattr(kind, name, after)

    def undo() -> None:
        if vars(kind).get(name) is after:
            setattr(kind, name, before)

    return undo


def _watched(scale: _Scale) -> _Scale:
    @torch._disable_dynamo  # as torch's own compiler leaves scalers alone
    @wraps(scale)
    def watched(self: GradScaler, outputs: object) -> object:
        scaled = scale(self, outputs)
        if self.is_enabled():
            for loss in tree_leaves(scaled):
                if isinstance(loss, Tensor) and loss.requires_grad:
                    loss.register_hook(_note_backward)
        return scaled

    watched.watched = True  # type: ignore[attr-defined]
    return watched


def _note_backward(gradient: Tensor) -> None:
    task = torch._C._current_graph_task_id()
    if task >= 0 and task not in _RUNNING:
        _RUNNING.add(task)
        torch.autograd.Variable._execution_engine.queue_callback(partial(_RUNNING.discard, task))
