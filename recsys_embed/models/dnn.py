"""Plain deep network over concatenated field vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recsys_embed.models.base import CTRModel, ModelSpec, register
from recsys_embed.models.layers import FieldMLP, check_mlp


@dataclass(frozen=True)
class DNNParams:
    """Sizes of the MLP; see :class:`recsys_embed.models.layers.MLP`."""

    hidden: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        check_mlp("model 'dnn'", self.hidden, self.dropout)


@register
class DNN(CTRModel):
    """MLP over all field vectors side by side."""

    key = "dnn"
    params_cls = DNNParams

    def __init__(self, spec: ModelSpec, params: DNNParams) -> None:
        super().__init__(spec)
        self.mlp = FieldMLP(
            self.cat_width,
            self.num_dense,
            self.numeric_dim,
            params.hidden,
            1,
            dropout=params.dropout,
            batch_norm=params.batch_norm,
        )

    def logits(self, dense: Tensor, ids: Tensor) -> Tensor:
        return self.mlp(self.vectors(ids).flatten(1), dense, self.numeric).squeeze(1)
