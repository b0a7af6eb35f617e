"""Everything a training run holds under names and shapes that do not depend on how it is sharded.

Tables come as TorchRec stores them, whole in shape whatever part lies here; so a checkpoint written by any number of
processes, or by one without TorchRec's wrappers, reads back into any other.
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
from recsys_embed.optim import SGD, Adagrad, FusedOptimizer, RowwiseAdagrad
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.fused_updates import TableOptimizer
from recsys_embed.sharding.optimizers import Optimizers, table_named
from recsys_embed.sharding.physical_tables import Slab, slabs_for, table_of

Collection = ShardableCollection | EmbeddingCollection


class Entry(NamedTuple):
    """A tensor or ShardedTensor; ``put`` takes what was read into a copy back to its place."""

    name: str
    value: Any
    put: Callable[[], None] | None = None


def collections_in(model: nn.Module) -> dict[str, Collection]:
    """Collections of a model by path, sharded or not."""
    inner = model.module if isinstance(model, DistributedModelParallel) else model
    kinds = (ShardableCollection, EmbeddingCollection)
    return {path: m for path, m in inner.named_modules() if isinstance(m, kinds)}


def slabs_of(coll: Collection) -> dict[str, Slab]:
    """Layout of a collection's tables in checkpoints."""
    return coll.slabs if isinstance(coll, ShardableCollection) else slabs_for(coll.tables, coll.optimizer)


def weight_entries(model: nn.Module) -> Iterator[Entry]:
    """Weights, index buffers and other lasting buffers."""
    inner = model.module if isinstance(model, DistributedModelParallel) else model
    found = collections_in(model)
    for path, coll in found.items():
        yield from _tables(path, coll)
        bundles = coll.bundles() if isinstance(coll, ShardableCollection) else [coll.bundle]
        for bundle in bundles:
            yield from _beside_tables(path, bundle)
    for name, values in _state_without(inner, tuple(found)):
        yield Entry(f"model/{name}", values)


