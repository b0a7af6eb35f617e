"""Options of a feature: a method at a size, with bytes and estimated loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import raise_faults
from recsys_embed.features import FeatureSpec
from recsys_embed.planning.candidates import Candidate
from recsys_embed.planning.costs import Costs
from recsys_embed.planning.knapsack import Choices, Ints
from recsys_embed.planning.limits import Limits
from recsys_embed.planning.loss_estimate import ColumnSpan, CurveTerms, column_spans
from recsys_embed.planning.rounding import signal_kept

FULL = "full"
TINY_PENALTY = 0.05
"""Loss added to compressed options of tiny tables: a twentieth of a feature's whole signal."""
RARE = 0.05
"""Share of a feature's signal that ids too rare to own rows may hold, where no network tells ids of one row apart."""


@dataclass(frozen=True)
class PlanningContext:
    """Settings that all features of a plan have in common.

    Args:
        candidates: methods to consider.
        costs: the rules that bytes are counted by.
        limits: limits on options besides the budget.
        loss_scales: by method, a factor on its losses (:mod:`recsys_embed.planning.calibration`).
        grid_points: sizes per method on the coarse grid.
        rounds: number of refinements of the grid.
        step: largest ratio of the bytes of neighbouring options of a method.
        variants: whether to try each of a method's planning variants.
        options: by feature, a torch option that its method must support (:class:`ModelConstraints`).
        kinds: by feature, the device, dtype and so on that features of one shared table must agree on.
        equal_row_widths: features whose rows should have one width, whatever the popularity of their ids.
        sharing_penalty: loss added to options whose ids share rows that no network tells apart: as much as all such
            features can lose, so that plans resort to it only where bytes do not suffice for a number per id.
    """

    candidates: Sequence[Candidate]
    costs: Costs
    limits: Limits
    loss_scales: Mapping[str, float] = field(default_factory=dict)
    grid_points: int = 12
    rounds: int = 3
    step: float = 1.06
    variants: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Any] = field(default_factory=dict)
    equal_row_widths: Collection[str] = ()
    sharing_penalty: float = 0.0


class SizedMethod(NamedTuple):
    """A method at one size."""

    size: int
    config: MethodConfig
    program: LookupProgram
    spans: list[ColumnSpan]
    cost: int


