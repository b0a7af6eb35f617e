"""DCN V2 (Wang et al., WWW 2021): cross layers with full or low-rank matrices and an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.models.layers import MLP, CrossMatrix
from recsys_embed.utils.settings import param
from recsys_embed.utils.types import Ids


@dataclass(frozen=True)
class DCNv2Params(MLPParams):
    """Hyperparameters of DCN V2.

    Args:
        cross_layers: number of cross layers.
        rank: rank of each cross matrix; None keeps it full.
        structure: ``"parallel"`` feeds the input to both parts, ``"stacked"`` feeds the cross output to the MLP.
        hidden, dropout, batch_norm: the MLP.
    """

    cross_layers: int = param(3, low=1)
    rank: int | None = param(None, low=1)
    structure: Literal["parallel", "stacked"] = "parallel"


@register
class DCNv2(CTRModel):
    """Matrix cross layers and MLP over all field vectors."""

    key = "dcnv2"
    params_cls = DCNv2Params

    def __init__(self, spec: ModelSpec, params: DCNv2Params) -> None:
        super().__init__(spec)
        width = self.input_width
        self.parallel = params.structure == "parallel"
        self.cross = CrossMatrix(width, params.cross_layers, params.rank)
        self.mlp = MLP(width, params.hidden, None, dropout=params.dropout, batch_norm=params.batch_norm)
        self.head = nn.Linear(self.mlp.out_width + (width if self.parallel else 0), 1)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        x = self.flat_input(dense, ids)
        crossed = self.cross(x)
        joined = torch.cat([crossed, self.mlp(x)], 1) if self.parallel else self.mlp(crossed)
        return self.head(joined).squeeze(1)
