"""The knapsack: exact where it says so, within its bound elsewhere, and never worse for more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.planning.knapsack import Choices, Effort, greedy, hull, reduce_options, solve, steps_of

OPTIONS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=6)
CLASSES = st.lists(OPTIONS, min_size=1, max_size=5)
EFFORTS = st.sampled_from([Effort(True, 0), Effort(False, 16), Effort(False, 64), Effort(False, 0)])


def reduced(classes: list[list[tuple[int, int]]]) -> list[Choices]:
    return [reduce_options([c for c, _ in options], [loss / 7 for _, loss in options]) for options in classes]


def brute(classes: list[list[tuple[int, int]]], budget: int) -> float | None:
    found = [
        sum(loss for _, loss in picked) / 7
        for picked in itertools.product(*classes)
        if sum(cost for cost, _ in picked) <= budget
    ]
    return min(found, default=None)


@given(CLASSES, st.integers(0, 300))
def test_complete_solutions_are_the_best_there_are(classes: list[list[tuple[int, int]]], budget: int) -> None:
    found, best = solve(reduced(classes), budget), brute(classes, budget)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.exact
    assert found.loss == pytest.approx(best)
    assert found.bound == pytest.approx(best)


@given(CLASSES, st.integers(0, 300), EFFORTS)
def test_no_solver_exceeds_the_budget_or_beats_its_bound(
    classes: list[list[tuple[int, int]]], budget: int, effort: Effort
) -> None:
    choices = reduced(classes)
    found, best = solve(choices, budget, effort=effort), brute(classes, budget)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    assert found.cost == sum(int(c.costs[i]) for c, i in zip(choices, found.options, strict=True)) <= budget
    assert found.loss == pytest.approx(sum(float(c.losses[i]) for c, i in zip(choices, found.options, strict=True)))
    assert found.bound <= best + 1e-9
    assert found.loss >= best - 1e-9
    if found.exact:
        assert found.loss == pytest.approx(best)


@given(CLASSES, EFFORTS, st.integers(0, 300), st.integers(0, 300))
def test_a_larger_budget_never_loses_more(
    classes: list[list[tuple[int, int]]], effort: Effort, one: int, other: int
) -> None:
    choices = reduced(classes)
    small, large = (solve(choices, budget, effort=effort) for budget in sorted((one, other)))
    if small is not None:
        assert large is not None
        assert large.loss <= small.loss + 1e-12


def test_rounding_up_to_a_coarser_unit_keeps_the_finer_units_solution() -> None:
    rng = np.random.default_rng(0)
    classes = [reduce_options(np.sort(rng.integers(1, 4000, 30)), np.sort(rng.random(30))[::-1]) for _ in range(12)]
    effort = Effort(False, 16)
    budgets = [2**power + more for power in range(9, 16) for more in range(-200, 200, 23)]
    losses = [s.loss for b in budgets if (s := solve(classes, b, effort=effort)) is not None]
    assert (np.diff(losses) <= 1e-12).all()


def test_where_the_unit_doubles_the_finer_one_is_still_considered() -> None:
    # Greedy takes the first and third class; the best, first and second, fits 16 to the byte, and 17 not in units of 2.
    classes = [reduce_options([0, c], [loss, 0.0]) for c, loss in ((7, 10.0), (9, 10.0), (4, 5.0))]
    for budget in (16, 17):
        found = solve(classes, budget, effort=Effort(False, 16))
        assert found is not None
        assert (found.options, found.loss) == ((1, 1, 0), 5.0)


def test_costs_round_up() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        classes = [reduce_options(rng.integers(0, 60, 6), rng.integers(0, 40, 6) / 7) for _ in range(5)]
        budget = int(rng.integers(150, 300))
        found = solve(classes, budget, effort=Effort(False, 16))
        assert found is None or found.cost <= budget


@given(OPTIONS)
def test_reduced_options_rise_in_cost_and_fall_in_loss_and_keep_the_best(options: list[tuple[int, int]]) -> None:
    choices = reduce_options([c for c, _ in options], [float(loss) for _, loss in options])
    assert (np.diff(choices.costs) > 0).all()
    assert (np.diff(choices.losses) < 0).all()
    for cost, loss in options:
        assert any(c <= cost and kept <= loss for c, kept in zip(choices.costs, choices.losses, strict=True))
    for name, cost, loss in zip(choices.names, choices.costs, choices.losses, strict=True):
        assert options[name] == (cost, loss)


@given(OPTIONS)
def test_no_option_lies_below_the_hull(options: list[tuple[int, int]]) -> None:
    choices = reduce_options([c for c, _ in options], [float(loss) for _, loss in options])
    at = hull(choices)
    assert (at[0], at[-1]) == (0, len(choices.costs) - 1)
    line = np.interp(choices.costs, choices.costs[at], choices.losses[at])
    assert (line <= choices.losses + 1e-9).all()


def test_greedy_solutions_stop_at_the_first_step_that_does_not_fit() -> None:
    classes = [reduce_options([0, 10], [10.0, 0.0]), reduce_options([0, 3], [2.0, 0.0])]
    found = greedy(classes, steps_of(classes), 9)
    assert found is not None
    # A later, cheaper step would fit, but then the sequence of solutions would not be nested.
    assert (found.options, found.loss, found.bound) == ((0, 0), 12.0, pytest.approx(3.0))
    assert solve(classes, 9).options == (0, 1)  # type: ignore[union-attr]


def test_a_thousand_classes_are_solved_within_a_stated_gap() -> None:
    rng = np.random.default_rng(1)
    classes = [reduce_options(np.sort(rng.integers(1, 10**7, 20)), np.sort(rng.random(20))[::-1]) for _ in range(1000)]
    found = solve(classes, 10**9)
    assert found is not None
    assert found.cost <= 10**9
    assert found.loss - found.bound < 0.001 * found.loss


def test_a_budget_met_by_equality_is_spent() -> None:
    classes = [Choices(np.array([1, 3]), np.array([5.0, 1.0]), np.arange(2)) for _ in range(2)]
    for budget, cost in ((2, 2), (3, 2), (4, 4), (6, 6)):
        found = greedy(classes, steps_of(classes), budget)
        assert found is not None
        assert found.cost == cost
