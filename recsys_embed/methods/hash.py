"""hash: ids share the rows of a smaller table through one hash (the hashing trick, Weinberger et al. 2009)."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Hash, Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.features import MAX_ROWS, FeatureSpec


@dataclass(frozen=True, kw_only=True)
class HashConfig(MethodConfig):
    """One table of ``num_buckets`` rows.

    Rows start with the distribution of a full table of the ORIGINAL cardinality, as DLRM's do.

    >>> HashConfig(num_buckets=500).footprint(FeatureSpec("C1", 10_000, 16)).serve
    32000
    """

    method: ClassVar[str] = "hash"
    accepts_raw: ClassVar[bool] = True

    num_buckets: int = param(MISSING, "rows of the table", low=1, high=MAX_ROWS)
    hash: Literal["splitmix64", "mod"] = param("splitmix64", "'mod' is `id % num_buckets`, to reproduce papers")
    sign: bool = param(False, "multiply by a second hash in {-1, +1}: unbiased inner products")

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if spec.ids == "index" and self.num_buckets > spec.num_ids:
            faults.append(f"`num_buckets` must be in [1, {spec.num_ids}]; got {self.num_buckets}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        salt = hashing.salt(self.seed, spec.table_name, "row", 0)
        transform = MixedRadixDigit(mod=self.num_buckets) if self.hash == "mod" else Hash(salt, self.num_buckets)
        sign = hashing.salt(self.seed, spec.table_name, "sign", 0) if self.sign else None
        table = Table("weight", self.num_buckets, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", transform, sign=sign),))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "num_buckets": size})


class HashEmbedding(CompressedEmbedding):
    """Drop-in over a hashed table; takes any int64 id.

    >>> import torch
    >>> emb = HashEmbedding(1_000_000, 16, num_buckets=50_000)
    >>> emb(torch.tensor([1, 2**40])).shape
    torch.Size([2, 16])
    """

    config_cls = HashConfig

    @torch.no_grad()
    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Set every row to the mean of the ids that read it, weighted by ``counts``: the least-squares optimum.

        Rows that no id of positive count reads keep their values. Memory beyond the table is that of a chunk of ids and
        of float64 sums per row.
        """
        (row_lookup,), table = self.program.row_lookups, self.table("weight")
        sums = torch.zeros(table.shape, dtype=torch.float64, device=table.device)
        mass = sums.new_zeros(len(table))
        for ids in self._chunks(len(weight)):
            share = torch.ones_like(ids, dtype=torch.float64) if counts is None else counts[ids].to(sums)
            if self.padding_idx is not None:
                share = share.masked_fill(ids == self.padding_idx, 0.0)
            rows = row_lookup.transform.rows(ids)
            signed = share if row_lookup.sign is None else share * hashing.hash_signs(ids, row_lookup.sign)
            sums.index_add_(0, rows, weight[ids].to(sums) * signed.unsqueeze(1))
            mass.index_add_(0, rows, share)
        read = (mass > 0).nonzero().squeeze(1)
        table[read] = (sums[read] / mass[read].unsqueeze(1)).to(table)
