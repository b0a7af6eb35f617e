"""What the benchmarks look up: tables of Criteo's sizes, ids with its skew, and plans at a share of the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import recsys_embed as rse
from recsys_embed import Plan
from recsys_embed.methods.robe import RobeConfig

CARDINALITIES = (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306)
CARDINALITIES += (10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572)
FIELDS = len(CARDINALITIES)


def capped(total: int) -> list[int]:
    """The cardinalities cut at one height so that they sum to about ``total``."""
    low, high = 1, max(CARDINALITIES)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(c, middle) for c in CARDINALITIES) <= total else (low, middle - 1)
    return [min(c, low) for c in CARDINALITIES]


def zipf(rows: int, size: int, rng: np.random.Generator, power: float = 1.05) -> np.ndarray:
    """Bounded Zipf ids, scattered so that frequent ids are not neighbours."""
    e = 1.0 - power
    rank = ((((size + 1.0) ** e - 1.0) * rng.random(rows) + 1.0) ** (1.0 / e)).astype(np.int64) - 1
    return (np.clip(rank, 0, size - 1) * 2654435761 + 12345) % size


def batches(sizes: Sequence[int], batch: int, count: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """Ids ``[batch, fields]``, int64."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(np.stack([zipf(batch, n, rng) for n in sizes], 1)) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """A method over the 26 fields.

    Args:
        rows: of the full tables.
        ratio: of the full tables' bytes to those that the method gets.
    """

    method: str
    dim: int
    rows: int
    ratio: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.method, *map(str, self.params.values())])

    @property
    def sizes(self) -> list[int]:
        return capped(self.rows)

    def schema(self, widen: int = 1) -> rse.Schema:
        return rse.Schema([rse.FeatureSpec(f"C{i}", n, self.dim * widen) for i, n in enumerate(self.sizes, 1)])

    @property
    def budget(self) -> int:
        return int(sum(self.sizes) * self.dim * 4 / self.ratio)

    def plan(self, schema: rse.Schema) -> Plan:
        if self.method == "full":
            return Plan.full(schema)
        plan = Plan.uniform(schema, self.method, budget=self.budget, **self.params)
        if self.method != "robe":
            return plan
        # A whole number of vectors, so that tables of rows can hold the array too.
        return Plan({n: replace(plan[n], num_elements=plan[n].num_elements // self.dim * self.dim)
                     if isinstance(plan[n], RobeConfig) else plan[n] for n in plan})  # fmt: skip


ALL_ROWS = sum(CARDINALITIES)
CASES = (
    Case("full", 16, ALL_ROWS),
    Case("full", 64, 8_000_000),
    Case("full", 128, 4_000_000),
    Case("hash", 16, ALL_ROWS, 16),
    Case("multihash", 16, ALL_ROWS, 16),
    Case("compositional", 16, ALL_ROWS, 16, {"combine": "mul"}),
    Case("compositional", 16, ALL_ROWS, 16, {"combine": "sum"}),
    Case("compositional", 16, ALL_ROWS, 16, {"combine": "concat"}),
    Case("unified", 16, ALL_ROWS, 16),
    Case("robe", 16, ALL_ROWS, 16),
)
