"""Optimizers that update embedding rows inside the backward pass, touching only the rows a batch reads.

Every rule sees each touched row once, with the sum of the gradients of all its occurrences in the batch (exact
semantics); rows outside the batch keep their weights and state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from recsys_embed.errors import raise_faults


def is_rate(value: object) -> bool:
    """Whether ``value`` is a finite number and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


@dataclass(frozen=True)
class FusedOptimizer(ABC):
    """One update rule. Subclasses are frozen data; state lives with the tables.

    Args:
        lr: learning rate, > 0 (0 freezes the tables).

    Raises:
        ConfigError: an argument is out of range.
    """

    lr: float = 0.01

    # Name and width of each state tensor: "row" is one float per row, "element" one per weight.
    state: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        faults = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "betas":
                ok = isinstance(value, tuple) and len(value) == 2 and all(is_rate(b) and b < 1 for b in value)
                wanted = "two numbers in [0, 1)"
            else:
                ok = is_rate(value)
                wanted = "a finite number >= 0"
            if not ok:
                faults.append(f"`{f.name}` must be {wanted}; got {value!r}")
        raise_faults(faults, type(self).__name__)

    def initial(self, name: str) -> float:
        """Value every element of state ``name`` starts with."""
        return 0.0

    def state_bytes(self, rows: int, width: int) -> int:
        """Bytes of float32 state for a table of ``rows`` x ``width``."""
        return 4 * sum(rows if kind == "row" else rows * width for kind in self.state.values())

    @abstractmethod
    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        """New weights of the touched rows.

        Args:
            weight: ``[u, width]`` current weights of the touched rows.
            grad: ``[u, width]`` their summed gradients.
            state: per name ``[u, 1]`` or ``[u, width]``; replaced in the dict by its new value.
            lr: current learning rate (a schedule may have moved it from ``self.lr``).
            step: 1 for the first update of the table.
        """


@dataclass(frozen=True)
class SGD(FusedOptimizer):
    """``w -= lr * g``, as ``torch.optim.SGD`` without momentum.

    >>> SGD(lr=0.1).state_bytes(rows=1000, width=16)
    0
    """

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        return weight.sub(grad, alpha=lr)


@dataclass(frozen=True)
class Adagrad(FusedOptimizer):
    """``s += g*g; w -= lr * g / (sqrt(s) + eps)``, as ``torch.optim.Adagrad`` (Duchi et al. 2011).

    >>> Adagrad(lr=0.01).state_bytes(rows=1000, width=16)
    64000
    """

    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    state: ClassVar[Mapping[str, str]] = {"sum": "element"}

    def initial(self, name: str) -> float:
        return self.initial_accumulator_value

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        state["sum"] = state["sum"].addcmul(grad, grad)
        return weight.addcdiv(grad, state["sum"].sqrt().add_(self.eps), value=-lr)


@dataclass(frozen=True)
class RowwiseAdagrad(FusedOptimizer):
    """Adagrad with one accumulator per row: ``s += mean(g*g); w -= lr * g / (sqrt(s) + eps)``, as FBGEMM's.

    >>> RowwiseAdagrad(lr=0.01).state_bytes(rows=1000, width=16)
    4000
    """

    eps: float = 1e-8

    state: ClassVar[Mapping[str, str]] = {"sum": "row"}

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        state["sum"] = state["sum"] + grad.square().mean(-1, keepdim=True)
        return weight.addcdiv(grad, state["sum"].sqrt().add_(self.eps), value=-lr)


@dataclass(frozen=True)
class Adam(FusedOptimizer):
    """Adam on the touched rows, as ``torch.optim.SparseAdam``: moments of other rows neither decay nor move.

    The bias correction counts the table's steps, not the row's (Kingma and Ba 2015, lazy variant).

    >>> Adam(lr=0.001).state_bytes(rows=1000, width=16)
    128000
    """

    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    state: ClassVar[Mapping[str, str]] = {"exp_avg": "element", "exp_avg_sq": "element"}

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        beta1, beta2 = self.betas
        state["exp_avg"] = state["exp_avg"].lerp(grad, 1 - beta1)
        state["exp_avg_sq"] = state["exp_avg_sq"].lerp(grad.square(), 1 - beta2)
        size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return weight.addcdiv(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(self.eps), value=-size)


def sum_duplicates(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Each distinct row once, with the sum of its gradients in order of occurrence.

    Args:
        rows: int64 ``[n]``.
        grad: ``[n, width]``.

    Returns:
        Sorted distinct rows ``[u]`` and sums ``[u, width]``; the same bits for any thread count.

    >>> rows, sums = sum_duplicates(torch.tensor([7, 2, 7]), torch.tensor([[1.0], [2.0], [3.0]]))
    >>> rows.tolist(), sums.tolist()
    ([2, 7], [[2.0], [4.0]])
    """
    if rows.numel() == 0:
        return rows, grad
    # Table rows are below 2**31, and sorting 32-bit keys takes the radix path, several times faster than 64-bit.
    ordered, position = rows.to(torch.int32).sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=first[1:])
    starts = first.nonzero().squeeze(1)
    sums = torch.nn.functional.embedding_bag(position, grad, starts, mode="sum")
    return ordered[starts].long(), sums
