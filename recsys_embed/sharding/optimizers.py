"""All of a sharded model's optimizers as one: no parameter is left out, and one learning rate rules the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel

from recsys_embed.errors import ConfigError
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.fused_updates import TableOptimizer, left_to_step
from recsys_embed.sharding.physical_tables import Slab, table_of

DenseOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Optimizers:
    """What has to step a sharded model besides its backward: call :meth:`step` after it.

    Args:
        sharded: of :func:`recsys_embed.sharding.shard`.
        dense: makes the optimizer of everything that is no table: layers, projections, thresholds; and of tables whose
            collection has no ``optimizer``.

    Attributes:
        fused: TorchRec's optimizer of the tables that backward updates.
        tables: per rule, optimizer of the tables that have ordinary gradients.
        dense: of the rest, or None where there is none.
    """

    def __init__(self, sharded: DistributedModelParallel, dense: DenseOptimizer) -> None:
        self.sharded = sharded
        self.fused = sharded.fused_optimizer
        owners = {path: coll for path, coll in collection_paths(sharded).items() if coll.optimizer is not None}
        known = {id(coll.optimizer): coll.optimizer for coll in owners.values() if coll.optimizer is not None}
        self.rules = list(known.values())
        by_rule: dict[int, list[tuple[str, Slab, nn.Parameter]]] = {}
        rest: list[nn.Parameter] = []
        self.dense_names: list[str] = []
        for name, parameter in left_to_step(sharded).items():
            try:
                path, slab = table_named(name, owners)
            except KeyError:
                if parameter.requires_grad:
                    rest.append(parameter)
                    self.dense_names.append(name)
                continue
            by_rule.setdefault(id(owners[path].optimizer), []).append((name, slab, parameter))
        self.tables = [TableOptimizer(held, known[key]) for key, held in by_rule.items()]
        self.dense_parameters = rest
        self.dense = dense(rest) if rest else None
        self.steps = 0
        groups = [group for _, one in self.fused.optimizers for group in one.param_groups]
        # Padded tables run at a rate of their own, see `in_backward`.
        self._groups = [(group, float(group["lr"])) for group in groups]
        self._lr = self.rules[0].lr if self.rules else 0.0
        self._peak = self._lr

    @property
    def table_lr(self) -> float:
        """Learning rate of all tables that have a rule."""
        return self._lr

    @table_lr.setter
    def table_lr(self, value: float) -> None:
        if len({rule.lr for rule in self.rules}) != 1 or self._peak == 0:
            raise ConfigError("tables of different rates, or of rate 0, have no rate in common to set")
        self._lr = value
        for group, lr in self._groups:
            group["lr"] = lr / self._peak * value
        for optimizer in self.tables:
            for group in optimizer.param_groups:
                group["lr"] = value
        self.fused.step()  # hands the rates to the kernels; rows move in backward alone

    def step(self) -> None:
        """Step whatever backward has left to step."""
        self.steps += 1
        for optimizer in self._ordinary():
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget gradients."""
        for optimizer in self._ordinary():
            optimizer.zero_grad(set_to_none=True)

    def _ordinary(self) -> list[torch.optim.Optimizer]:
        return [*self.tables, *([] if self.dense is None else [self.dense])]


def collection_paths(sharded: nn.Module) -> dict[str, ShardableCollection]:
    """Shardable collections by their path in names of parameters, which skip TorchRec's and torch's wrappers."""
    inner = sharded.module if isinstance(sharded, DistributedModelParallel) else sharded
    return {path: m for path, m in inner.named_modules() if isinstance(m, ShardableCollection)}


def table_named(name: str, owners: Mapping[str, Any]) -> tuple[str, Slab]:
    """Path of the collection, and layout, of the table that is the parameter ``name``; KeyError if it is none."""
    *_, table, last = ("", *name.split("."))[-3:] if "." in name else ("", "", name)
    for path, coll in owners.items():
        slabs = coll.slabs if isinstance(coll, ShardableCollection) else {}
        start = f"{path}." if path else ""
        held = name.startswith((f"{start}readers.", f"{start}by_bag.ebc."))
        if held and last == "weight" and table_of(table) in slabs:
            return path, slabs[table_of(table)]
    raise KeyError(name)
