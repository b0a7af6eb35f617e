"""All optimizers of a sharded model as one: every parameter is updated, and tables have one learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel

from recsys_embed.errors import ConfigError
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.fused_updates import TableOptimizer, left_to_step
from recsys_embed.sharding.physical_tables import PhysicalTable, table_of

DenseOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Optimizers:
    """The optimizers of a sharded model: call :meth:`step` after backward.

    Args:
        sharded: of :func:`recsys_embed.sharding.shard`.
        dense: makes the optimizer of layers, projections, thresholds and other dense parameters, and of the tables of
            collections without ``optimizer``.

    Attributes:
        fused: TorchRec's optimizer of the tables that backward updates.
        tables: optimizers of the tables that have ordinary gradients, one per update rule.
        dense: optimizer of the rest; None if there is no rest.
    """

    def __init__(self, sharded: DistributedModelParallel, dense: DenseOptimizer) -> None:
        self.sharded = sharded
        self.fused = sharded.fused_optimizer
        owners = {path: coll for path, coll in collection_paths(sharded).items() if coll.optimizer is not None}
        known = {id(coll.optimizer): coll.optimizer for coll in owners.values() if coll.optimizer is not None}
        self.rules = list(known.values())
        by_rule: dict[int, list[tuple[str, PhysicalTable, nn.Parameter]]] = {}
        rest: list[nn.Parameter] = []
        self.dense_names: list[str] = []
        for name, parameter in left_to_step(sharded).items():
            try:
                path, physical = table_named(name, owners)
            except KeyError:
                if parameter.requires_grad:
                    rest.append(parameter)
                    self.dense_names.append(name)
                continue
            by_rule.setdefault(id(owners[path].optimizer), []).append((name, physical, parameter))
        self.tables = [TableOptimizer(held, known[key]) for key, held in by_rule.items()]
        self.dense_parameters = rest
        self.dense = dense(rest) if rest else None
        self.steps = 0
        groups = [group for _, one in self.fused.optimizers for group in one.param_groups]
        # Padded tables have a corrected learning rate, see `in_backward`.
        self._groups = [(group, float(group["lr"])) for group in groups]
        self._lr = self.rules[0].lr if self.rules else 0.0
        self._peak = self._lr

    @property
    def table_lr(self) -> float:
        """Learning rate of all tables with a fused optimizer."""
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
        self.fused.step()  # passes learning rates to the kernels; rows are updated in backward only

    def step(self) -> None:
        """Update all parameters that backward did not update."""
        self.steps += 1
        for optimizer in self._ordinary():
            optimizer.step()

    def zero_grad(self) -> None:
        """Clear gradients."""
        for optimizer in self._ordinary():
            optimizer.zero_grad(set_to_none=True)

    def _ordinary(self) -> list[torch.optim.Optimizer]:
        return [*self.tables, *([] if self.dense is None else [self.dense])]


def collection_paths(sharded: nn.Module) -> dict[str, ShardableCollection]:
    """Shardable collections by path as in parameter names, without the wrappers of TorchRec and torch."""
    inner = sharded.module if isinstance(sharded, DistributedModelParallel) else sharded
    return {path: m for path, m in inner.named_modules() if isinstance(m, ShardableCollection)}


def table_named(name: str, owners: Mapping[str, Any]) -> tuple[str, PhysicalTable]:
    """Collection path and physical table of the parameter ``name``; KeyError if it is not a table."""
    *_, table, last = ("", *name.split("."))[-3:] if "." in name else ("", "", name)
    for path, coll in owners.items():
        physical_tables = coll.physical_tables if isinstance(coll, ShardableCollection) else {}
        start = f"{path}." if path else ""
        held = name.startswith((f"{start}readers.", f"{start}by_bag.ebc."))
        if held and last == "weight" and table_of(table) in physical_tables:
            return path, physical_tables[table_of(table)]
    raise KeyError(name)
