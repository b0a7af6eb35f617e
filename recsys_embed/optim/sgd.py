"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from recsys_embed.optim.base import FusedOptimizer
from recsys_embed.optim.registry import register_rule


@register_rule("sgd")
@dataclass(frozen=True)
class SGD(FusedOptimizer):
    """``w -= lr * g``, as ``torch.optim.SGD`` without momentum.

    >>> SGD(lr=0.1).state_bytes(rows=1000, width=16)
    0
    """

    decays_without_gradient: ClassVar[bool] = False

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        # Not fused, as in the kernels, so that rows of few bits are rounded alike.
        return weight - grad * lr
