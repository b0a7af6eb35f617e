"""Factorization machine (Rendle, ICDM 2010): first-order terms plus dot products of all pairs of field vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recsys_embed.models.base import CTRModel, ModelSpec, register
from recsys_embed.models.layers import pair_sum
from recsys_embed.utils.types import Ids


@dataclass(frozen=True)
class FMParams:
    """FM has no hyperparameters beyond the width of its vectors."""


@register
class FM(CTRModel):
    """First-order terms + sum over pairs of fields of ``<v_i, v_j>``."""

    key = "fm"
    params_cls = FMParams
    uses_linear = True
    uses_network = False
    needs_equal_widths = True

    def __init__(self, spec: ModelSpec, params: FMParams) -> None:
        super().__init__(spec)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        return self.first_order(dense, ids) + pair_sum(self.vectors(ids), dense, self.numeric)
