"""OptEmbed's evolution over the widths of fields, for any score function.

Every generation is a function of the seed, its number and all earlier scores, so a resumed search gives the result of
an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recsys_embed.errors import BudgetError
from recsys_embed.utils.settings import Settings, param

Candidate = tuple[int, ...]
Score = Callable[[Sequence[Candidate]], list[float]]


@dataclass(frozen=True)
class Evolution(Settings):
    """Options of the search; the defaults are the paper's (Lyu et al., arXiv 2208.04482).

    Args:
        generations: of candidates, each scored once.
        population: candidates of the first generation.
        mutations: of every later generation: the best candidates, with some fields drawn anew.
        crossovers: of every later generation: the front of one parent and the rest of another.
        keep: best candidates that pass on unchanged; their scores are known.
        parents: of mutations and crossovers: so many of the best found so far.
        mutation_rate: chance of each field to be drawn anew.

    Raises:
        ConfigError: an option is out of range; all faults at once.

    >>> options, space = Evolution(generations=2, population=4, mutations=3, crossovers=0), WidthSpace(fields=3, most=8)
    >>> len(evolve(options, space, lambda many: [float(sum(c)) for c in many]))
    7
    """

    generations: int = param(30, low=1)
    population: int = param(20, low=2)
    mutations: int = param(10, low=0)
    crossovers: int = param(10, low=0)
    keep: int = param(0, low=0)
    parents: int = param(15, low=2)
    mutation_rate: float = param(0.1, above=0, high=1)

    def conflicts(self) -> list[str]:
        if self.generations > 1 and self.mutations + self.crossovers < 1:
            return ["later generations are empty: give `mutations` or `crossovers`"]
        return []


def mutate(parent: Candidate, most: int, rate: float, rng: random.Random) -> Candidate:
    """A copy with each width drawn anew from 1 to ``most`` with chance ``rate``.

    >>> parent = (3, 3, 3)
    >>> mutate(parent, 8, 1.0, random.Random(0)), parent
    ((7, 8, 5), (3, 3, 3))
    """
    return tuple(rng.randint(1, most) if rng.random() < rate else width for width in parent)


def crossover(front: Candidate, back: Candidate, rng: random.Random) -> Candidate:
    """The first widths of one parent and the rest of the other; the point lies strictly inside.

    >>> crossover((1, 1, 1), (2, 2, 2), random.Random(0))
    (1, 1, 2)
    """
    point = rng.randint(1, len(front) - 1)
    return front[:point] + back[point:]


def _child(parents: Sequence[Candidate], rng: random.Random) -> Candidate:
    front, back = rng.sample(parents, 2)
    return crossover(front, back, rng)


@dataclass(frozen=True)
class WidthSpace:
    """The widths that candidates may have, and their cost in bytes.

    Args:
        fields: number of fields.
        most: largest width.
        costs: bytes of one column of each field.
        fixed: bytes that do not depend on the widths.
        limit: bytes a candidate may take; None: any.

    Raises:
        BudgetError: even width 1 everywhere takes more than ``limit``.

    >>> space = WidthSpace(fields=2, most=8, costs=(40, 400), limit=2000)
    >>> space.bytes((8, 4)), space.bytes(space.fit((8, 8), random.Random(0))) <= 2000
    (1920, True)
    """

    fields: int
    most: int
    costs: tuple[int, ...] = ()
    fixed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        least = self.bytes((1,) * self.fields)
        if self.limit is not None and least > self.limit:
            raise BudgetError(
                f"the smallest subnet, one column of every kept row, takes {least:,} bytes; {self.limit:,} are "
                "available for the vectors. Ways out: 1. a larger budget; 2. prune more rows (a larger "
                "`threshold_lr` or `embedding_weight_decay`)"
            )

    def bytes(self, candidate: Candidate) -> int:
        """Bytes of a candidate."""
        return self.fixed + sum(c * w for c, w in zip(self.costs, candidate, strict=False))

    def fit(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """The candidate, narrowed by single columns of random fields until it is within the limit."""
        if self.limit is None or self.bytes(candidate) <= self.limit:
            return candidate
        widths, size = list(candidate), self.bytes(candidate)
        order = [f for f, width in enumerate(widths) for _ in range(width - 1)]
        rng.shuffle(order)
        for field in order:
            widths[field] -= 1
            size -= self.costs[field]
            if size <= self.limit:
                break
        return tuple(widths)

    def draw(self, rng: random.Random) -> Candidate:
        """Uniform widths, narrowed to the limit."""
        return self.fit(tuple(rng.randint(1, self.most) for _ in range(self.fields)), rng)


def ranked(scores: Mapping[Candidate, float]) -> list[Candidate]:
    """Candidates by descending score; ties in the order of scoring, NaN last."""
    return sorted(scores, key=lambda c: -scores[c] if scores[c] == scores[c] else float("inf"))


def next_generation(
    options: Evolution, space: WidthSpace, seed: int, generation: int, scores: Mapping[Candidate, float]
) -> list[Candidate]:
    """Candidates of a generation (0 is the first); new ones, unless 20 random tries find none.

    Args:
        options: of the evolution.
        space: of widths.
        seed: of all draws.
        generation: its number.
        scores: of all candidates before, in the order in which they were scored.
    """
    rng = random.Random(f"{seed}/{generation}")
    found: dict[Candidate, None] = {}

    def add(make: Callable[[], Candidate], tries: int = 20) -> None:
        for _ in range(tries):
            candidate = space.fit(make(), rng)
            if candidate not in found and candidate not in scores:
                found[candidate] = None
                return

    if generation == 0:
        for _ in range(options.population):
            add(lambda: space.draw(rng))
        return list(found)
    best = ranked(scores)[: options.parents]
    for i in range(options.mutations):
        add(lambda i=i: mutate(best[i % len(best)], space.most, options.mutation_rate, rng))  # type: ignore[misc]
    if len(best) > 1 and space.fields > 1:
        for _ in range(options.crossovers):
            add(lambda: _child(best, rng))
    return list(dict.fromkeys([*best[: options.keep], *found]))


def evolve(
    options: Evolution,
    space: WidthSpace,
    score: Score,
    *,
    seed: int = 0,
    scores: Mapping[Candidate, float] | None = None,
    generation: int = 0,
    on_generation: Callable[[int, Mapping[Candidate, float]], None] | None = None,
) -> dict[Candidate, float]:
    """Search, and return the score of every candidate in the order in which they were scored.

    Args:
        options: of the evolution.
        space: of widths.
        score: the scores of some candidates, higher is better.
        seed: of all draws.
        scores: known scores, to resume a search.
        generation: the first generation to score, to resume a search.
        on_generation: called after each generation with its number and all scores.

    >>> space = WidthSpace(fields=3, most=8)
    >>> found = evolve(Evolution(generations=20), space, lambda many: [-float(abs(sum(c) - 7)) for c in many])
    >>> sum(ranked(found)[0])
    7
    """
    known = dict(scores or {})
    for number in range(generation, options.generations):
        fresh = [c for c in next_generation(options, space, seed, number, known) if c not in known]
        known.update(zip(fresh, score(fresh) if fresh else [], strict=True))
        if on_generation is not None:
            on_generation(number, known)
    return known
