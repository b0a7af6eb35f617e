"""Plain deep network over concatenated field vectors."""

from __future__ import annotations

from torch import Tensor

from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.utils.types import Ids


@register
class DNN(CTRModel):
    """MLP over all field vectors side by side."""

    key = "dnn"
    params_cls = MLPParams

    def __init__(self, spec: ModelSpec, params: MLPParams) -> None:
        super().__init__(spec)
        self.mlp = self.field_mlp(params)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        return self.mlp(self.vectors(ids).flatten(1), dense, self.numeric).squeeze(1)
