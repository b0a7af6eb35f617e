"""DLRM (Naumov et al., arXiv 1906.00091): a bottom MLP on numbers, dot products of all pairs, a top MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.models.layers import MLP, PairDots
from recsys_embed.utils.settings import param
from recsys_embed.utils.types import Ids


@dataclass(frozen=True)
class DLRMParams(MLPParams):
    """``bottom``: hidden sizes of the MLP on numeric columns; ``hidden``: those of the top MLP."""

    bottom: tuple[int, ...] = param((256, 64), low=1, empty=True)


@register
class DLRM(CTRModel):
    """A bottom MLP maps numeric columns to one vector; dot products of all pairs of vectors feed the top MLP."""

    key = "dlrm"
    params_cls = DLRMParams
    uses_numeric_vectors = False
    needs_equal_widths = True

    def __init__(self, spec: ModelSpec, params: DLRMParams) -> None:
        super().__init__(spec)
        if spec.num_dense < 1:
            raise ConfigError(f"`num_dense` must be an integer >= 1; got {spec.num_dense} (model 'dlrm')")
        self.bottom = MLP(
            spec.num_dense, (*params.bottom, self.numeric_dim), None, dropout=params.dropout, batch_norm=False
        )
        self.dots = PairDots(self.vectors.num_vectors + 1)
        self.mlp = MLP(
            self.numeric_dim + self.dots.out_width,
            params.hidden,
            1,
            dropout=params.dropout,
            batch_norm=params.batch_norm,
        )

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        number = self.bottom(dense)
        dots = self.dots(torch.cat([number.unsqueeze(1), self.vectors(ids)], 1))
        return self.mlp(torch.cat([number, dots], 1)).squeeze(1)
