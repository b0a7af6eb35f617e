"""Follow the regularised leader, with weights that are exactly 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recsys_embed.optim.base import FusedOptimizer
from recsys_embed.optim.registry import register_rule

# Rows whose state is computed at a time.
_CHUNK = 1 << 18


@register_rule("ftrl")
@dataclass(frozen=True)
class FTRL(FusedOptimizer):
    """FTRL-Proximal with a rate per weight (McMahan et al. 2013, Algorithm 1), the classic of click prediction.

    ``n += g*g; z += g - (sqrt(n) - sqrt(n - g*g)) / lr * w``, then ``w`` is 0 where ``|z| <= l1`` and else
    ``-(z - sign(z) * l1) / ((beta + sqrt(n)) / lr + l2)``. States are ``sum``, which is n, and ``z``, which starts
    where these formulas give the initial weights.

    Where a weight is not 0, its z follows from it, and that is what a step goes by: weights that are loaded or set are
    trained on, and a schedule of the learning rate moves none by itself. At rate 0 nothing but ``sum`` moves.
    ``weight_decay`` times the weight is part of the gradient, as in every rule, and no part of the regularisation.

    Args:
        beta: keeps the first steps of a weight small.
        l1: gradient that a weight at 0 must gather to leave it; makes weights exactly 0.
        l2: curvature that is added to that of the past steps; shortens steps.

    >>> FTRL(lr=0.1, l1=0.01).state_bytes(rows=1000, width=16)
    128000
    """

    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    state: ClassVar[Mapping[str, str]] = {"sum": "element", "z": "element"}
    least_exponents: ClassVar[Mapping[str, int]] = {"sum": -48}
    decays_without_gradient: ClassVar[bool] = False

    @property
    def constants(self) -> tuple[float, ...]:
        """``beta``, ``l1``, ``l2``."""
        return self.beta, self.l1, self.l2

    def reset_state_(self, name: str, state: Tensor, weight: Tensor) -> None:
        """``z`` starts where the closed form gives the weights."""
        state.zero_()
        if name == "z" and self.lr > 0:
            # By slices, which tables of few bits decode.
            for start in range(0, len(state), _CHUNK):
                z, w = state[start : start + _CHUNK], weight[start : start + _CHUNK]
                z.copy_(-(w * (self.beta / self.lr + self.l2) + w.sign() * self.l1))

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        state["sum"] = state["sum"].addcmul(grad, grad)
        if lr == 0:
            return weight
        curvature = (state["sum"].sqrt() + self.beta) / lr + self.l2
        sign, moved = weight.sign(), weight * curvature - grad
        z = torch.where(sign != 0, -(moved + sign * self.l1), state["z"].clamp(-self.l1, self.l1) + grad)
        state["z"] = z
        # Without beta and l2 a weight that has had no gradient has no curvature.
        curvature = curvature.where(curvature > 0, 1.0)
        crossed = torch.where(z.abs() <= self.l1, 0.0, -(z - z.sign() * self.l1) / curvature)
        return torch.where((moved.sign() * sign > 0) | (grad == 0), weight - grad / curvature, crossed)