def _state_without(module: nn.Module, paths: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Entries of the state dict of everything but the modules at ``paths``."""
    if prefix.rstrip(".") in paths:
        return
    if isinstance(module, ShardedModule):
        # Another module that TorchRec has sharded: what it calls its state is whole in shape.
        yield from module.state_dict(prefix=prefix).items()
        return
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    own |= {k: v for k, v in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
    for name, values in own.items():
        yield prefix + name, values.detach()
    for name, child in module.named_children():
        yield from _state_without(child, paths, f"{prefix}{name}.")


def _tables(path: str, coll: Collection) -> Iterator[Entry]:
    if isinstance(coll, ShardableCollection):
        for held in coll.holders():
            for name, values in held.state_dict().items():
                yield Entry(f"{path}/{table_of(name.split('.')[-2])}", values)
        return
    for key, slab in slabs_of(coll).items():
        table = coll.table(key)
        stored = slab.pack(table.detach())
        yield Entry(f"{path}/{key}", stored, _copier(table, slab, stored))


def _copier(table: Tensor, slab: Slab, stored: Tensor) -> Callable[[], None]:
    def put() -> None:
        with torch.no_grad():
            table.copy_(slab.unpack(stored))

    return put


def _beside_tables(path: str, bundle: LookupBundle) -> Iterator[Entry]:
    for key, matrix in bundle.heads.tables(stacked_only=True).items():
        yield Entry(f"{path}/{key}", matrix.detach())
    for name, module in bundle.own.items():
        for key, values in module.state_dict().items():
            if not key.endswith("_extra_state"):
                yield Entry(f"{path}/{name}:{key}", values)
    store = bundle.kernel.index
    for program, feature in enumerate(bundle.programs):
        for name in store.indexes[program]:
            held = store.value(program, name)

            def put(program: int = program, name: str = name, held: Tensor = held) -> None:
                store.assign_(program, {name: held})

            yield Entry(f"{path}/{feature}:index:{name}", held, put)


# -- optimizers -------------------------------------------------------------------------------------------------------


def state_as_stored(rule: FusedOptimizer, slab: Slab, kind: str, values: Tensor) -> Tensor:
    """State ``[rows, width or 1]`` of a table's rows as fbgemm lays it out: ``[stored rows, stored width]`` or flat."""
    if kind == "element" or slab.per_row > 1:
        return slab.pack(values)
    flat = values.reshape(-1).clone()
    return flat * _share(rule, slab) if kind == "row" else flat


def state_by_row(rule: FusedOptimizer, slab: Slab, kind: str, stored: Tensor) -> Tensor:
    """Inverse of :func:`state_as_stored`: ``[rows, width or 1]``."""
    if kind == "element" or slab.per_row > 1:
        return slab.unpack(stored)
    flat = stored.view(-1, 1)[: slab.rows]
    return flat / _share(rule, slab) if kind == "row" else flat


def _share(rule: FusedOptimizer, slab: Slab) -> float:
    """fbgemm's means over a row count the padding, see :func:`recsys_embed.sharding.fused_updates.in_backward`."""
    return slab.width / slab.shape[1] if type(rule) is RowwiseAdagrad else 1.0


def state_entries(optimizers: Optimizers) -> Iterator[Entry]:
    """State of all optimizers of a sharded model, but for step counts, which are no tensors."""
    owners = collections_in(optimizers.sharded)
    fused = optimizers.fused.state_dict()["state"]
    for name, states in fused.items():
        try:
            path, slab = table_named(name, owners)
        except KeyError:
            yield from (Entry(f"fused/{name}:{key}", values) for key, values in states.items())
            continue
        rule = owners[path].optimizer
        names = list(rule.state) if isinstance(rule, FusedOptimizer) else []
        for key, values in states.items():
            # fbgemm numbers its moments; the rules name theirs in the same order.
            place = int(key.rsplit("momentum", 1)[1]) - 1
            yield Entry(f"{path}/{slab.key}:{names[place]}", values)
    for optimizer in optimizers.tables:
        yield from _dense_tables(optimizer, owners)
    if optimizers.dense is not None:
        for name, parameter in zip(optimizers.dense_names, optimizers.dense_parameters, strict=True):
            for key, values in optimizers.dense.state[parameter].items():
                yield Entry(f"dense/{name}:{key}", torch.as_tensor(values))


def _dense_tables(optimizer: TableOptimizer, owners: dict[str, Collection]) -> Iterator[Entry]:
    rule = optimizer.rule
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            path, slab = table_named(optimizer.names[id(parameter)], owners)
            state = optimizer.state_of(parameter)
            for name, kind in rule.tensors.items():
                stored = state_as_stored(rule, slab, kind, state[name])

                def put(state: dict[str, Any] = state, name: str = name, stored: Tensor = stored, slab: Slab = slab,
                        kind: str = kind) -> None:  # fmt: skip
                    values = state_by_row(rule, slab, kind, stored)
                    state[name][: len(values)].copy_(values)

                yield Entry(f"{path}/{slab.key}:{name}", stored, put)


def plain_state_entries(path: str, coll: EmbeddingCollection, saved: dict[str, Any]) -> Iterator[Entry]:
    """The same of an unsharded collection's ``saved = coll.optimizer_state_dict()``, whose tensors are written to."""
    rule = coll.optimizer
    for key, slab in slabs_of(coll).items():
        storage, offset = coll.places[key]
        for name, kind in rule.tensors.items() if rule is not None else ():
            rows = saved["state"][f"{storage}_{name}"][offset : offset + slab.rows]
            stored = state_as_stored(rule, slab, kind, rows)  # type: ignore[arg-type]

            def put(rows: Tensor = rows, stored: Tensor = stored, slab: Slab = slab, kind: str = kind) -> None:
                rows.copy_(state_by_row(rule, slab, kind, stored))  # type: ignore[arg-type]

            yield Entry(f"{path}/{key}:{name}", stored, put)


def counts_steps(rule: FusedOptimizer | None) -> bool:
    """Whether an update may depend on how many came before."""
    return rule is not None and (rule.lazy or type(rule) not in (SGD, Adagrad, RowwiseAdagrad))
