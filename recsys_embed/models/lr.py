"""Logistic regression: bias, one weight per category, one per numeric column."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recsys_embed.models.base import CTRModel, ModelSpec, register
from recsys_embed.utils.types import Ids


@dataclass(frozen=True)
class LRParams:
    """LR has no hyperparameters."""


@register
class LR(CTRModel):
    """First-order terms only; its one collection has width 1 and follows ``linear_plan``, or ``plan`` without one."""

    key = "lr"
    params_cls = LRParams
    uses_vectors = False
    uses_linear = True
    uses_network = False

    def __init__(self, spec: ModelSpec, params: LRParams) -> None:
        super().__init__(spec)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        return self.first_order(dense, ids)