class ResizableMethod:
    """A candidate method for one feature, at any size.

    Args:
        other: the same method at another precision. What it finds at a size is taken from there, since precisions
            differ in bytes and losses only.
    """

    def __init__(
        self,
        candidate: Candidate,
        spec: FeatureSpec,
        terms: CurveTerms,
        costs: Costs,
        other: ResizableMethod | None = None,
    ) -> None:
        self.candidate, self.spec, self.terms, self.costs = candidate, spec, terms, costs
        self.cls = candidate.info.config_cls
        self.params = params_of(candidate, terms.curve.ranked)
        self._other = other
        self._checked = False
        # Sizes that other precisions asked for too, as long as options are enumerated.
        self.found: dict[int, SizedMethod] = {}

    @property
    def name(self) -> str:
        return self.candidate.name

    def top(self) -> int:
        """The largest useful size."""
        return self.cls.max_size(self.spec, **self.params)

    def at(self, size: int) -> SizedMethod:
        """The method at a size in [1, top].

        Raises:
            ConfigError: it does not suit the feature.
        """
        if self._other is not None:
            others = self._other.found
            if size not in others:
                others[size] = self._other.at(size)
            return self.rounded(others[size])
        if size in self.found:
            return self.found[size]
        config = self.cls.sized(self.spec, size, **self.params)
        # Checking every size would take half of the time; the chosen configurations are checked with the plan.
        program = config.unchecked_program(self.spec) if self._checked else config.program(self.spec)
        self._checked = True
        return sized_method(config, program, self.spec, self.terms, self.costs, size)

    def rounded(self, found: SizedMethod) -> SizedMethod:
        """What the method at another precision found, at this one.

        Raises:
            ConfigError: the method has no rows to round.
        """
        precision = self.candidate.precision
        # Copied, because to check its options again would take as long as to find the size.
        config: MethodConfig = object.__new__(type(found.config))
        config.__dict__.update(found.config.__dict__, precision=precision)
        if not self._checked:
            raise_faults(config.check(self.spec), f"{type(config).__name__}, feature {self.spec.name!r}")
            self._checked = True
        # Its program stays as it was found: limits look at rows and widths alone.
        program, without_network = found.program, self.terms.without_network
        columns = program.of_one_id.width
        kept = {signal_kept(t, without_network, precision, columns=columns) for t in program.tables if not t.dense}
        if len(kept) == 1 and len(found.spans) == len(program.row_lookups):
            share = kept.pop()
            spans = [f._replace(rounded=share) for f in found.spans]
        else:
            spans = column_spans(program.at_precision(precision), self.terms)
        cost = self.costs.own_at(precision, found.cost, config, program, self.spec)
        return SizedMethod(found.size, config, program, spans, cost)

    def fitting(self, low: int, high: int, available: int) -> SizedMethod:
        """The largest size in ``[low, high]`` whose bytes are at most ``available``, or ``low``.

        Bytes grow almost linearly with the size: two steps of interpolation search, then one of bisection, in turn.
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


def sized_method(
    config: MethodConfig, program: LookupProgram, spec: FeatureSpec, terms: CurveTerms, costs: Costs, size: int = 0
) -> SizedMethod:
    """A configuration with its column spans and bytes."""
    return SizedMethod(size, config, program, column_spans(program, terms), costs.own(config, program, spec))


class Option(NamedTuple):
    """One way to store a feature, at ``cost`` bytes and ``loss``.

    Args:
        resizable: the method at any size; None for a pinned configuration.
        low, high: sizes between which the option's lies; with ``config`` it is ``low``.
        config: the configuration; None where the option is interpolated.
    """

    resizable: ResizableMethod | None
    low: int
    high: int
    config: MethodConfig | None
    cost: int
    loss: float

    @property
    def method(self) -> str:
        if self.resizable is not None:
            return self.resizable.name
        return "" if self.config is None else self.config.method

    def grown(self, available: int) -> tuple[MethodConfig, int]:
        """Configuration and bytes of the method at the largest size of this option that fits ``available`` bytes.

        ``available`` is at least the option's cost.
        """
        if self.resizable is None or (self.low == self.high and self.config is not None):
            if self.config is None:
                raise RuntimeError("an option without a method needs a configuration")
            return self.config, self.cost
        found = self.resizable.fitting(self.low, self.high, available)
        return found.config, found.cost


class SharedTableOption(NamedTuple):
    """A candidate method whose tables are shared, at its smallest size, for one feature."""

    candidate: Candidate | None
    smallest: SizedMethod


@dataclass
class FeatureOptions:
    """Options of a feature.

    Attributes:
        weight: importance of the feature, which multiplies losses.
        options: all that were enumerated; ``choices.names`` are positions in this list.
        choices: the options on the Pareto front of bytes and loss.
        hull: positions in ``choices`` on the lower convex hull.
        shared: options to share tables with other features.
        refused: by method, why it has no option.
    """

    spec: FeatureSpec
    terms: CurveTerms
    weight: float
    options: list[Option]
    choices: Choices
    hull: Ints
    shared: list[SharedTableOption]
    refused: dict[str, str]


def params_of(candidate: Candidate, ranked: bool) -> dict[str, Any]:
    """Options of a candidate; where ids are not ``ranked`` by frequency, methods that need ranks read counts."""
    params, order = dict(candidate.params or {}), candidate.info.config_cls.order_option
    if not ranked and order is not None:
        params.setdefault(order, "counts")
    if candidate.precision != "fp32":
        params.setdefault("precision", candidate.precision)
    return params


def goes_by_frequency(program: LookupProgram) -> bool:
    """Whether the lookup treats some ids differently because of their frequency."""
    return any(t.by_frequency for p in program.row_lookups for t in p.transforms)


def tiny_penalty(feature: FeatureOptions, context: PlanningContext) -> float:
    """Loss added to every option but the full table; not 0 for tiny tables only."""
    spec, limits = feature.spec, context.limits
    if spec.num_embeddings >= limits.full_below or limits.pinned(spec.name) is not None or FULL in feature.refused:
        return 0.0
    return TINY_PENALTY * feature.weight if any(c.name == FULL for c in context.candidates) else 0.0


def sharing_penalty(feature: FeatureOptions, spans: Sequence[ColumnSpan], context: PlanningContext) -> float:
    """Loss added to an option whose ids share rows that no network tells apart, rare ids aside."""
    terms = feature.terms
    if not terms.without_network:
        return 0.0
    own = np.maximum.reduce([f.private for f in spans])
    shares = float(((1 - own) * terms.value).sum()) > RARE * float(terms.value.sum())
    return context.sharing_penalty * feature.weight if shares else 0.0


def tiny_bytes(features: Sequence[FeatureOptions], context: PlanningContext) -> int:
    """Bytes of the full tables of all tiny features."""
    return sum(o.cost for m in features if tiny_penalty(m, context) for o in m.options if o.method == FULL)
