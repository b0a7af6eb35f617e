"""The vectors of all ids of bags, one per id and before they are pooled, where every feature is a full table."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from recsys_embed.collection.bags import Bags
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.places import Place, absent_ids
from recsys_embed.kernels.pooling import pool_vectors
from recsys_embed.plan import Plan, table_key

if TYPE_CHECKING:
    from recsys_embed.collection.embedding_collection import EmbeddingCollection


class BagEntries(NamedTuple):
    """The ids of bags after the policies for unseen ones.

    Args:
        ids: int64 ``[n]``; 0 where no row is read.
        feature: position in the schema of the feature of each, int64 ``[n]``.
        row: of the batch, of each, int64 ``[n]``.
        absent: bool ``[n]``, those that read no row; None where all do.
    """

    ids: Tensor
    feature: Tensor
    row: Tensor
    absent: Tensor | None


class UnpooledBags:
    """Reads rows of the one storage of a collection of full tables of one width; all features in one call.

    Steps of the collection's optimizer, and what is caught up before reading, are as in its own lookups.

    Args:
        coll: stays the owner of its tables.

    Raises:
        ConfigError: features that are no full tables, of several widths, or of more rows than one storage holds.

    >>> from recsys_embed import EmbeddingCollection
    >>> coll = EmbeddingCollection(Schema([FeatureSpec("user", 9, 4), FeatureSpec("tags", 5, 4, pooling="mean")]))
    >>> bags = Bags(torch.tensor([3, 8, 1, 4, 2]), torch.tensor([0, 1, 2, 4, 5]), None, 2)
    >>> unpooled = UnpooledBags(coll)
    >>> entries = unpooled.entries(bags)
    >>> vectors = unpooled.vectors(entries.ids, entries.feature)
    >>> torch.allclose(unpooled.pool(vectors, entries, bags), coll(bags.values, bags.offsets))
    True
    """

    def __init__(self, coll: EmbeddingCollection) -> None:
        schema, plan = coll.schema, coll.plan
        methods = sorted({plan[name].method for name in plan})
        places = (
            [coll.places[table_key(s, plan[s.name].program(s).tables[0])] for s in schema]
            if methods == ["full"]
            else []
        )
        if schema.uniform_dim is None or len({place.storage for place in places}) != 1:
            raise ConfigError(
                "vectors of bags before they are pooled are those of full tables of one width, together below 2**31 "
                f"rows; got methods {', '.join(methods)} and widths {sorted({s.embedding_dim for s in schema})}"
            )
        self.coll, self.storage = coll, places[0].storage
        self.starts = torch.tensor([place.offset for place in places])
        self.means = torch.tensor([s.pooling == "mean" for s in schema])
        self.maxima = torch.tensor([s.pooling == "max" for s in schema])
        weight = coll._weight(self.storage)
        # The storage as the table of one feature. Its constants follow the device of the ids.
        whole = Schema([FeatureSpec("rows", *weight.shape)])
        at, shapes = {"rows.weight": Place(self.storage, 0)}, {self.storage: (weight.shape[0], weight.shape[1])}
        kernels = tuple(coll.bundle.batched)
        self._every_row = LookupBundle(whole, Plan.full(whole), at, shapes, weight, coll.backend, kernels)

    def entries(self, bags: Bags) -> BagEntries:
        """The ids of bags ``f * batch + b``, resolved."""
        bundle, device = self.coll.bundle, bags.values.device
        owners = torch.repeat_interleave(torch.arange(len(bags.offsets) - 1, device=device), bags.lengths)
        feature = owners.div(max(1, bags.batch), rounding_mode="floor")
        values = bundle.unseen(bags.values, feature)
        absent = absent_ids(values) if any(bundle.unseen.zeros) else None
        ids = values if absent is None else values.masked_fill(absent, 0)
        return BagEntries(ids, feature, owners - feature * bags.batch, absent)

    def vectors(self, ids: Tensor, feature: Tensor | int) -> Tensor:
        """Vectors ``[n, D]`` of resolved ids ``[n]`` of features by position, ``[n]`` or one for all."""
        coll = self.coll
        if self.starts.device != ids.device:
            self.starts = self.starts.to(ids.device)
        rows = (ids + self.starts[feature]).unsqueeze(1)
        stepping = coll._stepping
        if not stepping:
            coll._catch_up_before_reading()
        bundle = self._every_row
        found = coll._batched_tables(bundle.batched, rows)
        step, gather = coll._step_of(None if found is None else bundle.batched[found[0]], stepping)
        if found is None:
            return bundle.single(rows, gather).squeeze(1)
        return bundle.single_batched(found[0], rows, found[1], step, coll.sparse, gather).squeeze(1)

    def pool(self, vectors: Tensor, entries: BagEntries, bags: Bags) -> Tensor:
        """Vectors ``[n, D]`` pooled as each feature says: ``[B, F, D]``."""
        count, batch = len(self.coll.schema), bags.batch

        def pooled(mode: str) -> Tensor:
            return pool_vectors(vectors, bags.offsets, mode, None, entries.absent, include_last_offset=True)

        out = pooled("sum")
        means, maxima = (t.to(out.device).repeat_interleave(batch).unsqueeze(1) for t in (self.means, self.maxima))
        if self.means.any():
            lengths = bags.lengths
            if entries.absent is not None:
                left_out = entries.feature[entries.absent] * batch + entries.row[entries.absent]
                lengths = lengths - torch.bincount(left_out, minlength=len(lengths))
            out = torch.where(means, out / lengths.clamp_min(1).unsqueeze(1), out)
        if self.maxima.any():
            out = torch.where(maxima, pooled("max"), out)
        return out.view(count, batch, out.shape[1]).transpose(0, 1)
