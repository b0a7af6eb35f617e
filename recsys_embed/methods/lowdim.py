"""lowdim: a narrow table times a matrix (low-rank factorisation); a simple, strong baseline."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from recsys_embed.core.heads import Projection
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import importance_of, principal_axes
from recsys_embed.features import FeatureSpec


@dataclass(frozen=True, kw_only=True)
class LowdimConfig(MethodConfig):
    """A table ``[num_embeddings, dim]`` times a learned matrix ``[dim, embedding_dim]``.

    Rows start with the distribution of a full table and matrix elements with variance 1/``dim``, so that outputs start
    with a full table's variance.

    >>> LowdimConfig(dim=4).footprint(FeatureSpec("C1", 1000, 16)).serve
    16256
    """

    method: ClassVar[str] = "lowdim"

    dim: int = param(MISSING, "width of the stored rows", low=1)

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if self.dim > spec.embedding_dim:
            faults.append(f"`dim` must be in [1, {spec.embedding_dim}], the feature's width; got {self.dim}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        rows = Table("weight", spec.num_ids, self.dim, Initializer.plain(spec))
        matrix = Table(
            "projection", self.dim, spec.embedding_dim, Initializer("uniform", (3 / self.dim) ** 0.5), dense=True
        )
        return LookupProgram((rows, matrix), (RowLookup("weight", MixedRadixDigit()),), head=Projection("projection"))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return spec.embedding_dim

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "dim": size})


class LowdimEmbedding(CompressedEmbedding):
    """Drop-in over a narrow table and a projection.

    >>> import torch
    >>> emb = LowdimEmbedding(1000, 16, dim=4)
    >>> emb(torch.tensor([[1, 999]])).shape
    torch.Size([1, 2, 16])
    """

    config_cls = LowdimConfig

    @torch.no_grad()
    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Set table and matrix to the best approximation of ``weight [num_embeddings, embedding_dim]`` of rank ``dim``.

        The optimum is known (Eckart and Young 1936): the matrix holds the leading right singular vectors of the rows
        scaled by the square roots of ``counts``, and the table the rows' coordinates along them.
        """
        importance, table = importance_of(self, weight, counts), self.table("weight")
        basis = principal_axes(weight, importance, table.shape[1], self._chunks(len(weight)))
        self.table("projection").copy_(basis.T)
        for ids in self._chunks(len(weight)):
            table[ids] = (weight[ids].double() @ basis).to(table.dtype)
