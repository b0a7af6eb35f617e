"""The multiple-choice knapsack: one option of every class, least loss, total cost within a budget.

Three solvers, all deterministic and all monotone (a larger budget never gives a larger loss):

- *complete*: every choice of options that no other beats in both cost and loss, class by class; exact. Used where
  these lists stay short, which the options alone decide and not the budget.
- *greedy*: options on the lower convex hull of each class, taken by loss saved per byte up to the first that does not
  fit (Sinha and Zoltners 1979). Its solutions are prefixes of one sequence, hence monotone.
- *rounded*: dynamic programming over costs rounded up to a unit. The unit is a power of two that follows the budget;
  where it has just doubled, the solution at the largest budget of the finer unit is considered as well, which keeps
  the loss monotone.

The bound is the linear relaxation's value: the greedy sequence with the option that does not fit taken in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys_embed.planning.curves import Floats

Ints = NDArray[np.int64]

COMPLETE_STATES = 1 << 16
"""Longest list that the complete solver goes through, before options are compared."""
ROUNDED_WORK = 1 << 22
"""Additions that the rounded solver may take; it has fewer units where there are more options."""
LEAST_UNITS, MOST_UNITS = 1 << 10, 1 << 14


class Choices(NamedTuple):
    """Options of one class on its Pareto front: int64 costs rise strictly, losses fall strictly.

    ``names`` are positions in the list that :func:`reduce_options` was given.
    """

    costs: Ints
    losses: Floats
    names: Ints


class Steps(NamedTuple):
    """The convex hull of every class, laid out for the greedy solver.

    Args:
        first: [classes] cheapest option of each.
        cost: [steps] further cost of each step, all classes together, in order of falling gain per byte.
        gain: [steps] loss it saves.
        owner: [steps] its class.
        option: [steps] the option it leads to.
    """

    first: Ints
    cost: Ints
    gain: Floats
    owner: Ints
    option: Ints


@dataclass(frozen=True)
class Solution:
    """The option of each class, their total cost and loss, and a lower bound on the loss of any choice."""

    options: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    exact: bool


def reduce_options(costs: Sequence[int] | Ints, losses: Sequence[float] | Floats) -> Choices:
    """Drop every option that another beats in both cost and loss; ties keep the first in the list.

    >>> reduce_options([5, 1, 9, 4], [1.0, 3.0, 1.5, 3.0]).names.tolist()
    [1, 0]
    """
    cost, loss = np.asarray(costs, np.int64), np.asarray(losses, np.float64)
    order = np.lexsort((np.arange(len(cost)), loss, cost))
    best = np.minimum.accumulate(loss[order])
    keep = np.ones(len(order), bool)
    keep[1:] = best[1:] < best[:-1]
    kept = order[keep]
    return Choices(cost[kept], loss[kept], kept)


def hull(choices: Choices) -> Ints:
    """Positions on the lower convex hull, from the cheapest to the one that loses least; straight stretches stay."""
    cost, loss = choices.costs, choices.losses
    stack: list[int] = []
    for i in range(len(cost)):
        while len(stack) > 1:
            a, b = stack[-2], stack[-1]
            # Convexity: the loss saved per byte from a to b is at least that from b to i (multiplied out: no division).
            if (loss[a] - loss[b]) * (cost[i] - cost[b]) >= (loss[b] - loss[i]) * (cost[b] - cost[a]):
                break
            stack.pop()
        stack.append(i)
    return np.array(stack, np.int64)


def steps_of(classes: Sequence[Choices], hulls: Sequence[Ints] | None = None) -> Steps:
    """The greedy sequence of all classes."""
    hulls = [hull(c) for c in classes] if hulls is None else hulls
    cost = np.concatenate([np.diff(c.costs[h]) for c, h in zip(classes, hulls, strict=True)])
    gain = np.concatenate([-np.diff(c.losses[h]) for c, h in zip(classes, hulls, strict=True)])
    owner = np.repeat(np.arange(len(classes)), [len(h) - 1 for h in hulls])
    option = np.concatenate([h[1:] for h in hulls])
    # Rounding may make a later step of a class look steeper than an earlier one; the running minimum keeps their order.
    rate = np.concatenate([np.minimum.accumulate(r) for r in np.split(gain / cost, np.flatnonzero(np.diff(owner)) + 1)])
    order = np.argsort(-rate, kind="stable")
    first = np.array([h[0] for h in hulls], np.int64)
    return Steps(first, cost[order], gain[order], owner[order], option[order])


def greedy(classes: Sequence[Choices], steps: Steps, budget: int) -> Solution | None:
    """The greedy solution and the relaxation's bound; None where not even the cheapest options fit."""
    left = budget - sum(int(c.costs[i]) for c, i in zip(classes, steps.first, strict=True))
    if left < 0:
        return None
    spent = np.cumsum(steps.cost)
    taken = int(np.searchsorted(spent, left, side="right"))
    options = steps.first.copy()
    # Steps of a class come in order, so the last one assigned is the furthest.
    options[steps.owner[:taken]] = steps.option[:taken]
    solution = _solution(classes, options, 0.0, False)
    part = 0.0
    if taken < len(spent):
        before = int(spent[taken - 1]) if taken else 0
        part = float(steps.gain[taken]) * (left - before) / float(steps.cost[taken])
    bound = min(solution.loss, max(0.0, solution.loss - part))
    return Solution(solution.options, solution.cost, solution.loss, bound, bound >= solution.loss)


