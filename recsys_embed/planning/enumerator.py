"""Enumerates the options of each feature: every method at many sizes, with bytes and estimated loss.

A coarse grid of sizes comes first; the grid is then refined next to the options on the lower convex hull of bytes and
loss, which are the ones a plan may choose. Between two neighbouring sizes of a method, options are interpolated
linearly. Loss is nearly convex in bytes, so the chord overestimates it. An interpolated option that is chosen is sized
to its bytes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.planning.candidates import Candidate
from recsys_embed.planning.knapsack import Choices, hull, reduce_options
from recsys_embed.planning.loss_estimate import CurveTerms, estimate_loss
from recsys_embed.planning.options import (
    FULL,
    FeatureOptions,
    Option,
    PlanningContext,
    ResizableMethod,
    SharedTableOption,
    SizedMethod,
    goes_by_frequency,
    sharing_penalty,
    sized_method,
    tiny_penalty,
)
from recsys_embed.planning.rounding import tiers_can_pay

MOST_MULTIPLES = 32
MOST_BETWEEN = 24
"""Most options interpolated between two sizes."""


class OptionEnumerator:
    """Enumerates options; features that differ only in their names share one list."""

    def __init__(self, context: PlanningContext) -> None:
        self.context = context
        self._made: dict[object, FeatureOptions] = {}
        self._at_first_precision: dict[tuple[str, int], list[tuple[ResizableMethod, dict[int, SizedMethod]]]] = {}

    def enumerate(self, spec: FeatureSpec, terms: CurveTerms, weight: float, unordered: str | None) -> FeatureOptions:
        """Options of ``spec``.

        Args:
            terms: of its frequency curve.
            weight: importance, which multiplies losses.
            unordered: why nothing says which ids are frequent, if so; methods that treat these apart are then left out.
        """
        pin = self.context.limits.pinned(spec.name)
        barred = frozenset(self.context.limits.forbidden(spec.name))
        data = tuple(getattr(spec, f.name) for f in fields(spec) if f.name != "name")
        option, kind = self.context.options.get(spec.name), self.context.kinds.get(spec.name)
        key = (
            data,
            id(terms),
            weight,
            unordered,
            pin,
            barred,
            option,
            kind,
            spec.name in self.context.equal_row_widths,
        )
        if key not in self._made:
            none = np.zeros(0, np.int64)
            made = FeatureOptions(spec, terms, weight, [], Choices(none, np.zeros(0), none), none, [], {})
            if isinstance(pin, MethodConfig):
                self._pin(made, pin)
            else:
                self._fill(made, unordered, pin, barred, option)
            self._made[key] = made
        return replace(self._made[key], spec=spec)

    def _pin(self, feature: FeatureOptions, config: MethodConfig) -> None:
        """The one option of a pinned configuration: private tables, or shared tables of fixed size."""
        only = sized_method(config, config.program(feature.spec), feature.spec, feature.terms, self.context.costs)
        if any(t.shared for t in only.program.tables):
            feature.shared.append(SharedTableOption(None, only))
        else:
            pin_option(feature, only, self._losses(feature, [only], config.method)[0])

    def _fill(
        self,
        feature: FeatureOptions,
        unordered: str | None,
        pin: str | None,
        barred: frozenset[str],
        option: str | None,
    ) -> None:
        found: list[tuple[ResizableMethod, dict[int, SizedMethod]]] = []
        self._at_first_precision.clear()
        for candidate in self.context.candidates:
            name = candidate.name
            if name in barred or (pin is not None and name != pin):
                feature.refused[name] = "it is forbidden" if name in barred else f"{pin!r} is pinned"
                continue
            if option is not None and not candidate.info.embedding_cls.supports_torch_options:
                feature.refused[name] = f"it does not support the `{option}` of the model's table"
                continue
            about = feature.spec.embedding_dim, feature.terms.without_network
            if candidate.menu and not candidate.asked and not tiers_can_pay(candidate.menu, *about):
                feature.refused[name] = "its tiers can keep little more than rows of one precision"
                continue
            try:
                for resizable, kept in self._variants(feature, candidate, unordered):
                    found += [(resizable, kept)] if kept else []
            except ConfigError as e:
                feature.refused[name] = str(e)
        used = {resizable.name for resizable, _ in found} | {j.candidate.name for j in feature.shared if j.candidate}
        feature.refused = {name: why for name, why in feature.refused.items() if name not in used}
        self._refine(feature, found)
        for resizable, _ in found:
            resizable.found.clear()

    def _variants(
        self, feature: FeatureOptions, candidate: Candidate, unordered: str | None
    ) -> Iterator[tuple[ResizableMethod, dict[int, SizedMethod]]]:
        """A candidate with each set of options, at the sizes of a coarse grid; other precisions use the same grid."""
        spec, terms, costs = feature.spec, feature.terms, self.context.costs
        method = candidate.name, id(candidate.params)
        first = self._at_first_precision.get(method)
        if first is not None:
            for resizable, kept in first:
                rounded = replace(resizable.candidate, precision=candidate.precision)
                one = ResizableMethod(rounded, spec, terms, costs, resizable)
                yield one, {size: one.rounded(at) for size, at in kept.items()}
            return
        variants = candidate.variants(spec, terms.curve, terms.without_network, self.context.variants)
        if candidate.params is None and spec.name in self.context.equal_row_widths:
            variants = [v for v in variants if not self._mixes_widths(v, feature)]
            if not variants:
                feature.refused[candidate.name] = (
                    "its ids have rows of several widths, which no network brings together"
                )
        made = []
        for variant in variants:
            resizable = ResizableMethod(variant, spec, terms, costs)
            made.append((resizable, self._grid(feature, candidate, resizable, unordered)))
            yield made[-1]
        # Rows that train in few bits are laid out by their own rules.
        trains = "quantization" in (candidate.params or {})
        if not trains and not any(s.candidate is candidate for s in feature.shared):
            self._at_first_precision[method] = made

    def _grid(
        self, feature: FeatureOptions, candidate: Candidate, resizable: ResizableMethod, unordered: str | None
    ) -> dict[int, SizedMethod]:
        """A method at the allowed sizes of a coarse grid; empty where its tables are shared."""
        sizes = _grid_sizes(resizable.top(), self.context.grid_points, self.context.limits.width_multiple)
        first = resizable.at(sizes[0])
        shared = any(t.shared for t in first.program.tables)
        kept = {}
        for found in (first, *(resizable.at(s) for s in sizes[1:] if not shared)):
            asked = candidate.info.config_cls.order_option in (candidate.params or {})
            if unordered is not None and not asked and goes_by_frequency(found.program):
                feature.refused[candidate.name] = unordered
                return {}
            reason = self._refusal(feature.spec, found)
            if reason is None:
                kept[found.size] = found
            else:
                feature.refused.setdefault(candidate.name, reason)
        if shared and kept:
            feature.shared.append(SharedTableOption(candidate, first))
            return {}
        return kept

    def _mixes_widths(self, variant: Candidate, feature: FeatureOptions) -> bool:
        """Whether ids get rows of several widths, which one size in the middle shows."""
        resizable = ResizableMethod(variant, feature.spec, feature.terms, self.context.costs)
        program = resizable.at(max(1, resizable.top() // 2)).program
        # Slices that a vector is computed from are of several widths for all ids alike.
        return not program.generates and len({program.table(p.table).width for p in program.row_lookups}) > 1

    def _refusal(self, spec: FeatureSpec, found: SizedMethod) -> str | None:
        return self.context.limits.refusal(found.program, found.spans, spec, self.context.costs.itemsize)

    def _losses(self, feature: FeatureOptions, found: Sequence[SizedMethod], method: str) -> list[float]:
        return losses_of(feature, found, [method] * len(found), self.context)

    def _refine(self, feature: FeatureOptions, found: list[tuple[ResizableMethod, dict[int, SizedMethod]]]) -> None:
        """Refine the grid next to the best sizes, then interpolate between sizes of a method."""
        known: dict[tuple[int, int], float] = {}
        pairs = [(c, s) for c, (_, kept) in enumerate(found) for s in kept]
        for turn in range(self.context.rounds + 1):
            names = [found[c][0].name for c, _ in pairs]
            known.update(
                zip(pairs, losses_of(feature, [found[c][1][s] for c, s in pairs], names, self.context), strict=True)
            )
            pairs = self._between(feature, found, known) if turn < self.context.rounds else []
            if not pairs:
                break
        options = []
        pairs = list(known)
        best = reduce_options([found[c][1][s].cost for c, s in pairs], [known[p] for p in pairs])
        good = {pairs[i] for i in best.names.tolist()}
        for c, (resizable, kept) in enumerate(found):
            points = [Option(resizable, s, s, kept[s].config, kept[s].cost, known[c, s]) for s in sorted(kept)]
            options += points[-1:]
            for a, b in pairwise(points):
                between = self._allowed_between(feature, kept[a.low], kept[b.low])
                options.append(a._replace(high=b.low) if between else a)
                # Between two dominated sizes, an option that is not dominated is unlikely.
                if between and ((c, a.low) in good or (c, b.low) in good):
                    options += _interpolated(a, b, self.context.step)
        set_options(feature, options)

    def _allowed_between(self, feature: FeatureOptions, a: SizedMethod, b: SizedMethod) -> bool:
        """Whether all sizes between two allowed sizes are allowed as well, and their losses lie between."""
        if sharing_penalty(feature, a.spans, self.context) != sharing_penalty(feature, b.spans, self.context):
            return False
        if self.context.limits.width_multiple == 1:
            return True
        return [t.width for t in a.program.tables] == [t.width for t in b.program.tables]

    def _between(
        self,
        feature: FeatureOptions,
        found: list[tuple[ResizableMethod, dict[int, SizedMethod]]],
        known: dict[tuple[int, int], float],
    ) -> list[tuple[int, int]]:
        """New sizes: geometric means of hull sizes and their neighbours."""
        pairs = list(known)
        choices = reduce_options([found[c][1][s].cost for c, s in pairs], [known[p] for p in pairs])
        fresh: dict[tuple[int, int], None] = {}
        for i in hull(choices).tolist():
            c, size = pairs[int(choices.names[i])]
            kept = found[c][1]
            sizes = sorted(kept)
            at = sizes.index(size)
            for low, high in pairwise(sizes[max(0, at - 1) : at + 2]):
                if high - low > 1 and kept[high].cost > self.context.step * kept[low].cost:
                    fresh[c, max(low + 1, min(high - 1, round(math.sqrt(low * high))))] = None
        out = []
        for c, size in fresh:
            one = found[c][0].at(size)
            if self._refusal(feature.spec, one) is None:
                found[c][1][size] = one
                out.append((c, size))
        return out


def losses_of(
    feature: FeatureOptions, found: Sequence[SizedMethod], methods: Sequence[str], context: PlanningContext
) -> list[float]:
    """Losses of configurations with tables of their own, weighted by importance and calibration."""
    terms, spec = feature.terms, feature.spec
    plain = estimate_loss(terms, [s.spans for s in found], spec.embedding_dim).tolist()
    penalty = tiny_penalty(feature, context)
    out = []
    for one, method, loss in zip(found, methods, plain, strict=True):
        own = one.config.planning_loss(spec, terms.curve)
        extra = penalty * (method != FULL) + (sharing_penalty(feature, one.spans, context) if own is None else 0.0)
        out.append(
            (loss if own is None else float(own)) * feature.weight * context.loss_scales.get(method, 1.0) + extra
        )
    return out


def pin_option(feature: FeatureOptions, only: SizedMethod, loss: float) -> None:
    """Make a configuration the only option of a feature."""
    feature.shared = []
    set_options(feature, [Option(None, 0, 0, only.config, only.cost, loss)])


def set_options(feature: FeatureOptions, options: list[Option]) -> None:
    """Make ``options`` all that a feature can be stored as with tables of its own."""
    feature.options = options
    feature.choices = reduce_options([o.cost for o in options], [o.loss for o in options])
    feature.hull = hull(feature.choices)


def _grid_sizes(top: int, grid_points: int, multiple: int) -> list[int]:
    """Sizes in a geometric sequence up to ``top``, and 1; all, or all multiples, where these are few.

    Sizes far below a ten-thousandth matter only where bytes hardly suffice for a row.
    """
    if top <= grid_points:
        return list(range(1, top + 1))
    low = max(1, top >> 14)
    ratio = (top / low) ** (1 / max(1, grid_points - 1))
    # Where sizes are widths, only multiples may be left.
    whole = range(multiple, top + 1, multiple) if 1 < multiple <= top <= MOST_MULTIPLES * multiple else ()
    return sorted({1, top, *whole, *(min(top, round(low * ratio**j)) for j in range(grid_points))})


def _interpolated(a: Option, b: Option, step: float) -> list[Option]:
    """Options between two sizes of a method."""
    if b.low - a.low < 2 or b.cost <= step * a.cost or b.loss >= a.loss or a.cost < 1:
        return []
    count = min(b.low - a.low, MOST_BETWEEN, math.ceil(math.log(b.cost / a.cost) / math.log(step)))
    out = []
    for j in range(1, count):
        cost = round(a.cost * (b.cost / a.cost) ** (j / count))
        part = (cost - a.cost) / (b.cost - a.cost)
        out.append(Option(a.resizable, a.low, b.low, None, cost, a.loss + (b.loss - a.loss) * part))
    return out
