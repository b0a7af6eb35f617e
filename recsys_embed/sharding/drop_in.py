"""Drop-in for TorchRec's EmbeddingBagCollection: KeyedJaggedTensor in, KeyedTensor out, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.types import DataType

from recsys_embed.errors import raise_faults
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.pooling_split import Pooling
from recsys_embed.utils.types import Option


class HasConfigs(Protocol):
    """What TorchRec's collections say of their tables."""

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]: ...


Features: TypeAlias = HasConfigs | Sequence[EmbeddingBagConfig]
"""A collection of TorchRec, or its list of configurations."""


class CompressedEBC(nn.Module):
    """A drop-in for TorchRec's EmbeddingBagCollection whose features are stored by any plan.

    TorchRec's models accept it, and DistributedModelParallel shards the collections of physical tables inside.

    Args:
        schema: the features with their pooling.
        plan: a method configuration per feature; full tables when None.
        optimizer, pool, weighted, seed, device: see :class:`ShardableCollection`.

    >>> import recsys_embed as rse
    >>> schema = rse.Schema([rse.FeatureSpec("C1", 1000, 16), rse.FeatureSpec("C2", 50_000, 16)])
    >>> ebc = CompressedEBC(schema, rse.Plan.uniform(schema, "compositional", budget="200KiB"))
    >>> ids = KeyedJaggedTensor(["C2", "C1"], torch.tensor([7, 8, 3, 4, 5]), lengths=torch.tensor([2, 0, 1, 2]))
    >>> out = ebc(ids)
    >>> out.keys(), out["C2"].shape
    (['C1', 'C2'], torch.Size([2, 16]))
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
        self.collection = ShardableCollection(
            schema, plan, optimizer, pool=pool, weighted=weighted, seed=seed, device=device
        )

    @classmethod
    def like(
        cls, ebc: Features, plan: Plan | None = None, optimizer: FusedOptimizer | None = None, **options: Option
    ) -> Self:
        """A CompressedEBC with the features of ``ebc``, TorchRec's collection or its list of configurations."""
        return cls(schema_of(ebc), plan, optimizer, **options)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """A configuration per table, of the full table that it replaces; models size their layers by it.

        Features of one table that pool differently have a configuration per pooling, as TorchRec's have one.
        """
        found: dict[tuple[str, PoolingType], EmbeddingBagConfig] = {}
        for spec, width in zip(self.collection.schema, self.collection.widths, strict=True):
            pooling = PoolingType.MEAN if spec.pooling == "mean" else PoolingType.SUM
            known = found.get((spec.table_name, pooling))
            if known is not None:
                known.feature_names.append(spec.name)
                continue
            again = any(table == spec.table_name for table, _ in found)
            found[spec.table_name, pooling] = EmbeddingBagConfig(
                name=f"{spec.table_name}_{pooling.value.lower()}" if again else spec.table_name,
                num_embeddings=spec.num_embeddings,
                embedding_dim=width,
                feature_names=[spec.name],
                pooling=pooling,
            )
        return list(found.values())

    def is_weighted(self) -> bool:
        """Whether ids bring weights."""
        return self.collection.weighted

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors: a KeyedTensor of ``[B, sum of widths]`` with the schema's features as keys.

        Args:
            features: holds the schema's features, in any order.
        """
        out: Tensor = self.collection(features)
        return KeyedTensor(list(self.collection.schema.names), self.collection.widths, out.flatten(1))


def schema_of(ebc: Features, *, shared: bool = True) -> Schema:
    """The features of ``ebc``, TorchRec's collection or its list of configurations.

    Args:
        shared: features that share a table there share it here, see ``table`` of
            :class:`recsys_embed.FeatureSpec`. With False each has a table of its own, as plans and checkpoints of
            earlier versions have it.

    Raises:
        ConfigError: several tables serve one feature, or a table is not fp32.
    """
    configs = list(ebc.embedding_bag_configs() if hasattr(ebc, "embedding_bag_configs") else ebc)
    features = {name for config in configs for name in config.feature_names}
    specs: dict[str, FeatureSpec] = {}
    faults: list[str] = []
    for config in configs:
        if config.data_type is not DataType.FP32:
            faults.append(
                f"tables must be fp32, because they are trained; got {config.data_type.name} (table {config.name!r})"
            )
        table = None
        if shared and len(config.feature_names) > 1:
            table = config.name.replace(".", "/").replace("#", "_")
            while table in features - {*config.feature_names}:  # a feature without a table has one of its own name
                table += "_table"
        for name in config.feature_names:
            if name in specs:
                faults.append(f"feature {name!r} is served by several tables; give each a feature of its own")
                continue
            pooling: Literal["mean", "sum"] = "mean" if config.pooling is PoolingType.MEAN else "sum"
            specs[name] = FeatureSpec(name, config.num_embeddings, config.embedding_dim, pooling=pooling, table=table)
    raise_faults(faults, "schema_of")
    return Schema(list(specs.values()))
