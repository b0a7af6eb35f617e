"""TorchRec's sharders, and the planner constraints that follow from a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ModuleSharder

from recsys_embed.errors import UnknownNameError, raise_faults, unknown_name
from recsys_embed.optim import RowwiseAdagrad
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.fused_updates import fuses
from recsys_embed.sharding.physical_tables import ROW_ALIGNMENT, PhysicalTable

Kind = Literal["table_wise", "column_wise", "row_wise", "data_parallel"]


class BagSharder(EmbeddingBagCollectionSharder):
    """Also offers row-wise sharding on CPUs: gloo supports it, but TorchRec's sharder does not offer it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        offered = super().sharding_types(compute_device_type)
        return offered if "row_wise" in offered else [*offered, "row_wise"]


def sharders() -> list[ModuleSharder[nn.Module]]:
    """Sharders for TorchRec's two kinds of collections that hold physical tables."""
    return [BagSharder(), EmbeddingCollectionSharder()]


def collections_of(model: nn.Module) -> list[ShardableCollection]:
    """The shardable collections of a model."""
    return [m for m in model.modules() if isinstance(m, ShardableCollection)]


def splits_by_row(physical: PhysicalTable, world_size: int) -> bool:
    """Whether row-wise sharding gives every rank a row; fbgemm reads out of bounds in backward where one has none."""
    rows = physical.shape[0]
    return (world_size - 1) * -(-rows // world_size) < rows


def kinds_of(
    coll: ShardableCollection, kinds: Mapping[str, Kind] | Kind | None, world_size: int, device_type: str
) -> dict[str, list[str]]:
    """How each table of a collection, by its key, may be sharded.

    Args:
        coll: before sharding.
        kinds: one for all, or by table key or feature name; tables that are not named, and None, are the planner's.
            If ``"row_wise"`` is given for all, tables with too few rows for it are sharded table-wise.
        world_size: number of ranks.
        device_type: ``"cuda"`` or ``"cpu"``.

    Raises:
        ConfigError: kinds that are unknown or impossible for a table; all of them at once.
    """
    rule, faults, out = coll.optimizer, [], {}
    allowed = list(get_args(Kind))
    why = {}
    if type(rule) is RowwiseAdagrad:
        allowed.remove("column_wise")
        why["column_wise"] = "its rule keeps one number per row, of which each rank would have its own"
    if not is_fused(coll, device_type):
        # TorchRec shards no table whose gradient is an ordinary one.
        lacks = "has no `optimizer`" if rule is None else f"follows {rule}, which fbgemm does not run on {device_type}"
        why = dict.fromkeys(allowed, f"it {lacks}")
        allowed = ["data_parallel"]
    for key, physical in coll.physical_tables.items():
        kind = kinds if isinstance(kinds, str) else (kinds or {}).get(key, (kinds or {}).get(feature_of(key)))
        mine = [k for k in allowed if k != "row_wise" or splits_by_row(physical, world_size)]
        if kind == "row_wise" and isinstance(kinds, str) and kind not in mine and kind in allowed:
            kind = "table_wise"
        if kind is not None and kind not in get_args(Kind):
            faults.append(str(unknown_name("kind of sharding", str(kind), get_args(Kind))))
        elif kind is not None and kind not in mine:
            few = f"its {physical.shape[0]} stored rows leave one of {world_size} ranks without any"
            faults.append(f"table {key!r} cannot be {kind!r}: {why.get(kind, few)}; take one of {', '.join(mine)}")
        out[key] = mine if kind is None else [str(kind)]
    raise_faults(faults, "kinds of sharding")
    return out


def feature_of(key: str) -> str:
    """The feature a table belongs to, by the table's key; shared tables belong to none.

    >>> feature_of("C1.weight"), feature_of("unified")
    ('C1', 'unified')
    """
    return key.rsplit(".", 1)[0]


def is_fused(coll: ShardableCollection, device_type: str) -> bool:
    """Whether tables are updated inside backward: by the collection's optimizer, or by one that the caller fused."""
    if coll.optimizer is not None:
        return fuses(coll.optimizer, device_type)
    return all(hasattr(parameter, "_in_backward_optimizers") for _, parameter in coll.stored())


def constraints_for(
    collections: Iterable[ShardableCollection],
    kinds: Mapping[str, Kind] | Kind | None,
    world_size: int,
    device_type: str,
    lengths: Mapping[str, float] | None = None,
) -> dict[str, ParameterConstraints]:
    """Constraints for TorchRec's planner, by TorchRec's name of the table.

    Args:
        collections: of one model.
        kinds: see :func:`kinds_of`.
        world_size: number of ranks.
        device_type: ``"cuda"`` or ``"cpu"``.
        lengths: mean number of ids per sample by feature; 1 by default.

    Raises:
        UnknownNameError: a key of ``kinds`` is no table and no feature.
    """
    found = list(collections)
    known = {name for coll in found for key in coll.physical_tables for name in (key, feature_of(key))}
    given = kinds if isinstance(kinds, Mapping) else {}
    strange = [str(unknown_name("table", k, known)) for k in given if k not in known]
    raise_faults(strange, "kinds of sharding", UnknownNameError)
    out: dict[str, ParameterConstraints] = {}
    for coll in found:
        for key, types in kinds_of(coll, kinds, world_size, device_type).items():
            physical = coll.physical_tables[key]
            part = max(ROW_ALIGNMENT, -(-physical.shape[1] // world_size // ROW_ALIGNMENT) * ROW_ALIGNMENT)
            out[physical.name] = ParameterConstraints(
                sharding_types=types,
                compute_kernels=["dense"] if types == ["data_parallel"] else ["fused", "dense"],
                # TorchRec's default minimum of 128 columns would never split narrow tables.
                min_partition=next(
                    (w for w in range(part, physical.shape[1], ROW_ALIGNMENT) if physical.shape[1] % w == 0), None
                )
                if types == ["column_wise"]
                else None,
                pooling_factors=_reads(coll, key, lengths or {}),
                is_weighted=coll.weighted,
            )
    return out


def _reads(coll: ShardableCollection, key: str, lengths: Mapping[str, float]) -> list[float]:
    """Rows per sample of each of TorchRec's features of a table."""
    if coll.by_bag is not None and key in coll.by_bag.physical_tables:
        names = coll.by_bag.features_of[key]
        return [float(lengths.get(name, 1.0)) for name in names]
    return [sum(float(lengths.get(name, 1.0)) * n for name, n in coll.readers_of(key).items())]
