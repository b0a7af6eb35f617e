"""The best plan within a budget: a knapsack for every size of every pool, as far as bounds leave it a chance."""

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
from recsys_embed.planning.options import Menu
from recsys_embed.planning.pools import Pool

JOIN = -1
"""Name of the option to join the pool."""
PARTS = 256
SHARES = (*range(4, 128, 8), *range(128, 192, 4), *range(192, PARTS))
"""Parts of the budget, of :data:`PARTS`, that a pool is tried with."""
MANY = 64
"""Features beyond which fewer parts are tried: bytes left over make the pool larger afterwards."""
LEVELS = 32
"""Largest number of members that any number of may be allowed to join; a dozen numbers are tried beyond it."""
PRICES = 24
"""Prices per byte that bounds are computed with."""


@dataclass(frozen=True)
class Cell:
    """A knapsack: the pool and its rows, the members that may join it, and the bytes left for private tables."""

    pool: Pool | None
    rows: int
    allowed: int
    private: int


@dataclass(frozen=True)
class Found:
    """The best solution.

    Args:
        names: option of each feature, a position in its menu's options or :data:`JOIN`.
        loss: its objective: the sum of losses.
        bound: no combination of the same options loses less.
        exact: it is proved to be the best.
    """

    cell: Cell
    names: tuple[int, ...]
    loss: float
    bound: float
    exact: bool


