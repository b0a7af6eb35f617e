"""Deep & Cross Network (Wang et al., ADKDD 2017): cross layers with weight vectors beside an MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.models.layers import MLP, CrossVector
from recsys_embed.utils.settings import param
from recsys_embed.utils.types import Ids


@dataclass(frozen=True)
class DCNParams(MLPParams):
    """``cross_layers``: number of cross layers; the rest sizes the MLP beside them."""

    cross_layers: int = param(3, low=1)


@register
class DCN(CTRModel):
    """Cross layers and MLP in parallel over all field vectors, joined by one linear layer."""

    key = "dcn"
    params_cls = DCNParams

    def __init__(self, spec: ModelSpec, params: DCNParams) -> None:
        super().__init__(spec)
        width = self.input_width
        self.cross = CrossVector(width, params.cross_layers)
        self.mlp = MLP(width, params.hidden, None, dropout=params.dropout, batch_norm=params.batch_norm)
        self.head = nn.Linear(width + self.mlp.out_width, 1)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        x = self.flat_input(dense, ids)
        return self.head(torch.cat([self.cross(x), self.mlp(x)], 1)).squeeze(1)
