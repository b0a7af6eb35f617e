"""Evolution: parents stay as they are, the best is never lost, children mix both parents, budgets hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.search import Evolution, WidthSpace, evolve
from recsys_embed.search.evolution import crossover, mutate, next_generation, ranked

SPACE = WidthSpace(fields=6, most=16)


def peak(many):
    """A score with one best candidate."""
    return [-float(sum((w - 3 * f) ** 2 for f, w in enumerate(c))) for c in many]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=30), st.floats(0.01, 1), st.integers(0, 99))
def test_mutants_are_copies_within_bounds(parent, rate, seed):
    before = tuple(parent)
    child = mutate(before, 64, rate, random.Random(seed))
    assert tuple(parent) == before
    assert len(child) == len(before)
    assert all(1 <= w <= 64 for w in child)


def test_a_mutation_draws_its_share_of_fields():
    rng = random.Random(0)
    changed = sum(a != b for _ in range(300) for a, b in zip(mutate((0,) * 50, 64, 0.1, rng), (0,) * 50, strict=True))
    assert 0.08 < changed / 15_000 < 0.12


def test_children_differ_from_both_parents_where_fields_are_few():
    rng = random.Random(0)
    front, back = (1, 2, 3), (64, 63, 62)
    children = [crossover(front, back, rng) for _ in range(50)]
    assert all(c not in (front, back) for c in children), "a point strictly inside takes something of both"
    assert set(children) == {(1, 63, 62), (1, 2, 62)}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50))
def test_the_best_ever_never_falls_and_no_candidate_is_scored_twice(seed):
    asked, best = [], []

    def score(many):
        asked.extend(many)
        return peak(many)

    found = evolve(
        Evolution(generations=8),
        SPACE,
        score,
        seed=seed,
        on_generation=lambda _, known: best.append(max(known.values())),
    )
    assert best == sorted(best)
    assert len(best) == 8
    assert len(asked) == len(set(asked)) == len(found)
    assert dict(zip(asked, peak(asked), strict=True)) == found
    assert found[ranked(found)[0]] == max(found.values()) == best[-1]


def test_it_finds_what_chance_does_not():
    found = evolve(Evolution(), SPACE, peak)
    rng = random.Random(1)
    chance = max(peak([SPACE.draw(rng) for _ in range(len(found))]))
    assert max(found.values()) > chance / 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), stop=st.integers(1, 9))
def test_a_stopped_evolution_goes_on_as_if_it_had_not(seed, stop):
    options = Evolution(generations=10)
    whole = evolve(options, SPACE, peak, seed=seed)
    part = evolve(Evolution(generations=stop), SPACE, peak, seed=seed)
    assert list(evolve(options, SPACE, peak, seed=seed, scores=part, generation=stop).items()) == list(whole.items())


def test_parents_are_the_best_so_many_of_all_so_far():
    options = Evolution(parents=2, mutations=0, crossovers=30)
    scores = {(1,) * 6: 3.0, (9,) * 6: 2.0, (16,) * 6: 1.0, (5,) * 6: float("nan")}
    children = next_generation(options, SPACE, 0, 1, scores)
    assert children
    assert {w for c in children for w in c} == {1, 9}
    kept = next_generation(Evolution(keep=2, parents=2), SPACE, 0, 1, scores)
    assert kept[:2] == [(1,) * 6, (9,) * 6]


@given(st.integers(0, 10**6), st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(0, 99))
def test_every_candidate_keeps_to_the_limit(extra, costs, seed):
    least = sum(costs) + 7
    space = WidthSpace(len(costs), 16, tuple(costs), fixed=7, limit=least + extra % (15 * sum(costs) + 1))
    rng = random.Random(seed)
    for _ in range(20):
        candidate = space.draw(rng)
        assert space.bytes(candidate) <= space.limit
        assert all(1 <= w <= 16 for w in candidate)
    options = Evolution(generations=3, population=6)
    for c in evolve(options, space, lambda many: [0.0] * len(many), seed=seed):
        assert space.bytes(c) <= space.limit


def test_a_column_counts_from_1():
    space = WidthSpace(2, 8, costs=(40, 400), fixed=12)
    assert space.bytes((1, 1)) == 452
    assert space.bytes((8, 2)) == 12 + 320 + 800
    with pytest.raises(BudgetError, match=r"smallest subnet.*452 bytes; 451 are available.*Ways out"):
        WidthSpace(2, 8, costs=(40, 400), fixed=12, limit=451)


def test_one_field_and_one_width_are_searched_too():
    assert len(evolve(Evolution(), WidthSpace(1, 3), lambda many: [float(c[0]) for c in many])) == 3
    assert evolve(Evolution(), WidthSpace(4, 1), lambda many: [1.0] * len(many)) == {(1, 1, 1, 1): 1.0}


def test_faults_are_named_together():
    with pytest.raises(ConfigError, match="2 faults in Evolution"):
        Evolution(population=1, mutation_rate=0)
    with pytest.raises(ConfigError, match="later generations are empty"):
        Evolution(mutations=0, crossovers=0)
