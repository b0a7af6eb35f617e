"""Options of a feature: a method at a size, with its bytes and what it loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram
from recsys_embed.features import FeatureSpec
from recsys_embed.planning.knapsack import Choices, Ints
from recsys_embed.planning.limits import Candidate, Costs, Limits
from recsys_embed.planning.price import Factor, Terms, factors

FULL = "full"
TINY_PENALTY = 0.05
"""Loss added to options of tiny tables other than plain ones: a twentieth of all that a feature can tell."""


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
        step: largest ratio of the bytes of neighbouring options of a method.
        variants: whether methods are tried with each set of options that they name.
        options: by feature, an option of torch's that its method must support (:class:`Needs`).
        kinds: by feature, what it must have in common with those it shares a table with.
    """

    candidates: Sequence[Candidate]
    costs: Costs
    limits: Limits
    factors: Mapping[str, float] = field(default_factory=dict)
    knots: int = 12
    rounds: int = 3
    step: float = 1.06
    variants: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Any] = field(default_factory=dict)


class Sized(NamedTuple):
    """A method at one size."""

    size: int
    config: MethodConfig
    program: LookupProgram
    parts: list[Factor]
    cost: int


class Sizer:
    """A candidate for one feature, at whatever size is asked for."""

    def __init__(self, candidate: Candidate, spec: FeatureSpec, terms: Terms, costs: Costs) -> None:
        self.candidate, self.spec, self.terms, self.costs = candidate, spec, terms, costs
        self.cls = candidate.info.config_cls
        self.params = params_of(candidate, terms.curve.ranked)
        self._checked = False

    @property
    def name(self) -> str:
        return self.candidate.name

    def top(self) -> int:
        """The largest useful size."""
        return self.cls.max_size(self.spec, **self.params)

    def at(self, size: int) -> Sized:
        """The method at a size in [1, top].

        Raises:
            ConfigError: it does not suit the feature.
        """
        config = self.cls.sized(self.spec, size, **self.params)
        # Checking every size would take half of the time; what is chosen is checked with the plan.
        program = config.build_program(self.spec) if self._checked else config.program(self.spec)
        self._checked = True
        return sized(config, program, self.spec, self.terms, self.costs, size)

    def fitting(self, low: int, high: int, available: int) -> Sized:
        """The largest size in ``[low, high]`` whose bytes are at most ``available``, or ``low``.

        Sizes are found by interpolation, since bytes rise almost evenly with them.
        """
        below, above = self.at(low), self.at(high)
        if above.cost <= available:
            return above
        for turn in range(64):
            if above.size - below.size < 2:
                break
            span = above.size - below.size
            middle = below.size + span // 2
            if turn % 3 < 2:
                middle = below.size + int(span * (available - below.cost) / (above.cost - below.cost))
            found = self.at(min(max(middle, below.size + 1), above.size - 1))
            below, above = (found, above) if found.cost <= available else (below, found)
        return below


def sized(
    config: MethodConfig, program: LookupProgram, spec: FeatureSpec, terms: Terms, costs: Costs, size: int = 0
) -> Sized:
    """A configuration with its factors and bytes."""
    return Sized(size, config, program, factors(program, terms), costs.own(config, program, spec))


class Option(NamedTuple):
    """One way to store a feature, at ``cost`` bytes and ``loss``.

    Args:
        sizer: the method; None for a pinned configuration.
        low, high: sizes between which the option's lies; with ``config`` it is ``low``.
        config: the configuration; None where the option is interpolated.
    """

    sizer: Sizer | None
    low: int
    high: int
    config: MethodConfig | None
    cost: int
    loss: float

    @property
    def method(self) -> str:
        if self.sizer is not None:
            return self.sizer.name
        return "" if self.config is None else self.config.method

    def grown(self, available: int) -> tuple[MethodConfig, int]:
        """Configuration and bytes of the option's method at the size next to it that fits ``available`` bytes.

        ``available`` is at least the option's cost.
        """
        if self.sizer is None or (self.low == self.high and self.config is not None):
            if self.config is None:
                raise RuntimeError("an option without a method needs a configuration")
            return self.config, self.cost
        found = self.sizer.fitting(self.low, self.high, available)
        return found.config, found.cost


class Joinable(NamedTuple):
    """A candidate whose tables are shared, at its smallest, for one feature."""

    candidate: Candidate | None
    sized: Sized


@dataclass
class Menu:
    """Options of a feature.

    Attributes:
        weight: importance of the feature, which multiplies losses.
        options: all that were found; ``choices.names`` are positions in it.
        choices: those that no other beats in both bytes and loss.
        hull: positions in ``choices`` on the lower convex hull.
        pools: shared tables that the feature may join.
        refused: why methods are out of the question, by name.
    """

    spec: FeatureSpec
    terms: Terms
    weight: float
    options: list[Option]
    choices: Choices
    hull: Ints
    pools: list[Joinable]
    refused: dict[str, str]


def params_of(candidate: Candidate, ranked: bool) -> dict[str, Any]:
    """Options of a candidate; a method that goes by frequency and whose ids are not ``ranked`` by it is told so."""
    params, order = dict(candidate.params or {}), candidate.info.config_cls.order_option
    if not ranked and order is not None:
        params.setdefault(order, "counts")
    return params


def goes_by_frequency(program: LookupProgram) -> bool:
    """Whether some ids are treated apart for their frequency."""
    return any(t.by_frequency for p in program.row_lookups for t in p.transforms)


def tiny_penalty(menu: Menu, frame: Frame) -> float:
    """What a feature's options other than a plain table are charged for being that; not 0 for tiny tables only."""
    spec, limits = menu.spec, frame.limits
    if spec.num_embeddings >= limits.full_below or limits.pinned(spec.name) is not None or FULL in menu.refused:
        return 0.0
    return TINY_PENALTY * menu.weight if any(c.name == FULL for c in frame.candidates) else 0.0


def tiny_bytes(menus: Sequence[Menu], frame: Frame) -> int:
    """Bytes of the plain tables of all tiny features."""
    return sum(o.cost for m in menus if tiny_penalty(m, frame) for o in m.options if o.method == FULL)
