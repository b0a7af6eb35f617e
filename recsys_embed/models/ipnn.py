"""Inner-product network, IPNN (Qu et al., ICDM 2016): an MLP over field vectors and their pairwise dot products."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.models.layers import MLP, PairDots
from recsys_embed.utils.types import Ids


@register
class IPNN(CTRModel):
    """MLP over all field vectors (categorical and numeric) and the dot products of all their pairs."""

    key = "ipnn"
    params_cls = MLPParams
    needs_equal_widths = True

    def __init__(self, spec: ModelSpec, params: MLPParams) -> None:
        super().__init__(spec)
        self.dots = PairDots(self.vectors.num_vectors + self.num_dense)
        self.mlp = MLP(
            self.input_width + self.dots.out_width,
            params.hidden,
            1,
            dropout=params.dropout,
            batch_norm=params.batch_norm,
        )

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        fields = self.field_vectors(dense, ids)
        return self.mlp(torch.cat([fields.flatten(1), self.dots(fields)], 1)).squeeze(1)
