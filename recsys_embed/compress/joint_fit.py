"""Fit drop-ins that share physical tables to their trained tables, in one least-squares problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import fit_tables


class _Joint(nn.Module):
    """Several drop-ins as one module over the ids of all of them, as :func:`fit_tables` expects it."""

    mode = None

    def __init__(self, members: Sequence[CompressedEmbedding]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.output_dim = max(m.output_dim for m in members)

    def table(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def parameter_name(self, table: str) -> str:
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of all ids of all members, narrow ones padded with zeros; of ``ids`` only the device is used."""
        out = []
        for module in self.members:
            member = cast("CompressedEmbedding", module)
            vectors = member._vectors(torch.arange(member.spec.num_ids, device=ids.device))
            out.append(F.pad(vectors, (0, self.output_dim - vectors.shape[1])))
        return torch.cat(out)


def fit_jointly(
    members: Sequence[CompressedEmbedding], weights: Sequence[Tensor], counts: Sequence[Tensor | None]
) -> None:
    """Set the tables of ``members`` so that each approximates its ``weights [num_embeddings, width]``.

    One least-squares problem over the ids of all members: a row that several of them read is fitted to all of them.
    Without counts every id has the same weight. Features of one data set have equal sums of counts, hence equal weight.
    """
    joint: Any = _Joint(members)
    target = torch.cat([F.pad(w, (0, joint.output_dim - w.shape[1])) for w in weights])
    importance = None
    if any(c is not None for c in counts):
        # Ids without counts get the mean count of the other features' ids as weight.
        known = torch.cat([c.double() for c in counts if c is not None])
        parts = [
            known.new_full((len(w),), float(known.mean())) if c is None else c.double()
            for w, c in zip(weights, counts, strict=True)
        ]
        importance = torch.cat(parts)
    fit_tables(joint, target, importance, names=[name for name, _ in joint.named_parameters()])


@torch.no_grad()
def relative_error(module: CompressedEmbedding, weight: Tensor, counts: Tensor | None) -> float | None:
    """Frobenius norm of the difference between the vectors of ``module`` and ``weight``, over the norm of ``weight``.

    Ids are weighted by ``counts``, the padding id is left out. None where only ``weight`` is all zeros.
    """
    lost = total = 0.0
    for start in range(0, len(weight), 1 << 16):
        ids = torch.arange(start, min(start + (1 << 16), len(weight)), device=weight.device)
        given = weight[ids].double()
        share = torch.ones(len(ids), dtype=torch.float64, device=weight.device)
        if counts is not None:
            share = counts[ids].double()
        if module.padding_idx is not None:
            share = share.masked_fill(ids == module.padding_idx, 0.0)
        lost += float(((module.lookup(ids).double() - given).square().sum(1) * share).sum())
        total += float((given.square().sum(1) * share).sum())
    if total == 0:
        return 0.0 if lost == 0 else None
    return float((lost / total) ** 0.5)
