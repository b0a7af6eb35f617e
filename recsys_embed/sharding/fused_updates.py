"""Table updates: inside backward where fbgemm implements the rule, by :class:`TableOptimizer` elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys_embed.errors import ConfigError
from recsys_embed.optim import SGD, Adagrad, Adam, FusedOptimizer, RowwiseAdagrad
from recsys_embed.sharding.physical_tables import PhysicalTable

InBackward = tuple[type[torch.optim.Optimizer], dict[str, Any]]
_PLAIN = ("lr", "eps", "initial_accumulator_value", "betas")


def fuses(rule: FusedOptimizer, device_type: str) -> bool:
    """Whether fbgemm updates by ``rule`` inside backward on such a device.

    >>> fuses(RowwiseAdagrad(), "cpu"), fuses(Adam(), "cpu"), fuses(Adam(), "cuda"), fuses(SGD(weight_decay=0.1), "cpu")
    (True, False, True, False)
    """
    # By exact type: a subclass may override the update.
    if type(rule) not in _IN_BACKWARD or (type(rule) is Adam and device_type != "cuda"):
        return False
    options = [f.name for f in fields(rule) if f.name not in _PLAIN]
    return all(getattr(rule, name) == getattr(type(rule)(), name) for name in options)


def in_backward(rule: FusedOptimizer, physical: PhysicalTable) -> InBackward:
    """TorchRec's optimizer, and its arguments, that update the physical table as ``rule`` updates the table.

    Raises:
        ConfigError: TorchRec has no such rule; see :func:`fuses`.
    """
    if type(rule) not in _IN_BACKWARD:
        raise ConfigError(
            f"TorchRec has no optimizer that does inside backward what {rule!r} does; it has "
            f"{', '.join(cls.__name__ for cls in _IN_BACKWARD)}"
        )
    return _IN_BACKWARD[type(rule)](rule, physical)


def _sgd(rule: SGD, physical: PhysicalTable) -> InBackward:
    return torch.optim.SGD, {"lr": rule.lr}


def _adam(rule: Adam, physical: PhysicalTable) -> InBackward:
    return torch.optim.Adam, {"lr": rule.lr, "betas": rule.betas, "eps": rule.eps}


def _adagrad(rule: Adagrad, physical: PhysicalTable) -> InBackward:
    start = {"initial_accumulator_value": rule.initial_accumulator_value}
    return torch.optim.Adagrad, {"lr": rule.lr, "eps": rule.eps} | (start if start["initial_accumulator_value"] else {})


def _rowwise_adagrad(rule: RowwiseAdagrad, physical: PhysicalTable) -> InBackward:
    if physical.per_row > 1:
        return torch.optim.Adagrad, {"lr": rule.lr, "eps": rule.eps}
    # fbgemm's mean of squares runs over the padding too.
    shrink = math.sqrt(physical.width / physical.shape[1])
    return RowWiseAdagrad, {"lr": rule.lr * shrink, "eps": rule.eps * shrink}


_IN_BACKWARD: Mapping[type[FusedOptimizer], Callable[[Any, PhysicalTable], InBackward]] = {
    SGD: _sgd,
    Adagrad: _adagrad,
    RowwiseAdagrad: _rowwise_adagrad,
    Adam: _adam,
}


def fuse(parameters: Iterable[tuple[PhysicalTable, nn.Parameter]], rule: FusedOptimizer) -> None:
    """Let TorchRec update ``parameters``, physical tables, inside backward."""
    for physical, parameter in parameters:
        kind, options = in_backward(rule, physical)
        apply_in_backward(kind, [parameter], options)


class TableOptimizer(torch.optim.Optimizer):
    """Updates tables that have dense gradients by the rule of fused tables: only rows that were read, each once.

    These are the tables TorchRec replicates, which it does not update inside backward, and those whose rule fbgemm
    does not know on the device.

    Args:
        tables: layout and stored values ``[stored rows, stored width]`` of each, all columns of it.
        rule: the update.
    """

    def __init__(self, tables: Iterable[tuple[str, PhysicalTable, nn.Parameter]], rule: FusedOptimizer) -> None:
        held = list(tables)
        self.rule = rule
        self.physical_tables = {id(parameter): physical for _, physical, parameter in held}
        self.names = {id(parameter): name for name, _, parameter in held}
        super().__init__([parameter for *_, parameter in held], {"lr": rule.lr})

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """State of one table, made at first use: ``step``, and tensors ``[rows, 1]`` or ``[rows, width]``."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            weight = self._rows(parameter.detach(), self.physical_tables[id(parameter)])
            rows, width = weight.shape
            state["step"] = 0
            for name, kind in self.rule.tensors.items():
                dtype = torch.int32 if kind == "step" else torch.float32
                size = (rows, width if kind == "element" else 1)
                state[name] = torch.empty(size, dtype=dtype, device=parameter.device)
                self.rule.reset_state_(name, state[name], weight)
        return state

    @staticmethod
    def _rows(stored: Tensor, physical: PhysicalTable) -> Tensor:
        return stored.view(-1, physical.shape[1] // physical.per_row)[:, : physical.width]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every table that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])
        return loss

    def _update(self, parameter: nn.Parameter, lr: float) -> None:
        physical, state = self.physical_tables[id(parameter)], self.state_of(parameter)
        weight, grad = self._rows(parameter, physical), self._rows(parameter.grad, physical)  # type: ignore[arg-type]
        state["step"] += 1
        if self.rule.lazy:
            touched = torch.arange(len(weight), device=weight.device)
        else:
            touched = grad.ne(0).any(1).nonzero().squeeze(1)
        before, moved = weight[touched], grad[touched]
        if self.rule.weight_decay:
            moved = moved.add(before, alpha=self.rule.weight_decay)
        picked = {name: state[name][touched] for name in self.rule.tensors if name != "last"}
        weight[touched] = self.rule.checked_update(before, moved, picked, lr, state["step"])
        for name, values in picked.items():
            state[name][touched] = values


def left_to_step(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name that are not updated inside backward."""
    return dict(in_backward_optimizer_filter(model.named_parameters()))
