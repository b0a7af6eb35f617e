"""The options of one feature: every method at many sizes, each with its bytes and what it loses.

Sizes are looked at on a coarse grid first and then more closely where they might be chosen: next to the options on the
lower convex hull of bytes and loss. Between two sizes of one method options are interpolated; their losses lie on the
chord, above a convex curve, and whoever chooses one sizes the method to its bytes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from recsys_embed.config import MethodConfig
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.planning.knapsack import Choices, Ints, hull, reduce_options
from recsys_embed.planning.limits import Candidate, Costs, Limits
from recsys_embed.planning.price import Factor, Terms, factors, price
from recsys_embed.program import Hash, LookupProgram
from recsys_embed.registry import get_method

FULL = "full"
TINY_PENALTY = 0.05
"""Loss added to options of tiny tables other than plain ones: a twentieth of all that a feature can tell."""
STEP = 1.06
"""Largest ratio of the bytes of neighbouring options."""
MOST_BETWEEN = 24


@dataclass(frozen=True)
class Frame:
    """What is the same for all features of a plan.

    Args:
        candidates: methods to consider.
        costs: what bytes count.
        limits: what is ruled out.
        factors: by method, what its losses are multiplied by (:mod:`recsys_embed.planning.evidence`).
        knots: sizes per method looked at first.
        rounds: how often sizes next to good ones are looked at.
    """

    candidates: Sequence[Candidate]
    costs: Costs
    limits: Limits
    factors: Mapping[str, float] = field(default_factory=dict)
    knots: int = 12
    rounds: int = 3


class Sized(NamedTuple):
    """A method at one size."""

    candidate: Candidate
    size: int
    config: MethodConfig
    program: LookupProgram
    parts: list[Factor]
    cost: int


class Option(NamedTuple):
    """One way to store a feature: ``candidate`` at a size in ``[low, high]`` that costs at most ``cost``.

    ``config`` is that of size ``low``, where the option is just that; None where it is interpolated.
    """

    candidate: Candidate
    low: int
    high: int
    config: MethodConfig | None
    cost: int
    loss: float


@dataclass
class Menu:
    """Options of a feature.

    Attributes:
        options: all that were found; ``choices.names`` are positions in it.
        choices: those that no other beats in both bytes and loss.
        hull: positions in ``choices`` on the lower convex hull.
        pools: candidates whose tables are shared between features, with their smallest program.
        refused: why methods are out of the question, by name.
    """

    spec: FeatureSpec
    terms: Terms
    weight: float
    options: list[Option]
    choices: Choices
    hull: Ints
    pools: list[Sized]
    refused: dict[str, str]


def params_of(candidate: Candidate, ranked: bool) -> dict[str, Any]:
    """Options of a candidate; a method that goes by frequency and whose ids are not ``ranked`` by it is told so.

    Methods that can store which ids are frequent have an option ``order`` with a value ``"counts"`` for it.
    """
    params = dict(candidate.params or {})
    named = {f.name for f in fields(candidate.info.config_cls)}
    if not ranked and "order" in named:
        params.setdefault("order", "counts")
    return params


def tiny_bytes(menus: Sequence[Menu], frame: Frame) -> int:
    """Bytes of the plain tables of all tiny features."""
    return sum(o.cost for m in menus if tiny_penalty(m, frame) for o in m.options if o.candidate.name == FULL)


def tiny_penalty(menu: Menu, frame: Frame) -> float:
    """What a feature's options other than a plain table are charged for being that; not 0 for tiny tables only."""
    spec, limits = menu.spec, frame.limits
    if spec.num_embeddings >= limits.full_below or limits.pinned(spec.name) is not None or FULL in menu.refused:
        return 0.0
    return TINY_PENALTY * menu.weight if any(c.name == FULL for c in frame.candidates) else 0.0


def goes_by_frequency(program: LookupProgram) -> bool:
    """Whether some ids are treated apart for their frequency."""
    transforms = [t for p in program.probes for t in p.transforms]
    return bool(program.indexes) or any(isinstance(t, Hash) and t.head for t in transforms)


