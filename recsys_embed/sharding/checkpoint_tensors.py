"""The tensors of a training run as checkpoints name them: names and shapes do not depend on the sharding.

Tables have TorchRec's physical shape and their global size, also where this process holds a shard only. A checkpoint
therefore loads into any number of processes, and into a model without TorchRec's wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardedModule

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.optim import SGD, Adagrad, FusedOptimizer, RowwiseAdagrad
from recsys_embed.optim.state_format import copy_state
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.fused_updates import TableOptimizer
from recsys_embed.sharding.optimizers import Optimizers, table_named
from recsys_embed.sharding.physical_tables import PhysicalTable, physical_tables_for, table_of

Collection = ShardableCollection | EmbeddingCollection


class CheckpointTensor(NamedTuple):
    """A named Tensor or ShardedTensor. If ``value`` is a copy, ``put`` writes it back to the original after a load."""

    name: str
    value: Any
    put: Callable[[], None] | None = None


def collections_in(model: nn.Module) -> dict[str, Collection]:
    """Collections of a model by path, sharded or not."""
    inner = model.module if isinstance(model, DistributedModelParallel) else model
    kinds = (ShardableCollection, EmbeddingCollection)
    return {path: m for path, m in inner.named_modules() if isinstance(m, kinds)}


def physical_tables_of(coll: Collection) -> dict[str, PhysicalTable]:
    """Layout of a collection's tables in checkpoints."""
    return (
        coll.physical_tables
        if isinstance(coll, ShardableCollection)
        else physical_tables_for(coll.tables, coll.optimizer)
    )


def weight_tensors(model: nn.Module) -> Iterator[CheckpointTensor]:
    """Weights, index arrays and other persistent buffers."""
    inner = model.module if isinstance(model, DistributedModelParallel) else model
    found = collections_in(model)
    for path, coll in found.items():
        yield from _tables(path, coll)
        bundles = coll.bundles() if isinstance(coll, ShardableCollection) else [coll.bundle]
        for bundle in bundles:
            yield from bundle_tensors(path, bundle)
    for name, values in _state_without(inner, tuple(found)):
        yield CheckpointTensor(f"model/{name}", values)


