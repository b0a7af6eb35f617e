"""The best plan within a budget: one multiple-choice knapsack per table group and split of the budget.

The splits are solved in order of their Lagrangian lower bounds (branch and bound): once the bound of the next split is
no better than the best solution found, neither it nor any later split can improve on that solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys_embed.planning.curves import Floats
from recsys_embed.planning.knapsack import (
    Choices,
    Effort,
    Ints,
    Solution,
    greedy,
    hull,
    reduce_options,
    solve,
    steps_of,
)
from recsys_embed.planning.options import FeatureOptions
from recsys_embed.planning.table_groups import TableGroup

JOIN = -1
"""Name of the option to join the table group."""
PARTS = 256
SHARES = (*range(4, 128, 8), *range(128, 192, 4), *range(192, PARTS))
"""Shares of the budget, in units of 1 / :data:`PARTS`, tried for the shared tables of a group."""
FEWER_SHARES_ABOVE = 64
"""With more features than this, fewer shares are tried; bytes left over enlarge the shared tables afterwards."""
LEVELS = 32
"""Groups of at most this many members are tried with every number of members; larger ones with about a dozen."""
MULTIPLIERS = 24
"""Number of Lagrange multipliers (loss per byte) that lower bounds are computed with."""


@dataclass(frozen=True)
class BudgetSplit:
    """One knapsack: a table group and its rows, the number of members that may join, and bytes for private tables."""

    group: TableGroup | None
    rows: int
    allowed: int
    private: int


@dataclass(frozen=True)
class PlanSolution:
    """The best solution.

    Args:
        names: option of each feature: a position in its options, or :data:`JOIN`.
        loss: its objective: the sum of losses.
        bound: no combination of the same options loses less.
        exact: whether it is proved optimal.
    """

    split: BudgetSplit
    names: tuple[int, ...]
    loss: float
    bound: float
    exact: bool


class PlanSolver:
    """Options and table groups, laid out as arrays for many knapsacks.

    Args:
        tiny: bytes of the full tables of all tiny features.
    """

    def __init__(self, features: Sequence[FeatureOptions], groups: Sequence[TableGroup], tiny: int = 0) -> None:
        self.features, self.groups, self._tiny = features, groups, tiny
        longest = max([1, *(len(m.hull) for m in features)])
        self._costs = np.full((len(features), longest), np.inf)
        self._losses = np.full((len(features), longest), np.inf)
        for i, m in enumerate(features):
            self._costs[i, : len(m.hull)] = m.choices.costs[m.hull]
            self._losses[i, : len(m.hull)] = m.choices.losses[m.hull]
        # A feature that may join a group has one option more. Which solvers run must not depend on the budget.
        self._effort = Effort.of([len(m.choices.costs) + 1 for m in features])
        self._multipliers = self._multiplier_grid()
        self._shares = SHARES if len(features) <= FEWER_SHARES_ABOVE else SHARES[::6]

    def _multiplier_grid(self) -> Floats:
        """Lagrange multipliers: 0, and losses per byte over the range of slopes of all hulls."""
        with np.errstate(invalid="ignore"):
            rates = -np.diff(self._losses) / np.diff(self._costs)
        rates = rates[np.isfinite(rates) & (rates > 0)]
        if not len(rates):
            return np.array([0.0, 1e-9, 1e-6, 1e-3])
        return np.concatenate([[0.0], np.geomspace(rates.min() / 4, rates.max() * 4, MULTIPLIERS)])

    # -- sizes and splits -----------------------------------------------------------------------------------------

    def least(self) -> int:
        """Bytes of the smallest plan."""
        return min(self._least_of(group, n) for group, n in self._families())

    def _families(self) -> list[tuple[TableGroup | None, int]]:
        """Every group with each number of members that may join, and none."""
        found: list[tuple[TableGroup | None, int]] = []
        if all(len(m.options) for m in self.features):
            found.append((None, 0))
        for group in self.groups:
            if any(not m.options and i not in group.members for i, m in enumerate(self.features)):
                continue
            count = len(group.members)
            levels = set(range(1, count + 1))
            if count > LEVELS:
                whole = sum(not group.tiny[at] for at in range(count))
                levels = {count, whole, *(round(count ** (j / 10)) for j in range(11))}
            found += [(group, n) for n in sorted(levels) if n >= max(group.must, 1)]
        return found

    def _cheapest(self, group: TableGroup | None, allowed: int) -> int:
        """Bytes of private tables, if every feature takes its cheapest option."""
        cost = self._costs[:, 0].copy()
        if group is not None:
            joining = group.members[:allowed]
            cost[joining] = np.minimum(cost[joining], group.own[:allowed])
        return int(cost.sum())

    def _least_of(self, group: TableGroup | None, allowed: int) -> int:
        return self._cheapest(group, allowed) + (0 if group is None else group.least_bytes)

    def _splits(self, group: TableGroup | None, allowed: int, budget: int) -> list[BudgetSplit]:
        """Ways to split the budget. No part of a split shrinks when the budget grows, so losses never rise."""
        if group is None:
            return [BudgetSplit(None, 0, 0, budget)]
        private = self._cheapest(group, allowed)
        # First the smallest shared tables; then the largest, beside the cheapest private tables and beside those plus
        # the full tables of tiny features.
        least = group.least_bytes
        amounts = [(least, budget - least), (budget - private, private)]
        amounts += [(budget - private - self._tiny, private + self._tiny)]
        amounts += [(budget * part // PARTS, budget * (PARTS - part) // PARTS) for part in self._shares]
        splits = [BudgetSplit(group, group.rows_within(shared), allowed, rest) for shared, rest in amounts]
        return [c for c in dict.fromkeys(splits) if c.rows >= group.least and c.private >= private]

    # -- bounds and solutions -------------------------------------------------------------------------------------

    def best(self, budget: int) -> PlanSolution | None:
        """The best solution, or None where not even the smallest plan fits."""
        # Lagrangian relaxation: for any multiplier p >= 0, sum over features of min(loss + p * cost) - p * budget is a
        # lower bound of the least loss within the budget. ``alone[p, i]`` is the minimum of feature i without joining.
        alone = np.stack([np.min(self._losses + p * np.where(np.isinf(self._costs), 0, self._costs), 1)
                          for p in self._multipliers])  # fmt: skip
        queue: list[tuple[float, int, BudgetSplit, Floats]] = []
        for group, allowed in self._families():
            splits = self._splits(group, allowed, budget)
            if not splits:
                continue
            if group is None:
                losses = np.zeros((0, 1))
            else:
                losses = group.losses(np.array([float(c.rows) for c in splits]), allowed)
            for split, bound, loss in zip(splits, self._bounds(alone, splits, losses), losses.T, strict=True):
                queue.append((bound, len(queue), split, loss))
        best: PlanSolution | None = None
        bound = np.inf
        for low, _, split, losses in sorted(queue, key=lambda q: q[:2]):
            if best is not None and low >= best.loss:
                bound = min(bound, low)
                break
            found = self._solve(split, losses, np.inf if best is None else best.loss)
            if found is None:
                continue
            bound = min(bound, found.bound)
            if best is None or found.loss < best.loss:
                best = found
        if best is None:
            return None
        bound = max(0.0, min(bound, best.loss))
        return PlanSolution(best.split, best.names, best.loss, bound, best.exact and bound >= best.loss)

    def _bounds(self, alone: Floats, splits: Sequence[BudgetSplit], losses: Floats) -> Floats:
        """Lagrangian lower bounds of the splits of one group, the best over all multipliers: float64 [splits]."""
        total = np.repeat(alone.sum(1)[:, None], len(splits), 1)
        group = splits[0].group
        if group is not None:
            joining = group.members[: splits[0].allowed]
            own = alone[:, joining]
            joined = losses[None] + (self._multipliers[:, None] * group.own[: len(joining)])[:, :, None]
            rest = np.delete(alone, joining, 1).sum(1)
            total = rest[:, None] + np.minimum(own[:, :, None], joined).sum(1)
        private = np.array([float(c.private) for c in splits])
        out: Floats = np.max(total - self._multipliers[:, None] * private, 0)
        return np.maximum(out, 0.0) - 1e-12

    def _solve(self, split: BudgetSplit, losses: Floats, worst: float) -> PlanSolution | None:
        classes = [m.choices for m in self.features]
        hulls = [m.hull for m in self.features]
        if split.group is not None:
            for at, i in enumerate(split.group.members[: split.allowed]):
                classes[i], hulls[i] = _joined(classes[i], hulls[i], int(split.group.own[at]), float(losses[at]))
        steps = steps_of(classes, hulls)
        first = greedy(classes, steps, split.private)
        if first is None:
            return None
        solution: Solution | None = first
        if first.bound < worst:
            solution = solve(classes, split.private, steps, self._effort)
        if solution is None:
            return None
        names = tuple(int(c.names[o]) for c, o in zip(classes, solution.options, strict=True))
        return PlanSolution(split, names, solution.loss, solution.bound, solution.exact)


def _joined(choices: Choices, at: Ints, cost: int, loss: float) -> tuple[Choices, Ints]:
    """The options of a feature with the option to join added, and their hull."""
    if len(choices.costs) and choices.costs[0] < cost:
        both = reduce_options(np.append(choices.costs, cost), np.append(choices.losses, loss))
        names = np.append(choices.names, JOIN)[both.names]
        merged = Choices(both.costs, both.losses, names)
        return merged, hull(merged)
    # Joining is cheapest. Options that lose at least as much are dominated, and the hull starts at the joining option
    # and continues with the steepest slope.
    start = int(np.searchsorted(-choices.losses, -loss, side="right"))
    while start < len(choices.costs) and choices.costs[start] <= cost:
        start += 1
    merged = Choices(
        np.append(np.int64(cost), choices.costs[start:]),
        np.append(loss, choices.losses[start:]),
        np.append(np.int64(JOIN), choices.names[start:]),
    )
    rest = at[at >= start]
    if not len(rest):
        return merged, np.arange(len(merged.costs))[:1] if len(merged.costs) == 1 else hull(merged)
    rate = (loss - choices.losses[rest]) / (choices.costs[rest] - cost)
    steepest = len(rest) - 1 - int(np.argmax(rate[::-1]))
    return merged, np.append(0, rest[steepest:] - start + 1)
