"""RMSprop with one mean per row, and decay by how long a row was not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recsys_embed.optim.base import FusedOptimizer, moved_mean
from recsys_embed.optim.registry import register_rule
from recsys_embed.utils.settings import param


@register_rule("rowwise_rmsprop")
@dataclass(frozen=True)
class RowwiseRMSprop(FusedOptimizer):
    """RMSprop with one mean per row and adaptive regularisation, as FBGEMM's ``rowwise_rmsprop_ar``.

    ``v += (1 - ema_beta) * (mean(g*g) - v)``, then ``w = keep * w - lr * g / (sqrt(v) + eps)``, where ``keep`` is
    ``max(min_shrinkage, 1 - min(1, lr * ar_alpha * gap))``. The gap is the number of steps since the row was last
    read, this one counted, and 1 for a row that was never read: rare ids are held closer to 0 than frequent ones, and
    pay when they are read (Li and Lyu, Adaptive Regularization for Large-Scale Sparse Feature Embedding Models, ICLR
    2026).

    ``weight_decay`` times the weight is part of the gradient, as in every rule, beside the adaptive regularisation.
    With ``rows="all"`` every row takes part in every step, so that all gaps are 1 and no row keeps its last step.

    Args:
        ema_beta: share of the mean of squares that a step leaves, in [0, 1].
        ar_alpha: strength of the adaptive regularisation; 0 is plain RMSprop.
        min_shrinkage: least share of a weight that one step leaves, in [0, 1].

    >>> RowwiseRMSprop(lr=0.01).state_bytes(rows=1000, width=16)
    4000
    >>> RowwiseRMSprop(lr=0.01, ar_alpha=0.1).state_bytes(rows=1000, width=16)
    8000
    """

    eps: float = 1e-8
    ema_beta: float = param(0.99, high=1)
    ar_alpha: float = 0.0
    min_shrinkage: float = param(0.1, high=1)

    state: ClassVar[Mapping[str, str]] = {"mean_square": "row"}
    least_exponents: ClassVar[Mapping[str, int]] = {"mean_square": -56}

    @property
    def tensors(self) -> dict[str, str]:
        """``seen`` is the step in which a row was last read, 0 for none."""
        counts = self.ar_alpha > 0 and self.rows == "touched"
        return {**super().tensors, "seen": "step"} if counts else super().tensors

    @property
    def constants(self) -> tuple[float, ...]:
        """1 - ``ema_beta``, ``ar_alpha``, ``min_shrinkage``."""
        return 1 - self.ema_beta, self.ar_alpha, self.min_shrinkage

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        square = grad.square().mean(-1, keepdim=True)
        state["mean_square"] = moved_mean(state["mean_square"], square, 1 - self.ema_beta)
        moved = grad * (lr / (state["mean_square"].sqrt() + self.eps))
        gap = torch.ones_like(square)
        if "seen" in state:
            gap = (step - state["seen"]).to(gap.dtype).where(state["seen"] > 0, 1.0)
            state["seen"] = torch.full_like(state["seen"], step)
        keep = 1 - (gap * (lr * self.ar_alpha)).clamp(max=1)
        return weight * keep.clamp(min=self.min_shrinkage) - moved