@dataclass(frozen=True)
class Effort:
    """Which solvers run besides the greedy one; this depends on the number of options, never on the budget.

    Args:
        complete: go through all choices.
        units: of the rounded solver, a power of two; 0 leaves it out.
    """

    complete: bool
    units: int

    @classmethod
    def of(cls, options: Sequence[int]) -> Effort:
        """The effort for classes with so many options each."""
        units = min(ROUNDED_WORK // max(1, sum(options)), MOST_UNITS)
        units = 1 << (max(units, 1).bit_length() - 1)
        # A solution must stay feasible when the unit doubles: with n classes, sum ceil(c / 2u) <= (sum ceil(c / u) + n)
        # / 2 <= (units + n) / 2, which is at most ``units`` if n <= units.
        return cls(prod(options) <= COMPLETE_STATES, units if units >= max(LEAST_UNITS, len(options)) else 0)


def solve(
    classes: Sequence[Choices], budget: int, steps: Steps | None = None, effort: Effort | None = None
) -> Solution | None:
    """The best solution of the solvers that suit the number of classes and options.

    Args:
        steps: of :func:`steps_of`, where they are known.
        effort: which solvers run; by default what suits ``classes``.

    Returns:
        None where not even the cheapest options fit.

    >>> classes = [reduce_options([1, 5], [9.0, 0.0]), reduce_options([1, 3, 6], [5.0, 2.0, 0.0])]
    >>> solve(classes, 8).options, solve(classes, 8).loss, solve(classes, 1)
    ((1, 1), 2.0, None)
    """
    # Exact where the linear relaxation is no better than the greedy solution.
    best = greedy(classes, steps_of(classes) if steps is None else steps, budget)
    if best is None or best.exact:
        return best
    effort = Effort.of([len(c.costs) for c in classes]) if effort is None else effort
    if effort.complete:
        found = _solution(classes, _complete(classes, budget), best.bound, True)
        return Solution(found.options, found.cost, found.loss, found.loss, True)
    for options in _rounded(classes, budget, effort.units):
        if options is not None:
            other = _solution(classes, options, best.bound, False)
            best = other if other.loss < best.loss else best
    return best


def _solution(classes: Sequence[Choices], options: Ints, bound: float, exact: bool) -> Solution:
    picked = [int(i) for i in options]
    # Summed in one order for all solvers, so that equal choices have equal losses.
    loss = float(sum(float(c.losses[i]) for c, i in zip(classes, picked, strict=True)))
    cost = sum(int(c.costs[i]) for c, i in zip(classes, picked, strict=True))
    return Solution(tuple(picked), cost, loss, bound, exact)


def _complete(classes: Sequence[Choices], budget: int) -> Ints:
    """The exact optimum, by the Pareto front of summed costs and losses (Nemhauser and Ullmann 1969)."""
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for c in classes:
        joined = (cost[:, None] + c.costs).ravel()
        kept = reduce_options(joined, (loss[:, None] + c.losses).ravel())
        cost, loss = kept.costs, kept.losses
        trail.append((kept.names // len(c.costs), kept.names % len(c.costs)))
    at = int(np.searchsorted(cost, budget, side="right")) - 1
    options = np.zeros(len(classes), np.int64)
    for i in range(len(classes) - 1, -1, -1):
        before, option = trail[i]
        options[i], at = option[at], int(before[at])
    return options


def _rounded(classes: Sequence[Choices], budget: int, units: int) -> list[Ints | None]:
    """Solutions with costs rounded up to the budget's unit, and to half of it at that unit's largest budget."""
    if not units:
        return []
    bits = units.bit_length() - 1
    power = max(0, (max(budget, 1) - 1).bit_length() - bits)
    found = [_rounded_at(classes, budget >> power, 1 << power)]
    if power:
        found.append(_rounded_at(classes, units, 1 << (power - 1)))
    return found


def _rounded_at(classes: Sequence[Choices], capacity: int, unit: int) -> Ints | None:
    loss = np.zeros(capacity + 1)
    trail = []
    for c in classes:
        weights = -(-c.costs // unit)
        best = np.full(capacity + 1, np.inf)
        taken = np.zeros(capacity + 1, np.int16)
        for i, (w, value) in enumerate(zip(weights.tolist(), c.losses.tolist(), strict=True)):
            if w > capacity:
                break
            moved = loss[: capacity + 1 - w] + value
            better = moved < best[w:]
            np.copyto(best[w:], moved, where=better)
            np.copyto(taken[w:], np.int16(i), where=better)
        loss = best
        trail.append((weights, taken))
    if not np.isfinite(loss[capacity]):
        return None
    options, at = np.zeros(len(classes), np.int64), capacity
    for j in range(len(classes) - 1, -1, -1):
        weights, taken = trail[j]
        options[j] = taken[at]
        at -= int(weights[options[j]])
    return options
