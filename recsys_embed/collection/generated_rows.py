"""Lookups of features whose rows are computed: by kernels, of the distinct ids of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from recsys_embed.collection.batched_lookup import BatchedLookup
from recsys_embed.kernels.distinct_ids import distinct_ids
from recsys_embed.kernels.native.autograd import NativeStep
from recsys_embed.kernels.row_cache import RowCaches


class GeneratedLookup(NamedTuple):
    """How kernels look up features whose rows are computed, in one forward of all features.

    Args:
        lookup_of: the lookup of one feature by its position; None of those that kernels leave to torch.
        tables: per storage.
        step: of tables with a fused optimizer, one step of all features.
        sparse: gradients of other tables are sparse.
        caches: of served rows.
    """

    lookup_of: Callable[[int], BatchedLookup | None]
    tables: list[Tensor]
    step: NativeStep | None
    sparse: bool
    caches: RowCaches | None

    def __call__(self, feature: int, ids: Tensor) -> Tensor | None:
        """Vectors ``[n, width]`` of resolved ``ids [n]``; None: torch has to."""
        batched = self.lookup_of(feature)
        if batched is None:
            return None

        def compute(distinct: Tensor) -> Tensor:
            (vectors,) = batched.single(distinct.unsqueeze(1), self.tables, self.step, self.sparse, resolved=True)
            return vectors.flatten(1)

        kept = None if self.caches is None else self.caches.rows(feature, ids, compute)
        if kept is not None:
            return kept
        found = distinct_ids(ids)
        return found.scatter(compute(found.ids))
