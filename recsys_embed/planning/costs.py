"""Bytes of tables, features and plans, as a budget counts them."""

from __future__ import annotations

from dataclasses import dataclass

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram, Table
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan


@dataclass(frozen=True)
class Costs:
    """Bytes as a budget counts them, by the arithmetic of :meth:`recsys_embed.Plan.footprint`.

    Args:
        optimizer: fused optimizer of the tables; None where a torch optimizer steps dense gradients.
        train: count the optimizer's state, and a dense gradient for every parameter it does not update: projections,
            networks, or everything.
        itemsize: bytes per number.
    """

    optimizer: FusedOptimizer | None
    train: bool
    itemsize: int = 4

    def table(self, table: Table) -> int:
        """Bytes of one physical table."""
        if not self.train:
            return table.nbytes(self.itemsize)
        weights = table.trained_bytes(self.itemsize)
        if table.frozen:
            return weights
        if self.optimizer is None or table.dense:
            return weights + self.itemsize * table.elements  # a gradient of every number
        return weights + self.optimizer.state_bytes(table.rows, table.width)

    def own(self, config: MethodConfig, program: LookupProgram, spec: FeatureSpec) -> int:
        """Bytes of a feature's tables and index buffers, without tables that it shares."""
        if config.computes:
            parts = config.footprint(spec, self.itemsize)
            return parts.serve + (parts.weights if self.train else 0)
        index = sum(i.nbytes for i in program.indexes)
        return index + sum(self.table(t) for t in program.tables if not t.shared)

    def own_at(self, precision: str, cost: int, config: MethodConfig, program: LookupProgram, spec: FeatureSpec) -> int:
        """As :meth:`own` of ``config``, whose ``program`` takes ``cost`` bytes at fp32, at another precision."""
        if config.computes:
            return self.own(config, program, spec)
        if self.train:
            return cost
        size = self.itemsize
        return cost + sum(t.nbytes(size, precision) - t.nbytes(size) for t in program.tables if not t.shared)

    def plan(self, plan: Plan, schema: Schema) -> int:
        """Bytes of all features together, shared tables once."""
        parts = plan.footprint(schema, self.optimizer if self.train else None, self.itemsize)
        if not self.train:
            return parts.serve
        gathered = plan.gathered(schema)
        computed = sum(
            plan[s.name].footprint(s, self.itemsize).weights for s in schema.first_readers if s.name not in gathered
        )
        tables = [t for t in plan.tables(schema).values() if (t.dense or self.optimizer is None) and not t.frozen]
        return parts.train + computed + sum(self.itemsize * t.elements for t in tables)
