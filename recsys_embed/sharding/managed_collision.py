"""Managed collision: unbounded ids in a bounded table, in which frequent ids own rows and rows are evicted.

TorchRec's MCH (managed collision handling) decides which ids own rows. When a row is reassigned to another id, its
weights are drawn anew and its optimizer state is reset, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from recsys_embed.core import hashing
from recsys_embed.core.program import Initializer
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.optim import FusedOptimizer
from recsys_embed.sharding.fused_updates import fuse
from recsys_embed.sharding.physical_tables import ROW_ALIGNMENT, PhysicalTable, torchrec_name
from recsys_embed.sharding.sharders import BagSharder

Policy = Literal["lfu", "lru", "distance_lfu"]
_POLICIES = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}
_RANGE = 1 << 62
MOST_RANKS = 512


def hash_to_range(ids: Tensor, size: int = _RANGE) -> Tensor:
    """Hash ids uniformly into ``[0, 2**62)``, of which every rank owns a range.

    >>> hash_to_range(torch.tensor([1, 2, -3])).min().item() >= 0
    True
    """
    return (hashing.splitmix64(ids, 0) >> 2) & (_RANGE - 1)


class _Managed(ManagedCollisionEmbeddingBagCollection):
    """TorchRec's module, but reassigned rows are reset before the lookup."""

    def __init__(self, ebc: EmbeddingBagCollection, mcc: ManagedCollisionCollection, owner: ManagedEBC) -> None:
        super().__init__(ebc, mcc)
        self.initializers, self.seed = owner.initializers, owner.seed
        self.watched_optimizers: list[torch.optim.Optimizer] = owner.watched_optimizers

    def forward(self, features: KeyedJaggedTensor, mutate_miss_lengths: bool = True) -> Any:
        remapped = self._managed_collision_collection(features, mutate_miss_lengths)
        for table, rows in self._managed_collision_collection.evict().items():
            if rows is not None and len(rows):
                parameter = self._embedding_module.embedding_bags[table].weight
                redraw_rows(
                    parameter,
                    rows,
                    self.initializers[table],
                    hashing.salt(self.seed, table, str(_exchange_count(self, table))),
                )
                for optimizer in [*getattr(parameter, "_in_backward_optimizers", []), *self.watched_optimizers]:
                    reset_state(optimizer, parameter, rows)
        return self._embedding_module(remapped), None


class _ShardedManaged(ShardedManagedCollisionEmbeddingBagCollection):
    """The same, sharded; fbgemm's own reset supports one optimizer only, and no CPU."""

    initializers: Mapping[str, Initializer]
    seed: int

    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        for table, rows in evictions_per_table.items():
            if rows is None or not len(rows):
                continue
            kernel, index = self._table_to_tbe_and_index[table]
            weight = self._embedding_module.embedding_bags.get_parameter(f"{table}.weight")
            place = f"{self._env.rank}/{_exchange_count(self, table)}"
            redraw_rows(weight, rows, self.initializers[table], hashing.salt(self.seed, table, place))
            with torch.no_grad():
                for state in kernel.split_optimizer_states()[int(index)]:
                    state.view(weight.shape[0], -1)[rows] = 0.0


class ManagedSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """Shards a :class:`ManagedEBC` by rows, for TorchRec's DistributedModelParallel."""

    def __init__(self) -> None:
        super().__init__(ebc_sharder=BagSharder())

    @property
    def module_type(self) -> type[_Managed]:
        return _Managed

    def shard(
        self,
        module: _Managed,
        params: Any,
        env: Any,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _ShardedManaged:
        sharded = _ShardedManaged(
            module,
            params,
            ebc_sharder=self._e_sharder,
            mc_sharder=self._mc_sharder,
            env=env,
            device=torch.device("cpu" if device is None else device),
        )
        sharded.initializers, sharded.seed = module.initializers, module.seed
        return sharded


class ManagedEBC(nn.Module):
    """Embedding bags of unbounded int64 ids: each feature keeps rows for its most frequent ids only.

    During training, TorchRec's MCH counts ids; every ``interval`` steps it assigns rows to ids that became frequent and
    evicts ids that no longer are. Ids without a row share the last one. In ``eval()`` the assignment does not change.
    In one process it runs as it is; :func:`recsys_embed.sharding.shard` shards it by rows.

    Args:
        schema: the features; ``num_embeddings`` is the number of rows of each, and ids are any int64. The number of
            processes must divide ``num_embeddings`` and 512.
        optimizer: updates rows inside backward, once sharded or after :meth:`optimize` in one process.
        policy: which ids keep rows: ``"lfu"``, ``"lru"`` or ``"distance_lfu"``.
        interval: steps between two evictions.
        seed: of the initial rows and of reassigned rows.

    Raises:
        ConfigError: names every feature or argument that does not fit.

    >>> import recsys_embed as rse
    >>> ebc = ManagedEBC(rse.Schema([rse.FeatureSpec("user", 100, 8)]), interval=1)
    >>> ids = KeyedJaggedTensor(["user"], torch.tensor([2**61 + 5, -7]), lengths=torch.tensor([1, 1]))
    >>> ebc(ids)["user"].shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        schema: Schema,
        optimizer: FusedOptimizer | None = None,
        *,
        policy: Policy = "lfu",
        interval: int = 100,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        faults = [
            f"`embedding_dim` must be a multiple of {ROW_ALIGNMENT}; got {s.embedding_dim} (feature {s.name!r})"
            for s in schema
            if s.embedding_dim % ROW_ALIGNMENT
        ]
        faults += [
            f"pooling must be 'sum' or 'mean'; got 'max' (feature {s.name!r})" for s in schema if s.pooling == "max"
        ]
        faults += [f"at least 2 rows are needed; got 1 (feature {s.name!r})" for s in schema if s.num_embeddings < 2]
        for s in schema:
            if s.padding_idx is not None:
                faults.append(f"padding has no place among raw ids; drop `padding_idx` (feature {s.name!r})")
        for table, readers in schema.by_table.items():
            if len(readers) > 1:
                names = ", ".join(s.name for s in readers)
                faults.append(f"a managed table has one feature; ShardableCollection shares {table!r} of {names}")
        if policy not in get_args(Policy):
            faults.append(f"`policy` must be one of {', '.join(get_args(Policy))}; got {policy!r}")
        if type(interval) is not int or interval < 1:
            faults.append(f"`interval` must be an integer of at least 1; got {interval!r}")
        raise_faults(faults, "ManagedEBC")
        self.schema, self.optimizer, self.seed = schema, optimizer, seed
        self.initializers = {torchrec_name(s.name): Initializer.plain(s) for s in schema}
        self.watched_optimizers: list[torch.optim.Optimizer] = []
        device = torch.device(device)
        configs = [
            EmbeddingBagConfig(
                name=torchrec_name(s.name),
                num_embeddings=s.num_embeddings,
                embedding_dim=s.embedding_dim,
                feature_names=[s.name],
                pooling=PoolingType.MEAN if s.pooling == "mean" else PoolingType.SUM,
            )
            for s in schema
        ]
        modules: dict[str, Any] = {
            c.name: MCHManagedCollisionModule(
                zch_size=c.num_embeddings,
                device=device,
                eviction_policy=_POLICIES[policy](),
                eviction_interval=interval,
                input_hash_size=_RANGE,
                input_hash_func=hash_to_range,
                buckets=gcd(c.num_embeddings, MOST_RANKS),
            )
            for c in configs
        }
        with torch.random.fork_rng(devices=[]):
            ebc = EmbeddingBagCollection(tables=configs, device=device)
        self.managed = _Managed(ebc, ManagedCollisionCollection(modules, configs), self)
        with torch.no_grad():
            for name, initializer in self.initializers.items():
                initializer.fill_(ebc.embedding_bags[name].weight, hashing.salt(seed, "init", name))

    def stored(self) -> list[tuple[PhysicalTable, nn.Parameter]]:
        """Layout and parameter of every table, before sharding."""
        bags = self.managed._embedding_module.embedding_bags
        return [
            (PhysicalTable(s.name, s.num_embeddings, s.embedding_dim), bags[torchrec_name(s.name)].weight)
            for s in self.schema
        ]

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """In one process: reset the state that ``optimizer`` keeps of reassigned rows; returns ``optimizer``."""
        self.watched_optimizers.append(optimizer)
        return optimizer

    def optimize(self) -> None:
        """In one process: update the tables inside backward by ``optimizer``, as a sharded module does."""
        if self.optimizer is None:
            raise ConfigError("ManagedEBC was built without `optimizer`")
        fuse(self.stored(), self.optimizer)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """One per feature, as TorchRec's models ask for them."""
        configs: list[EmbeddingBagConfig] = self.managed._managed_collision_collection.embedding_configs()
        return list(configs)

    def is_weighted(self) -> bool:
        """Ids bring no weights."""
        return False

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors by feature name."""
        found, _ = self.managed(features)
        parts = dict(zip(found.keys(), found.values().split(found.length_per_key(), 1), strict=True))
        values = torch.cat([parts[name] for name in self.schema.names], 1)
        return KeyedTensor(list(self.schema.names), [s.embedding_dim for s in self.schema], values)


@torch.no_grad()
def redraw_rows(weight: Tensor, rows: Tensor, initializer: Initializer, seed: int) -> None:
    """Draw the rows of a table anew."""
    fresh = torch.empty(len(rows), weight.shape[1])
    weight.data[rows] = initializer.fill_(fresh, seed).to(weight)


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Reset the optimizer state of some rows of a table to its initial value."""
    for group in optimizer.param_groups:
        if not any(p is parameter for p in group["params"]):
            continue
        start = group.get("initial_accumulator_value", 0.0)
        for name, values in optimizer.state.get(parameter, {}).items():
            if isinstance(values, Tensor) and values.dim() and values.shape[0] == parameter.shape[0]:
                values[rows] = start if name == "sum" else 0


def _exchange_count(module: Any, table: str) -> int:
    """How often rows of a table were reassigned in this process, this time included."""
    counts = module.__dict__.setdefault("_exchanges", {})
    counts[table] = counts.get(table, 0) + 1
    return int(counts[table])
