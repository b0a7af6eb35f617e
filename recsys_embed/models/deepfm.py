"""DeepFM (Guo et al., IJCAI 2017): a factorization machine and an MLP on the same vectors."""

from __future__ import annotations

from torch import Tensor

from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.models.layers import pair_sum
from recsys_embed.utils.types import Ids


@register
class DeepFM(CTRModel):
    """First-order terms + dot products of all pairs + MLP over all field vectors."""

    key = "deepfm"
    params_cls = MLPParams
    uses_linear = True
    needs_equal_widths = True

    def __init__(self, spec: ModelSpec, params: MLPParams) -> None:
        super().__init__(spec)
        self.mlp = self.field_mlp(params)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        vectors = self.vectors(ids)
        deep = self.mlp(vectors.flatten(1), dense, self.numeric).squeeze(1)
        return self.first_order(dense, ids) + pair_sum(vectors, dense, self.numeric) + deep
