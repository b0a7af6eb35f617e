"""Optimizers that update embedding rows inside the backward pass, touching only the rows a batch reads.

Every rule sees each touched row once, with the sum of the gradients of all its occurrences in the batch (exact
semantics). Rows outside the batch keep their weights and state; or, with ``rows="all"``, they move as torch's dense
optimizers move them, each row's missed steps being made up for when it is next read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

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
        weight_decay: L2 penalty, ``weight_decay * w`` added to the gradient of every row that moves.
        rows: which rows a step moves: ``"touched"``, those of the batch; or ``"all"``, so that weights are those of the
            dense optimizer of torch (rows that are never read decay and moments fade). The others wait: a row makes
            up for the steps it missed when it is next read, and all do before they are evaluated or saved.

    Raises:
        ConfigError: an argument is out of range.
    """

    lr: float = 0.01
    weight_decay: float = field(default=0.0, kw_only=True)
    rows: Literal["touched", "all"] = field(default="touched", kw_only=True)

    # Name and kind of each state tensor: "row" is one float per row, "element" one per weight, "step" a count per row.
    state: ClassVar[Mapping[str, str]] = {}
    # Whether a row moves on without a gradient, by what it remembers.
    fades: ClassVar[bool] = True

    def __post_init__(self) -> None:
        raise_faults([fault for f in fields(self) for fault in self._faults(f.name)], type(self).__name__)

    def _faults(self, name: str) -> list[str]:
        """What is wrong with one argument."""
        value = getattr(self, name)
        choices = _CHOICES.get(name)
        if choices:
            ok, wanted = value in choices, " or ".join(map(repr, choices))
        elif name == "betas":
            ok = isinstance(value, tuple) and len(value) == 2 and all(is_rate(b) and b < 1 for b in value)
            wanted = "two numbers in [0, 1)"
        else:
            ok, wanted = is_rate(value), "a finite number >= 0"
        return [] if ok else [f"`{name}` must be {wanted}; got {value!r}"]

    @property
    def tensors(self) -> dict[str, str]:
        """Name and kind of every state tensor of a table; ``last`` is the step each row has come to."""
        return {**self.state, "last": "step"} if self.lazy else dict(self.state)

    @property
    def lazy(self) -> bool:
        """Whether rows outside a batch move, and make up for it when they are next read."""
        return self.rows == "all" and (self.weight_decay > 0 or self.fades)

    def initial(self, name: str) -> float:
        """Value every element of state ``name`` starts with."""
        return 0.0

    def state_bytes(self, rows: int, width: int) -> int:
        """Bytes of float32 state for a table of ``rows`` x ``width``."""
        return 4 * sum(rows * width if kind == "element" else rows for kind in self.tensors.values())

    def pace(self, lr: float, step: int) -> tuple[float, float]:
        """What a step's direction is multiplied by, and the epsilon of its denominator."""
        return lr, getattr(self, "eps", 0.0)

    @abstractmethod
    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        """New weights of the touched rows.

        Args:
            weight: ``[u, width]`` current weights of the touched rows.
            grad: ``[u, width]`` their summed gradients, weight decay included.
            state: per name of :attr:`state` ``[u, 1]`` or ``[u, width]``; replaced in the dict by its new value.
            lr: current learning rate (a schedule may have moved it from ``self.lr``).
            step: 1 for the first update of the table.
        """


@dataclass(frozen=True)
class SGD(FusedOptimizer):
    """``w -= lr * g``, as ``torch.optim.SGD`` without momentum.

    >>> SGD(lr=0.1).state_bytes(rows=1000, width=16)
    0
    """

    fades: ClassVar[bool] = False

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
    fades: ClassVar[bool] = False

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
    fades: ClassVar[bool] = False

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        state["sum"] = state["sum"] + grad.square().mean(-1, keepdim=True)
        return weight.addcdiv(grad, state["sum"].sqrt().add_(self.eps), value=-lr)


@dataclass(frozen=True)
class Adam(FusedOptimizer):
    """Adam on the touched rows, as ``torch.optim.SparseAdam``: moments of other rows neither decay nor move.

    With ``rows="all"`` it is ``torch.optim.Adam`` on a dense gradient (Kingma and Ba 2015).

    Args:
        bias_correction: counts the ``"table"``'s steps, or each ``"row"``'s own, so that a row first seen late starts
            with steps as long as those of a row seen early.

    >>> Adam(lr=0.001).state_bytes(rows=1000, width=16)
    128000
    """

    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: Literal["table", "row"] = "table"

    state: ClassVar[Mapping[str, str]] = {"exp_avg": "element", "exp_avg_sq": "element"}

    def _faults(self, name: str) -> list[str]:
        if name == "bias_correction" and self.bias_correction == "row" and self.rows == "all":
            return ["`bias_correction` must be 'table' where all rows move, since they all take the table's steps"]
        return super()._faults(name)

    @property
    def tensors(self) -> dict[str, str]:
        return {**super().tensors, "count": "step"} if self.bias_correction == "row" else super().tensors

    def correction(self, step: int) -> float:
        """Factor that makes up for moments which start at zero."""
        beta1, beta2 = self.betas
        return math.sqrt(1 - beta2**step) / (1 - beta1**step)

    def pace(self, lr: float, step: int) -> tuple[float, float]:
        if self.bias_correction == "row":
            return lr, self.eps
        # SparseAdam adds epsilon to the biased denominator, Adam to the corrected one.
        eps = self.eps * math.sqrt(1 - self.betas[1] ** step) if self.rows == "all" else self.eps
        return lr * self.correction(step), eps

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        beta1, beta2 = self.betas
        state["exp_avg"] = state["exp_avg"].lerp(grad, 1 - beta1)
        state["exp_avg_sq"] = state["exp_avg_sq"].lerp(grad.square(), 1 - beta2)
        size, eps = self.pace(lr, step)
        direction = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(eps)
        if self.bias_correction == "row":
            state["count"] = state["count"] + 1
            count = state["count"].double()
            direction = direction * ((1 - beta2**count).sqrt() / (1 - beta1**count)).to(weight.dtype)
        return weight.sub(direction, alpha=size)


_CHOICES: Mapping[str, tuple[str, ...]] = {"rows": ("touched", "all"), "bias_correction": ("table", "row")}


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
