"""Wide & Deep (Cheng et al., DLRS 2016): first-order terms plus an MLP, trained jointly."""

from __future__ import annotations

from torch import Tensor

from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.utils.types import Ids


@register
class WideDeep(CTRModel):
    """First-order terms (wide) + MLP over all field vectors (deep)."""

    key = "widedeep"
    params_cls = MLPParams
    uses_linear = True

    def __init__(self, spec: ModelSpec, params: MLPParams) -> None:
        super().__init__(spec)
        self.mlp = self.field_mlp(params)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        deep = self.mlp(self.vectors(ids).flatten(1), dense, self.numeric).squeeze(1)
        return self.first_order(dense, ids) + deep
