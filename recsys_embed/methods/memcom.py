"""memcom: ids share hashed rows, and each id scales its row by a learned scalar (MEmCom, arXiv 2203.10135)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Hash, Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table, Weight
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import importance_of
from recsys_embed.features import MAX_ROWS, FeatureSpec

# Largest number of elements of the matrices that a fit holds at once.
_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class MemcomConfig(MethodConfig):
    """``e(i) = U[i mod num_buckets] * v_i``, with ``bias`` also ``+ w_i``, the same for every column.

    The scalars start at v = 1 and w = 0, so that training starts from plain hashing and ids of one row diverge
    (Pansare et al., MLSys 2022).

    Pitfalls: one or two scalars PER ID are stored, which bounds the compression at ``embedding_dim`` (half of it with
    ``bias``); for tables of very many ids these outweigh the rows. With ids numbered by falling frequency, ``"mod"``
    gives the ``num_buckets`` most frequent ids distinct rows, as the method intends. Where ids have another structure
    (periodic, grouped), they collide in that pattern; ``hash="splitmix64"`` avoids this.

    >>> MemcomConfig(num_buckets=500).footprint(FeatureSpec("C1", 10_000, 16)).serve  # 4 * (500 * 16 + 10_000)
    72000
    """

    method: ClassVar[str] = "memcom"

    num_buckets: int = param(MISSING, "shared rows", low=1, high=MAX_ROWS)
    bias: bool = param(False, "add a learned number per id to every column")
    hash: Literal["mod", "splitmix64"] = param("mod", "'mod' is the paper's `id % num_buckets`")

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if self.num_buckets > spec.num_ids:
            faults.append(f"`num_buckets` must be in [1, {spec.num_ids}]; got {self.num_buckets}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        salt = hashing.salt(self.seed, spec.table_name, "row", 0)
        rows = MixedRadixDigit(mod=self.num_buckets) if self.hash == "mod" else Hash(salt, self.num_buckets)
        tables = [
            Table("weight", self.num_buckets, spec.embedding_dim, Initializer.plain(spec)),
            Table("scale", spec.num_ids, 1, Initializer("constant", loc=1.0)),
        ]
        row_lookups = [RowLookup("weight", rows, weight=Weight("scale", MixedRadixDigit()))]
        if self.bias:
            tables.append(Table("bias", spec.num_ids, 1, Initializer("constant")))
            row_lookups.append(RowLookup("bias", MixedRadixDigit(), width=spec.embedding_dim))
        return LookupProgram(tuple(tables), tuple(row_lookups))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "num_buckets": size})


class MemcomEmbedding(CompressedEmbedding):
    """Drop-in over shared rows, each scaled (and with ``bias`` shifted) by a learned number per id.

    >>> import torch
    >>> emb = MemcomEmbedding(1_000_000, 16, num_buckets=50_000)
    >>> emb(torch.tensor([1, 999_999])).shape
    torch.Size([2, 16])
    """

    config_cls = MemcomConfig

    @torch.no_grad()
    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Set rows and scalars to the best approximation of ``weight [spec.num_ids, embedding_dim]``.

        The ids of a bucket are approximated by multiples of one row, so the optimum is the leading right singular
        vector of their rows (Eckart and Young 1936), scaled by the square roots of ``counts``. A bias fits the mean
        over columns of each id, whatever the row, so the row fits what is left of it. The scalars of a bucket have
        mean square 1.
        """
        importance = importance_of(self, weight, counts)
        rows, scale, device = self.table("weight"), self.table("scale"), weight.device
        bucket = self.program.row_lookups[0].transform.rows(torch.arange(len(weight), device=device))
        if self._biased:
            self.table("bias").copy_(weight.mean(1, keepdim=True, dtype=torch.float64))
        for first, last, parts in self._by_bucket(bucket):
            gram = torch.zeros(last - first, *(2 * [self.embedding_dim]), dtype=torch.float64, device=device)
            mass = torch.zeros(last - first, dtype=torch.float64, device=device)
            lean = torch.zeros_like(mass)
            for ids in parts:
                target, share, place = self._target(weight, ids), importance[ids], bucket[ids] - first
                gram.index_add_(0, place, target.unsqueeze(2) * (target * share.unsqueeze(1)).unsqueeze(1))
                mass.index_add_(0, place, share)
            energy, vectors = (leading[..., -1] for leading in torch.linalg.eigh(gram))
            for ids in parts:
                place = bucket[ids] - first
                along = (self._target(weight, ids) * vectors[place]).sum(1)
                lean.index_add_(0, place, importance[ids] * along)
            # The direction is known up to its sign; scalars start at 1, so most of them stay positive.
            fitted = vectors * (energy / mass).sqrt().unsqueeze(1) * torch.where(lean < 0, -1.0, 1.0).unsqueeze(1)
            # Rows that no counted id reads keep their values.
            row = torch.where((energy > 0).unsqueeze(1), fitted, rows[first:last].double())
            rows[first:last] = row.to(rows.dtype)
            square = row.square().sum(1)
            square.masked_fill_(square == 0, 1.0)
            for ids in parts:
                place = bucket[ids] - first
                along = (self._target(weight, ids) * row[place]).sum(1) / square[place]
                scale[ids] = along.unsqueeze(1).to(scale.dtype)

    @property
    def _biased(self) -> bool:
        return any(table.name == "bias" for table in self.program.tables)

    def _target(self, weight: Tensor, ids: Tensor) -> Tensor:
        """The target that multiples of the shared rows approximate: float64 ``[n, embedding_dim]``."""
        target = weight[ids].double()
        return target - target.mean(1, keepdim=True) if self._biased else target

    def _by_bucket(self, bucket: Tensor) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
        """Ranges of buckets with their ids, cut so that a matrix per bucket, or per id of a part, stays small."""
        step = max(1, _AT_ONCE // self.embedding_dim**2)
        order = bucket.argsort()
        count = self.table("weight").shape[0]
        ends = torch.bincount(bucket, minlength=count).cumsum(0)
        for first in range(0, count, step):
            last = min(first + step, count)
            ids = order[int(ends[first - 1]) if first else 0 : int(ends[last - 1])]
            yield first, last, ids.split(step)
