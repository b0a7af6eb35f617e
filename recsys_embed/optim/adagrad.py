"""Adagrad, with squares summed per weight or per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recsys_embed.optim.base import FusedOptimizer, mean_square
from recsys_embed.optim.registry import register_rule


@register_rule("adagrad")
@dataclass(frozen=True)
class Adagrad(FusedOptimizer):
    """``s += g*g; w -= lr * g / (sqrt(s) + eps)``, as ``torch.optim.Adagrad`` (Duchi et al. 2011).

    >>> Adagrad(lr=0.01).state_bytes(rows=1000, width=16)
    64000
    """

    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    state: ClassVar[Mapping[str, str]] = {"sum": "element"}
    least_exponents: ClassVar[Mapping[str, int]] = {"sum": -48}
    decays_without_gradient: ClassVar[bool] = False

    def initial(self, name: str) -> float:
        return self.initial_accumulator_value

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        state["sum"] = state["sum"].addcmul(grad, grad)
        return weight.addcdiv(grad, state["sum"].sqrt().add_(self.eps), value=-lr)


@register_rule("rowwise_adagrad")
@dataclass(frozen=True)
class RowwiseAdagrad(FusedOptimizer):
    """Adagrad with one accumulator per row: ``s += mean(g*g); w -= lr * g / (sqrt(s) + eps)``, as FBGEMM's.

    >>> RowwiseAdagrad(lr=0.01).state_bytes(rows=1000, width=16)
    4000
    >>> RowwiseAdagrad(lr=0.01, state_precision="8bit").state_bytes(rows=1000, width=16)
    1000
    """

    eps: float = 1e-8

    state: ClassVar[Mapping[str, str]] = {"sum": "row"}
    least_exponents: ClassVar[Mapping[str, int]] = {"sum": -48}
    decays_without_gradient: ClassVar[bool] = False

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        # In the kernels' order, so that rows of few bits are rounded alike.
        state["sum"] = state["sum"] + mean_square(grad)
        # Torch's square root of float32 may be off by the last bit, that of float64 is not once it is rounded.
        root = state["sum"].double().sqrt().to(grad.dtype).add_(self.eps)
        return weight - grad * (torch.full_like(root, lr) / root)
