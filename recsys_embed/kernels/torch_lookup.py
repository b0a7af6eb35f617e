"""A batched lookup by torch's differentiable operations, with the outputs of the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.core.program import LookupProgram
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.places import Gather, Place, absent_ids, read_rows
from recsys_embed.kernels.pooling import pool_vectors
from recsys_embed.kernels.vectorised import VectorisedLookup

if TYPE_CHECKING:
    from recsys_embed.kernels.native.records import Slot


class TorchLookup:
    """What a batched lookup of the kernels computes, for the derivatives that they do not have.

    Args: those of :class:`recsys_embed.kernels.native.lookup.NativeLookup`.
    """

    def __init__(
        self,
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        index: IndexStore,
        storages: Sequence[str],
        slots: Sequence[Slot],
        columns: Sequence[int],
        optional: Sequence[bool],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self._storages, self._slots, self._shapes = tuple(storages), tuple(slots), tuple(shapes)
        self._columns, self._optional = list(columns), tuple(optional)
        self._widths = [p.combined_width for p in programs]
        keys = [slot.mean for slot in slots]
        with torch.device(index.device):
            self._lookup = VectorisedLookup(programs, places, keys, optional, index)

    def __call__(
        self,
        values: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        batch: int,
        tables: Sequence[Tensor],
        sparse: bool = False,
    ) -> list[Tensor]:
        """Vectors of ids or bags per output ``[B, *shape]``; ids are in range.

        Args:
            values, offsets, weights, batch: as :class:`recsys_embed.kernels.native.lookup.Ids` has them.
            tables: per storage ``[rows, width]``.
            sparse: gradients of the tables are sparse.
        """
        of = dict(zip(self._storages, tables, strict=True))

        def gather(storage: str, rows: Tensor, partial: bool) -> Tensor:
            return read_rows(of[storage], rows, partial, sparse)

        values = values.long()
        if offsets is None:
            matrix = values.unsqueeze(1) if values.dim() == 1 else values
            asked = [matrix[:, [self._columns[f] for f in g.features]] for g in self._lookup.groups]
            vectors = self._lookup(asked, None, gather)
        else:
            vectors = self._pooled(values, offsets, weights, batch, gather)
        pieces: list[list[tuple[int, Tensor]]] = [[] for _ in self._shapes]
        for g, value in zip(self._lookup.groups, vectors, strict=True):
            for j, f in enumerate(g.features):
                pieces[self._slots[f].output].append((self._slots[f].column, value[:, j]))
        joined = [torch.cat([v for _, v in sorted(p, key=lambda x: x[0])], 1) for p in pieces]
        return [v.view(batch, *shape) for v, shape in zip(joined, self._shapes, strict=True)]

    def _pooled(
        self, values: Tensor, offsets: Tensor, weights: Tensor | None, batch: int, gather: Gather
    ) -> list[Tensor]:
        """Pooled columns ``[B, features, width]`` per group."""
        lengths = offsets.diff()
        feature = torch.repeat_interleave(torch.arange(len(lengths), device=values.device) // max(batch, 1), lengths)
        asked, locals_, bags, factors = [], [], [], []
        for g in self._lookup.groups:
            columns = [self._columns[f] for f in g.features]
            place = torch.full((int(lengths.numel()) // max(batch, 1) or 1,), -1, device=values.device)
            place[columns] = torch.arange(len(columns), device=values.device)
            local = place[feature]
            # In the order of the group's features, whose bags stand together.
            at = torch.cat([(feature == c).nonzero().squeeze(1) for c in columns])
            asked.append(values[at])
            locals_.append(local[at])
            factors.append(None if weights is None else weights[at])
            bags.append(F.pad(lengths.view(-1, batch)[columns].reshape(-1).cumsum(0), (1, 0)))
        out = []
        for g, value, ids, ends, factor in zip(
            self._lookup.groups, self._lookup(asked, locals_, gather), asked, bags, factors, strict=True
        ):
            skipped = absent_ids(ids) if self._optional[g.features[0]] else None
            mode = "mean" if self._slots[g.features[0]].mean else "sum"
            pooled = pool_vectors(value, ends, mode, factor, skipped, include_last_offset=True)
            out.append(pooled.view(len(g.features), batch, -1).transpose(0, 1))
        return out
