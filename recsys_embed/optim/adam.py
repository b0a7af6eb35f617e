"""Adam."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from recsys_embed.optim.base import FusedOptimizer, moved_mean
from recsys_embed.optim.registry import register_rule
from recsys_embed.utils.settings import param


@register_rule("adam")
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
    betas: tuple[float, float] = param((0.9, 0.999), below=1)
    eps: float = 1e-8
    bias_correction: Literal["table", "row"] = "table"

    state: ClassVar[Mapping[str, str]] = {"exp_avg": "element", "exp_avg_sq": "element"}
    least_exponents: ClassVar[Mapping[str, int]] = {"exp_avg_sq": -56}

    def conflicts(self) -> list[str]:
        if self.bias_correction == "row" and self.rows == "all":
            return ["`bias_correction` must be 'table' where all rows move, since they all take the table's steps"]
        return super().conflicts()

    @property
    def tensors(self) -> dict[str, str]:
        return {**super().tensors, "count": "step"} if self.bias_correction == "row" else super().tensors

    @property
    def constants(self) -> tuple[float, ...]:
        """1 - beta of both moments, and the logarithms of both betas."""
        return (*(1 - b for b in self.betas), *(math.log(b) if b else -math.inf for b in self.betas))

    def curve(self) -> array[float]:
        """Bias corrections, up to where they stay 1."""
        if self.bias_correction == "table":
            return super().curve()
        most = 1 << 17
        # Not the first that is 1: betas of 0.9 and 0.99 have it at the first step, then fall to 0.74.
        last = next((n for n in range(1, most) if max(self.betas) ** n < 1e-8), most)
        return array("d", map(self.correction, range(1, last + 1)))

    def correction(self, step: int) -> float:
        """Factor that corrects the bias of moments which start at zero."""
        beta1, beta2 = self.betas
        return math.sqrt(1 - beta2**step) / (1 - beta1**step)

    def size_and_epsilon(self, lr: float, step: int) -> tuple[float, float]:
        if self.bias_correction == "row":
            return lr, self.eps
        # SparseAdam adds epsilon to the biased denominator, Adam to the corrected one.
        eps = self.eps * math.sqrt(1 - self.betas[1] ** step) if self.rows == "all" else self.eps
        return lr * self.correction(step), eps

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        beta1, beta2 = self.betas
        state["exp_avg"] = state["exp_avg"].lerp(grad, 1 - beta1)
        state["exp_avg_sq"] = moved_mean(state["exp_avg_sq"], grad.square(), 1 - beta2)
        size, eps = self.size_and_epsilon(lr, step)
        direction = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(eps)
        if self.bias_correction == "row":
            state["count"] = state["count"] + 1
            count = state["count"].double()
            direction = direction * ((1 - beta2**count).sqrt() / (1 - beta1**count)).to(weight.dtype)
        return weight.sub(direction, alpha=size)