class MenuMaker:
    """Looks for the options of features; features alike but for their names share them."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._made: dict[object, Menu] = {}

    def menu(self, spec: FeatureSpec, terms: Terms, weight: float, known: bool) -> Menu:
        """Options of ``spec``.

        Args:
            terms: of its frequency curve.
            weight: importance, which multiplies losses.
            known: frequencies were counted and not made up.
        """
        pin = self.frame.limits.pinned(spec.name)
        barred = frozenset(self.frame.limits.forbidden(spec.name))
        data = tuple(getattr(spec, f.name) for f in fields(spec) if f.name != "name")
        key = (data, id(terms), weight, known, pin, barred)
        if key not in self._made:
            self._made[key] = self._make(spec, terms, weight, known, barred)
        made = self._made[key]
        return Menu(spec, terms, weight, made.options, made.choices, made.hull, made.pools, made.refused)

    def _make(self, spec: FeatureSpec, terms: Terms, weight: float, known: bool, barred: frozenset[str]) -> Menu:
        pin = self.frame.limits.pinned(spec.name)
        none = np.zeros(0, np.int64)
        menu = Menu(spec, terms, weight, [], Choices(none, np.zeros(0), none), none, [], {})
        if isinstance(pin, MethodConfig):
            self._add_pinned(menu, pin)
            return menu
        found: dict[Candidate, dict[int, Sized]] = {}
        for candidate in self.frame.candidates:
            name = candidate.name
            if name in barred or (pin is not None and name != pin):
                menu.refused[name] = "it is forbidden" if name in barred else f"{pin!r} is pinned"
                continue
            try:
                for variant in candidate.variants(spec, terms.curve):
                    kept = self._grid(menu, candidate, variant, known)
                    if kept:
                        found[variant] = kept
            except ConfigError as e:
                menu.refused[name] = str(e)
        for name in {c.name for c in found} | {s.candidate.name for s in menu.pools}:
            menu.refused.pop(name, None)
        self._refine(menu, found)
        return menu

    def _grid(self, menu: Menu, candidate: Candidate, variant: Candidate, known: bool) -> dict[int, Sized]:
        """A method at sizes of a coarse grid, without those that are refused; nothing where its tables are shared."""
        spec, terms = menu.spec, menu.terms
        sizes = self._sizes(spec, variant, terms)
        found = [self._sized(spec, variant, terms, s) for s in sizes]
        by_frequency = any(goes_by_frequency(s.program) for s in found)
        if by_frequency and not known and "order" not in (candidate.params or {}):
            menu.refused[candidate.name] = "it goes by frequencies, which no statistics tell"
            return {}
        kept = {}
        for sized in found:
            reason = self._refusal(spec, sized)
            if reason is None:
                kept[sized.size] = sized
            else:
                menu.refused.setdefault(candidate.name, reason)
        if kept and any(t.shared for t in found[0].program.tables):
            menu.pools.append(kept[min(kept)]._replace(candidate=candidate))
            return {}
        return kept

    def _refusal(self, spec: FeatureSpec, sized: Sized) -> str | None:
        return self.frame.limits.refusal(sized.program, sized.parts, spec, self.frame.costs.itemsize)

    def _sizes(self, spec: FeatureSpec, candidate: Candidate, terms: Terms) -> list[int]:
        params = params_of(candidate, terms.curve.ranked)
        top = candidate.info.config_cls.max_size(spec, **params)
        knots = self.frame.knots
        # Sizes far below a ten-thousandth matter only where bytes hardly suffice for a row.
        low = max(1, top >> 14)
        grid = np.unique(np.round(np.geomspace(low, top, knots)).astype(np.int64)) if top > 1 else np.array([1])
        return sorted({1, *grid.tolist()})

    def _sized(self, spec: FeatureSpec, candidate: Candidate, terms: Terms, size: int) -> Sized:
        params = params_of(candidate, terms.curve.ranked)
        config = candidate.info.config_cls.sized(spec, size, **params)
        program = config.program(spec)
        return Sized(
            candidate, size, config, program, factors(program, terms), self.frame.costs.own(config, program, spec)
        )

    def _losses(self, menu: Menu, sized: Sequence[Sized]) -> list[float]:
        """Losses of configurations of private tables."""
        frame, spec, terms = self.frame, menu.spec, menu.terms
        plain = price(terms, [s.parts for s in sized], spec.embedding_dim).tolist()
        penalty = tiny_penalty(menu, frame)
        out = []
        for s, loss in zip(sized, plain, strict=True):
            own = getattr(s.config, "planning_loss", None)
            loss = float(own(spec, terms.curve)) if own is not None else loss
            loss *= menu.weight * frame.factors.get(s.candidate.name, 1.0)
            out.append(loss + penalty * (s.candidate.name != FULL))
        return out

    def _add_pinned(self, menu: Menu, config: MethodConfig) -> None:
        program, candidate = config.program(menu.spec), Candidate(get_method(config.method))
        sized = Sized(
            candidate, 0, config, program, factors(program, menu.terms),
            self.frame.costs.own(config, program, menu.spec),
        )  # fmt: skip
        if any(t.shared for t in program.tables):
            menu.pools.append(sized)
            self._finish(menu, [])
        else:
            self._finish(menu, [Option(candidate, 0, 0, config, sized.cost, self._losses(menu, [sized])[0])])

    def fix(self, menu: Menu, loss: float) -> None:
        """Turn a pinned configuration with shared tables, whose bytes are counted apart, into the only option."""
        sized = menu.pools.pop()
        self._finish(menu, [Option(sized.candidate, 0, 0, sized.config, sized.cost, loss)])

    def _refine(self, menu: Menu, found: dict[Candidate, dict[int, Sized]]) -> None:
        """Look closely at sizes next to the best ones, then fill the gaps between sizes of a method."""
        known: dict[tuple[int, int], float] = {}
        order = list(found)

        def ask(pairs: list[tuple[int, int]]) -> None:
            sized = [found[order[c]][s] for c, s in pairs]
            known.update(zip(pairs, self._losses(menu, sized), strict=True))

        ask([(c, s) for c, candidate in enumerate(order) for s in found[candidate]])
        for _ in range(self.frame.rounds):
            pairs = self._between(menu, found, order, known)
            if not pairs:
                break
            ask(pairs)
        options = []
        for c, candidate in enumerate(order):
            sizes = sorted(found[candidate])
            points = [(s, found[candidate][s].cost, known[c, s]) for s in sizes]
            nexts = [*sizes[1:], sizes[-1]]
            options += [
                Option(candidate, s, high, found[candidate][s].config, cost, loss)
                for (s, cost, loss), high in zip(points, nexts, strict=True)
            ]
            for (s0, c0, l0), (s1, c1, l1) in pairwise(points):
                options += _interpolated(candidate, s0, s1, c0, c1, l0, l1)
        self._finish(menu, options)

    def _between(
        self,
        menu: Menu,
        found: dict[Candidate, dict[int, Sized]],
        order: list[Candidate],
        known: dict[tuple[int, int], float],
    ) -> list[tuple[int, int]]:
        """Sizes halfway between the best ones and their neighbours that were not looked at yet."""
        pairs = list(known)
        choices = reduce_options([found[order[c]][s].cost for c, s in pairs], [known[p] for p in pairs])
        fresh: dict[tuple[int, int], None] = {}
        for i in hull(choices).tolist():
            c, size = pairs[int(choices.names[i])]
            sizes = sorted(found[order[c]])
            at = sizes.index(size)
            for low, high in ((at - 1, at), (at, at + 1)):
                if low < 0 or high >= len(sizes) or sizes[high] - sizes[low] < 2:
                    continue
                if found[order[c]][sizes[high]].cost <= STEP * found[order[c]][sizes[low]].cost:
                    continue
                middle = max(sizes[low] + 1, min(sizes[high] - 1, round(math.sqrt(sizes[low] * sizes[high]))))
                fresh[c, middle] = None
        out = []
        for c, size in fresh:
            sized = self._sized(menu.spec, order[c], menu.terms, size)
            if self._refusal(menu.spec, sized) is None:
                found[order[c]][size] = sized
                out.append((c, size))
        return out

    def _finish(self, menu: Menu, options: list[Option]) -> None:
        menu.options = options
        menu.choices = reduce_options([o.cost for o in options], [o.loss for o in options])
        menu.hull = hull(menu.choices)


def _interpolated(candidate: Candidate, s0: int, s1: int, c0: int, c1: int, l0: float, l1: float) -> list[Option]:
    """Options between two sizes of a method."""
    if s1 - s0 < 2 or c1 <= STEP * c0 or l1 >= l0 or c0 < 1:
        return []
    count = min(s1 - s0, MOST_BETWEEN, math.ceil(math.log(c1 / c0) / math.log(STEP)))
    out = []
    for j in range(1, count):
        cost = round(c0 * (c1 / c0) ** (j / count))
        out.append(Option(candidate, s0, s1, None, cost, l0 + (l1 - l0) * (cost - c0) / (c1 - c0)))
    return out


def size_for(maker: MenuMaker, menu: Menu, option: Option, available: int) -> tuple[MethodConfig, int]:
    """The largest configuration of an option's method whose bytes are at most ``available``, and its bytes.

    Sizes are found by interpolation, since bytes rise almost evenly with them.
    """
    if option.config is not None and option.low == option.high:
        return option.config, option.cost
    sized = {s: maker._sized(menu.spec, option.candidate, menu.terms, s) for s in (option.low, option.high)}
    low, high = option.low, option.high
    if sized[high].cost <= available:
        return sized[high].config, sized[high].cost
    for turn in range(64):
        if high - low < 2:
            break
        span = sized[high].cost - sized[low].cost
        middle = low + int((high - low) * (available - sized[low].cost) / span) if turn % 3 < 2 else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        sized[middle] = maker._sized(menu.spec, option.candidate, menu.terms, middle)
        if sized[middle].cost <= available:
            low = middle
        else:
            high = middle
    return sized[low].config, sized[low].cost