def _state_without(module: nn.Module, paths: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Items of the model's state dict, without the modules at ``paths``."""
    if prefix.rstrip(".") in paths:
        return
    if isinstance(module, ShardedModule):
        # Another module that TorchRec sharded: its state dict holds ShardedTensors of global shape.
        yield from module.state_dict(prefix=prefix).items()
        return
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    own |= {k: v for k, v in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
    if isinstance(module, IndexStore):
        own |= module.arrays.held
    for name, values in own.items():
        yield prefix + name, values.detach()
    for name, child in module.named_children():
        yield from _state_without(child, paths, f"{prefix}{name}.")


def _tables(path: str, coll: Collection) -> Iterator[CheckpointTensor]:
    if isinstance(coll, ShardableCollection):
        for held in coll.holders():
            for name, values in held.state_dict().items():
                yield CheckpointTensor(f"{path}/{table_of(name.split('.')[-2])}", values)
        return
    for key, physical in physical_tables_of(coll).items():
        table = coll.table(key)
        stored = physical.pack(table.detach())
        yield CheckpointTensor(f"{path}/{key}", stored, _copier(table, physical, stored))


def _copier(table: Tensor, physical: PhysicalTable, stored: Tensor) -> Callable[[], None]:
    def put() -> None:
        with torch.no_grad():
            table.copy_(physical.unpack(stored))

    return put


def bundle_tensors(path: str, bundle: LookupBundle) -> Iterator[CheckpointTensor]:
    """What lookups have beside tables of rows: tables of heads, modules that compute, index arrays."""
    for key, matrix in bundle.heads.tables(stacked_only=True).items():
        yield CheckpointTensor(f"{path}/{key}", matrix.detach())
    for name, module in bundle.own.items():
        for key, values in module.state_dict().items():
            if not key.endswith("_extra_state"):
                yield CheckpointTensor(f"{path}/{name}:{key}", values)
    store, known = bundle.kernel.index, set[str]()
    for program, feature in enumerate(bundle.programs):
        table = bundle.schema[feature].table_name
        if table in known:
            continue
        known.add(table)
        for name in store.indexes[program]:
            held = store.value(program, name)

            def put(program: int = program, name: str = name, held: Tensor = held) -> None:
                store.assign_(program, {name: held})

            yield CheckpointTensor(f"{path}/{table}:index:{name}", held, put)


# -- optimizers -------------------------------------------------------------------------------------------------------


def state_as_stored(rule: FusedOptimizer, physical: PhysicalTable, kind: str, values: Tensor) -> Tensor:
    """State ``[rows, width or 1]`` of a table's rows as fbgemm lays it out: ``[stored rows, stored width]`` or flat."""
    if kind == "element" or physical.per_row > 1:
        return physical.pack(values)
    flat = values.reshape(-1).clone()
    return flat * _share(rule, physical) if kind == "row" else flat


def state_by_row(rule: FusedOptimizer, physical: PhysicalTable, kind: str, stored: Tensor) -> Tensor:
    """Inverse of :func:`state_as_stored`: ``[rows, width or 1]``."""
    if kind == "element" or physical.per_row > 1:
        return physical.unpack(stored)
    flat = stored.view(-1, 1)[: physical.rows]
    return flat / _share(rule, physical) if kind == "row" else flat


def _share(rule: FusedOptimizer, physical: PhysicalTable) -> float:
    """fbgemm's means over a row count the padding, see :func:`recsys_embed.sharding.fused_updates.in_backward`."""
    return physical.width / physical.shape[1] if type(rule) is RowwiseAdagrad else 1.0


def state_tensors(optimizers: Optimizers) -> Iterator[CheckpointTensor]:
    """State of all optimizers of a sharded model, but for step counts, which are no tensors."""
    owners = collections_in(optimizers.sharded)
    fused = optimizers.fused.state_dict()["state"]
    for name, states in fused.items():
        try:
            path, physical = table_named(name, owners)
        except KeyError:
            yield from (CheckpointTensor(f"fused/{name}:{key}", values) for key, values in states.items())
            continue
        rule = owners[path].optimizer
        names = list(rule.state) if isinstance(rule, FusedOptimizer) else []
        for key, values in states.items():
            # fbgemm numbers its moments; the rules name theirs in the same order.
            place = int(key.rsplit("momentum", 1)[1]) - 1
            yield CheckpointTensor(f"{path}/{physical.key}:{names[place]}", values)
    for optimizer in optimizers.tables:
        yield from _dense_tables(optimizer, owners)
    if optimizers.dense is not None:
        for name, parameter in zip(optimizers.dense_names, optimizers.dense_parameters, strict=True):
            for key, values in optimizers.dense.state[parameter].items():
                yield CheckpointTensor(f"dense/{name}:{key}", torch.as_tensor(values))


def _dense_tables(optimizer: TableOptimizer, owners: dict[str, Collection]) -> Iterator[CheckpointTensor]:
    rule = optimizer.rule
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            path, physical = table_named(optimizer.names[id(parameter)], owners)
            state = optimizer.state_of(parameter)
            for name, kind in rule.tensors.items():
                stored = state_as_stored(rule, physical, kind, state[name])

                def put(
                    state: dict[str, Any] = state,
                    name: str = name,
                    stored: Tensor = stored,
                    physical: PhysicalTable = physical,
                    kind: str = kind,
                ) -> None:
                    values = state_by_row(rule, physical, kind, stored)
                    state[name][: len(values)].copy_(values)

                yield CheckpointTensor(f"{path}/{physical.key}:{name}", stored, put)


def unsharded_state_tensors(path: str, coll: EmbeddingCollection, saved: dict[str, Any]) -> Iterator[CheckpointTensor]:
    """The same for an unsharded collection; loading writes into ``saved``, its ``optimizer_state_dict()``."""
    rule = coll.optimizer
    for key, physical in physical_tables_of(coll).items():
        storage, offset = coll.places[key]
        for name, kind in rule.tensors.items() if rule is not None else ():
            rows = saved["state"][f"{storage}_{name}"][offset : offset + physical.rows]
            stored = state_as_stored(rule, physical, kind, rule.formats[name].decoded(rows))  # type: ignore[union-attr, arg-type]

            def put(
                name: str = name,
                rows: Tensor = rows,
                stored: Tensor = stored,
                physical: PhysicalTable = physical,
                kind: str = kind,
            ) -> None:
                copy_state(rule, name, rows, state_by_row(rule, physical, kind, stored))  # type: ignore[arg-type]

            yield CheckpointTensor(f"{path}/{key}:{name}", stored, put)


def counts_steps(rule: FusedOptimizer | None) -> bool:
    """Whether an update may depend on the number of steps so far."""
    return rule is not None and (rule.lazy or type(rule) not in (SGD, Adagrad, RowwiseAdagrad))
