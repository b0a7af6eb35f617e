"""An embedding collection whose tables TorchRec holds, so that DistributedModelParallel can shard them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.collection.bags import Bags, to_bags
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.core import hashing
from recsys_embed.core.footprint import Footprint
from recsys_embed.errors import ConfigError
from recsys_embed.features import Schema
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.id_checks import check_id_dtype, given_ids
from recsys_embed.kernels.storage import stack_tables
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan, table_key
from recsys_embed.sharding.physical_tables import PhysicalTable, physical_tables_for, table_of
from recsys_embed.sharding.pooled import PooledFeatures
from recsys_embed.sharding.pooling_split import Pooling, split_by_pooling
from recsys_embed.sharding.row_reader import TorchRecRowReader
from recsys_embed.sharding.shards import LocalShard, fill, shards_of
from recsys_embed.utils.types import Ids, IdValues


class ShardableCollection(Constants):
    """Computes what :class:`recsys_embed.EmbeddingCollection` does, with tables that TorchRec can shard.

    Transforms run first, then TorchRec's EmbeddingBagCollection or EmbeddingCollection reads the physical tables, then
    rows are combined and heads applied. Features whose vectors are sums of rows are pooled on the ranks that hold the
    tables; all others are looked up id by id, combined, then pooled. Methods that compute, projections and other dense
    parameters are data-parallel.

    Args:
        schema: the features, in the order of the id columns.
        plan: a method configuration per feature; full tables when None.
        optimizer: updates the tables inside backward once :func:`recsys_embed.sharding.shard` was called. Before that,
            and with None, tables have ordinary gradients.
        pool: ``"tables"`` pools as described above. ``"ids"`` looks up every feature id by id: bags are bit-identical
            under any sharding, because one rank pools each of them, and a row that a batch reads repeatedly is sent
            once. With gloo, only ``"ids"`` allows batch sizes to differ between processes; with NCCL both do.
        weighted: ids bring weights; every feature must pool by sum.
        seed: of the initial weights, which are those of an EmbeddingCollection of that seed.
        device: of the tables; ``"meta"`` allocates none until they are sharded.

    Raises:
        ConfigError: plan and schema do not fit; all faults at once.

    >>> from recsys_embed import FeatureSpec, Plan, Schema
    >>> schema = Schema([FeatureSpec("C1", 1000, 16), FeatureSpec("C2", 50_000, 16)])
    >>> coll = ShardableCollection(schema, Plan.uniform(schema, "hash", budget="100KiB"))
    >>> coll(torch.tensor([[3, 7], [999, 49_999]])).shape
    torch.Size([2, 2, 16])
    """

    def __init__(
        self,
        schema: Schema,
        plan: Plan | None = None,
        optimizer: FusedOptimizer | None = None,
        *,
        pool: Pooling = "tables",
        weighted: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.schema, self.plan = schema, Plan.full(schema) if plan is None else plan
        self.optimizer, self.seed, self.pool = optimizer, seed, pool
        if pool not in ("tables", "ids"):
            raise ConfigError(f"`pool` must be 'tables' or 'ids'; got {pool!r}")
        if optimizer is not None and not isinstance(optimizer, FusedOptimizer):
            raise ConfigError(f"`optimizer` must be a fused optimizer of recsys_embed, or None; got {optimizer!r:.80}")
        if weighted and any(s.pooling != "sum" for s in schema):
            raise ConfigError("`weighted` needs pooling 'sum' for every feature")
        self.tables = self.plan.tables(schema)
        self.physical_tables = physical_tables_for(self.tables, optimizer)
        self.weighted = weighted
        device = torch.device("cpu" if device is None else device)
        like = torch.empty(0, device="cpu" if device.type == "meta" else device)
        pooled, by_id = split_by_pooling(schema, self.plan, pool)
        self.readers = nn.ModuleDict()
        self.by_bag: PooledFeatures | None = None
        self.by_id: LookupBundle | None = None
        with torch.random.fork_rng(devices=[]):  # TorchRec initialises weights; reset_parameters draws ours
            if by_id:
                self.by_id = self._add_by_id(self._part(by_id), device, like)
            if pooled:
                part = self._part(pooled)
                physical_tables = {k: self.physical_tables[k] for k in self._keys(part)}
                self.by_bag = PooledFeatures(part, self.plan, physical_tables, weighted, device, like)
        self._lay_out(pooled, by_id)
        self.reset_parameters()

    def _part(self, names: list[str]) -> Schema:
        return Schema([self.schema[n] for n in names])

    def _keys(self, part: Schema) -> list[str]:
        """Keys of the tables that features read by row, each once."""
        programs = self.plan.gathered(part)
        keys = {table_key(part[n], t): None for n, p in programs.items() for t in p.tables if not t.dense}
        return list(keys)

    def _add_by_id(self, part: Schema, device: torch.device, like: Tensor) -> LookupBundle:
        keys = self._keys(part)
        shapes, places = stack_tables({k: self.tables[k] for k in keys})
        for storage in shapes:
            held = [self.physical_tables[k] for k in keys if places[k].storage == storage]
            self.readers[storage] = TorchRecRowReader(held, device)
        return LookupBundle(part, self.plan, places, shapes, like, "torch")

    def _lay_out(self, pooled: list[str], by_id: list[str]) -> None:
        """Set the order of the parts' features in the schema and of their columns in the output."""
        bundles = [part.bundle if isinstance(part, PooledFeatures) else part for part in (self.by_bag, self.by_id)]
        sizes = {
            s.name: (width, vectors)
            for bundle in bundles
            if bundle is not None
            for s, width, vectors in zip(bundle.schema, bundle.widths, bundle.vectors, strict=True)
        }
        # Floats and vectors per feature, in schema order.
        self.widths = [sizes[n][0] for n in self.schema.names]
        self.vectors = [sizes[n][1] for n in self.schema.names]
        kinds = {w // v for w, v in zip(self.widths, self.vectors, strict=True)}
        self.output_dim = kinds.pop() if len(kinds) == 1 else None
        place = {name: i for i, name in enumerate(self.schema.names)}
        self.add_constant("bag_features", [place[n] for n in pooled])
        self.add_constant("id_features", [place[n] for n in by_id])
        unit = self.widths if self.output_dim is None else self.vectors
        starts, at = {}, 0
        for name in (*pooled, *by_id):
            starts[name], at = at, at + unit[place[name]]
        order = [starts[n] + j for n in self.schema.names for j in range(unit[place[n]])]
        self.ordered = order == sorted(order)
        self.add_constant("order", order)

    @property
    def num_vectors(self) -> int:
        """Vectors per sample: one per feature, more where a method generates features."""
        return sum(self.vectors)

    def readers_of(self, key: str) -> dict[str, int]:
        """Features that read a table id by id, with the number of rows per id."""
        found: dict[str, int] = {}
        for name, program in (self.by_id.programs if self.by_id is not None else {}).items():
            keys = {t.name: table_key(self.schema[name], t) for t in program.tables}
            for row_lookup in program.row_lookups:
                weight = 0 if row_lookup.weight is None else int(keys[row_lookup.weight.table] == key)
                found[name] = found.get(name, 0) + row_lookup.num_rows * int(keys[row_lookup.table] == key) + weight
        return {name: n for name, n in found.items() if n}

    @property
    def bundle(self) -> LookupBundle:
        """The lookups of a collection that looks up every feature id by id."""
        if self.by_id is None or self.by_bag is not None:
            raise ConfigError("this collection pools features in their tables; build it with pool='ids'")
        return self.by_id

    def bundles(self) -> list[LookupBundle]:
        """The lookups of the pooled features and of the others, where there are such."""
        return [b for b in (None if self.by_bag is None else self.by_bag.bundle, self.by_id) if b is not None]

    # -- lookup ---------------------------------------------------------------------------------------------------

    def _gather(self, storage: str, rows: Tensor, partial_rows: bool) -> Tensor:
        vectors: Tensor = self.readers[storage](rows)
        return vectors

    def forward(self, ids: Ids, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Vectors of all features; ``ids`` in any form that :meth:`recsys_embed.EmbeddingCollection.forward` takes.

        Returns:
            ``[B, num_vectors, output_dim]`` where all widths agree, else ``[B, sum of widths]``.

        Raises:
            IdRangeError: names the first feature with an unseen id that neither its ``unseen`` nor its method takes.
        """
        if isinstance(ids, Tensor) and ids.dim() == 2 and offsets is None and per_sample_weights is None:
            check_id_dtype(ids, "")
            if ids.shape[1] != len(self.schema):
                raise ConfigError(f"ids must be [B, {len(self.schema)}], a column per feature; got {tuple(ids.shape)}")
            if self.by_bag is None and self.by_id is not None:
                return self.by_id.single(ids.long(), self._gather)
            each = torch.arange(ids.numel() + 1, device=ids.device)
            return self._pooled(Bags(ids.long().t().reshape(-1), each, None, len(ids)))
        return self._pooled(to_bags(self.schema, self._given(ids), offsets, per_sample_weights))

    if TYPE_CHECKING:  # torch types a module's call as anything
        __call__ = forward

    def lookup(self, feature: str, ids: IdValues) -> Tensor:
        """Vectors of the ids of one feature, one per id; see :meth:`recsys_embed.EmbeddingCollection.lookup`.

        Every process has to call it, with ids of its own.

        Raises:
            ConfigError: the feature is pooled in its tables; or TorchRec steps the tables in backward, once per lookup.
        """
        self.schema[feature]  # raises where there is none
        bundle = self.by_id
        if bundle is None or feature not in bundle.schema.names:
            raise ConfigError(
                f"feature {feature!r} is pooled on the ranks that hold its tables, which give no vector per id; build "
                "the collection with pool='ids'"
            )
        if self.optimizer is not None and self.training and torch.is_grad_enabled():
            raise ConfigError(
                f"TorchRec steps tables in the backward of each lookup, so lookup({feature!r}) beside others would be "
                "a step of its own; build the collection with optimizer=None, or look up under torch.no_grad()"
            )
        number = bundle.position(feature)
        given = given_ids(ids, bundle.schema.features[number], bundle.hashes[number], self)
        given = check_id_dtype(given, feature)
        out = bundle.unpooled(number, given.reshape(-1).long(), self._gather)
        return out.view(*given.shape, out.shape[1])

    def _given(self, ids: Ids) -> Ids:
        if not isinstance(ids, Mapping):
            return ids
        out = dict(ids)
        for bundle in self.bundles():
            out |= bundle.given({name: out[name] for name in bundle.schema.names if name in out}, self)
        return out

    def _pooled(self, bags: Bags) -> Tensor:
        if (bags.weights is not None) != self.weighted and self.by_bag is not None:
            raise ConfigError(
                f"ids {'bring' if self.weighted is False else 'lack'} weights; set `weighted` accordingly"
            )
        if self.by_bag is None and self.by_id is not None:
            return self.by_id.pooled(bags, self._gather)
        if self.by_id is None and self.by_bag is not None:
            out: Tensor = self.by_bag(bags)
            return out
        parts = [
            self.by_bag(_select(bags, self.constant("bag_features", bags.values))),  # type: ignore[misc]
            self.by_id.pooled(_select(bags, self.constant("id_features", bags.values)), self._gather),  # type: ignore[union-attr]
        ]
        if self.output_dim is not None:
            parts = [p.reshape(bags.batch, -1, self.output_dim) if bags.batch else p for p in parts]
        else:
            parts = [p.flatten(1) for p in parts]
        joined = torch.cat(parts, 1)
        return joined if self.ordered else joined.index_select(1, self.constant("order", joined))

    # -- weights --------------------------------------------------------------------------------------------------

    def shards(self) -> Iterator[LocalShard]:
        """The shards that this process holds; before sharding, the full physical tables."""
        for held in self.holders():
            yield from shards_of(held, self.physical_tables)

    def holders(self) -> list[nn.Module]:
        """TorchRec's collections, sharded or not, that hold the physical tables."""
        found: list[Any] = [reader.ec for reader in self.readers.values()]
        return found if self.by_bag is None else [*found, self.by_bag.ebc]

    def stored(self) -> Iterator[tuple[PhysicalTable, nn.Parameter]]:
        """Every physical table before sharding."""
        for held in self.holders():
            for name, parameter in held.named_parameters():
                yield self.physical_tables[table_of(name.split(".")[-2])], parameter

    def reset_parameters(self) -> None:
        """Draw the initial weights that an EmbeddingCollection of this seed has, for the shards of this process."""
        dense: dict[str, Tensor] = {}
        for bundle in self.bundles():
            dense |= bundle.dense_tables()
            bundle.reset_own(self.seed)
        self.assign_(self.plan.assigned(self.schema))
        with torch.no_grad():
            for key, values in dense.items():
                self.tables[key].init.fill_(values, hashing.salt(self.seed, "init", key))
            fill(self.shards(), self.tables, self.seed)

    def assign_(self, counts: Mapping[str, Tensor | Mapping[str, Tensor]]) -> ShardableCollection:
        """Say which ids are frequent; see :meth:`recsys_embed.EmbeddingCollection.assign_`."""
        for bundle in self.bundles():
            bundle.assign_({n: counts[n] for n in bundle.schema.names if n in counts})
        return self

    def footprint(self) -> Footprint:
        """Bytes of all processes together for one copy of every table: weights, index buffers, optimizer state."""
        return self.plan.footprint(self.schema, self.optimizer)

    def extra_repr(self) -> str:
        methods = sorted({self.plan[n].method for n in self.plan})
        return f"{len(self.schema)} features, methods {methods}, optimizer={self.optimizer}, pool={self.pool!r}"


def _select(bags: Bags, features: Tensor) -> Bags:
    """Bags of some features, in ascending order."""
    lengths = bags.lengths.view(-1, bags.batch)
    wanted = torch.zeros(len(lengths), dtype=torch.bool, device=bags.values.device)
    wanted[features] = True
    kept = torch.repeat_interleave(wanted, lengths.sum(1))
    offsets = F.pad(lengths[features].reshape(-1).cumsum(0), (1, 0))
    return Bags(bags.values[kept], offsets, None if bags.weights is None else bags.weights[kept], bags.batch)