class Search:
    """Menus and pools laid out for many knapsacks.

    Args:
        tiny: bytes of the tables that are to stay plain where this is not too dear.
    """

    def __init__(self, menus: Sequence[Menu], pools: Sequence[Pool], tiny: int = 0) -> None:
        self.menus, self.pools, self._tiny = menus, pools, tiny
        longest = max([1, *(len(m.hull) for m in menus)])
        self._costs = np.full((len(menus), longest), np.inf)
        self._losses = np.full((len(menus), longest), np.inf)
        for i, m in enumerate(menus):
            self._costs[i, : len(m.hull)] = m.choices.costs[m.hull]
            self._losses[i, : len(m.hull)] = m.choices.losses[m.hull]
        # A class has one option more where a pool may be joined; which solvers run must not depend on the budget.
        self._effort = Effort.of([len(m.choices.costs) + 1 for m in menus])
        self._prices = self._price_grid()
        self._shares = SHARES if len(menus) <= MANY else SHARES[::6]

    def _price_grid(self) -> Floats:
        """Losses per byte, from the dearest to the cheapest step of any feature."""
        with np.errstate(invalid="ignore"):
            rates = -np.diff(self._losses) / np.diff(self._costs)
        rates = rates[np.isfinite(rates) & (rates > 0)]
        if not len(rates):
            return np.array([0.0, 1e-9, 1e-6, 1e-3])
        return np.concatenate([[0.0], np.geomspace(rates.min() / 4, rates.max() * 4, PRICES)])

    # -- what there is --------------------------------------------------------------------------------------------

    def least(self) -> int:
        """Bytes that the smallest plan takes."""
        return min(self._least_of(pool, n) for pool, n in self._families())

    def _families(self) -> list[tuple[Pool | None, int]]:
        """Every pool with each number of members that may join, and none."""
        found: list[tuple[Pool | None, int]] = []
        if all(len(m.options) for m in self.menus):
            found.append((None, 0))
        for pool in self.pools:
            if any(not m.options and i not in pool.members for i, m in enumerate(self.menus)):
                continue
            count = len(pool.members)
            levels = set(range(1, count + 1))
            if count > LEVELS:
                whole = sum(not pool.tiny[at] for at in range(count))
                levels = {count, whole, *(round(count ** (j / 10)) for j in range(11))}
            found += [(pool, n) for n in sorted(levels) if n >= max(pool.must, 1)]
        return found

    def _cheapest(self, pool: Pool | None, allowed: int) -> int:
        """Bytes of private tables, where everybody takes the cheapest."""
        cost = self._costs[:, 0].copy()
        if pool is not None:
            joining = pool.members[:allowed]
            cost[joining] = np.minimum(cost[joining], pool.own[:allowed])
        return int(cost.sum())

    def _least_of(self, pool: Pool | None, allowed: int) -> int:
        return self._cheapest(pool, allowed) + (0 if pool is None else pool.unit * pool.least)

    def _cells(self, pool: Pool | None, allowed: int, budget: int) -> list[Cell]:
        """Ways to divide the budget; each gives the pool and the private tables no less when the budget grows."""
        if pool is None:
            return [Cell(None, 0, 0, budget)]
        private = self._cheapest(pool, allowed)
        # Beside the smallest pool, and the largest: with nothing else that costs, or with whole tiny tables.
        splits = [(pool.unit * pool.least, budget - pool.unit * pool.least), (budget - private, private)]
        splits += [(budget - private - self._tiny, private + self._tiny)]
        splits += [(budget * part // PARTS, budget * (PARTS - part) // PARTS) for part in self._shares]
        cells = [Cell(pool, min(pool.most, shared // pool.unit), allowed, rest) for shared, rest in splits]
        return [c for c in dict.fromkeys(cells) if c.rows >= pool.least and c.private >= private]

    # -- bounds and solutions -------------------------------------------------------------------------------------

    def best(self, budget: int) -> Found | None:
        """The best solution, or None where not even the smallest plan fits."""
        # Whatever the price of a byte, what is saved at that price bounds what can be lost (Lagrange).
        alone = np.stack([np.min(self._losses + p * np.where(np.isinf(self._costs), 0, self._costs), 1)
                          for p in self._prices])  # fmt: skip
        queue: list[tuple[float, int, Cell, Floats]] = []
        for pool, allowed in self._families():
            cells = self._cells(pool, allowed, budget)
            if not cells:
                continue
            if pool is None:
                losses = np.zeros((0, 1))
            else:
                losses = pool.losses(np.array([float(c.rows) for c in cells]), allowed)
            for cell, bound, loss in zip(cells, self._bounds(alone, cells, losses), losses.T, strict=True):
                queue.append((bound, len(queue), cell, loss))
        best: Found | None = None
        bound = np.inf
        for low, _, cell, losses in sorted(queue, key=lambda q: q[:2]):
            if best is not None and low >= best.loss:
                bound = min(bound, low)
                break
            found = self._solve(cell, losses, np.inf if best is None else best.loss)
            if found is None:
                continue
            bound = min(bound, found.bound)
            if best is None or found.loss < best.loss:
                best = found
        if best is None:
            return None
        bound = max(0.0, min(bound, best.loss))
        return Found(best.cell, best.names, best.loss, bound, best.exact and bound >= best.loss)

    def _bounds(self, alone: Floats, cells: Sequence[Cell], losses: Floats) -> Floats:
        """Lower bounds of the cells of one pool: [cells]."""
        total = np.repeat(alone.sum(1)[:, None], len(cells), 1)
        pool = cells[0].pool
        if pool is not None:
            joining = pool.members[: cells[0].allowed]
            own = alone[:, joining]
            joined = losses[None] + (self._prices[:, None] * pool.own[: len(joining)])[:, :, None]
            rest = np.delete(alone, joining, 1).sum(1)
            total = rest[:, None] + np.minimum(own[:, :, None], joined).sum(1)
        private = np.array([float(c.private) for c in cells])
        out: Floats = np.max(total - self._prices[:, None] * private, 0)
        return np.maximum(out, 0.0) - 1e-12

    def _solve(self, cell: Cell, losses: Floats, worst: float) -> Found | None:
        classes = [m.choices for m in self.menus]
        hulls = [m.hull for m in self.menus]
        if cell.pool is not None:
            for at, i in enumerate(cell.pool.members[: cell.allowed]):
                classes[i], hulls[i] = _joined(classes[i], hulls[i], int(cell.pool.own[at]), float(losses[at]))
        steps = steps_of(classes, hulls)
        first = greedy(classes, steps, cell.private)
        if first is None:
            return None
        solution: Solution | None = first
        if first.bound < worst:
            solution = solve(classes, cell.private, steps, self._effort)
        if solution is None:
            return None
        names = tuple(int(c.names[o]) for c, o in zip(classes, solution.options, strict=True))
        return Found(cell, names, solution.loss, solution.bound, solution.exact)


def _joined(choices: Choices, at: Ints, cost: int, loss: float) -> tuple[Choices, Ints]:
    """A class with the option to join, and its hull."""
    if len(choices.costs) and choices.costs[0] < cost:
        both = reduce_options(np.append(choices.costs, cost), np.append(choices.losses, loss))
        names = np.append(choices.names, JOIN)[both.names]
        merged = Choices(both.costs, both.losses, names)
        return merged, hull(merged)
    # Joining is cheapest: what loses no less than it goes, and the hull begins with the steepest way on.
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
