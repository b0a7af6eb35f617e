"""The options of one feature: every method at many sizes, each with its bytes and what it loses.

Sizes are looked at on a coarse grid first and then more closely where they might be chosen: next to the options on the
lower convex hull of bytes and loss. Between two sizes of one method options are interpolated; their losses lie on the
chord, above a convex curve, and whoever chooses one sizes the method to its bytes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.planning.knapsack import Choices, hull, reduce_options
from recsys_embed.planning.limits import Candidate
from recsys_embed.planning.options import (
    FULL,
    Frame,
    Joinable,
    Menu,
    Option,
    Sized,
    Sizer,
    goes_by_frequency,
    sized,
    tiny_penalty,
)
from recsys_embed.planning.price import Terms, price

MOST_MULTIPLES = 32
MOST_BETWEEN = 24
"""Options interpolated between two sizes, at most."""


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
        option, kind = self.frame.options.get(spec.name), self.frame.kinds.get(spec.name)
        key = (data, id(terms), weight, known, pin, barred, option, kind)
        if key not in self._made:
            none = np.zeros(0, np.int64)
            made = Menu(spec, terms, weight, [], Choices(none, np.zeros(0), none), none, [], {})
            if isinstance(pin, MethodConfig):
                self._pin(made, pin)
            else:
                self._fill(made, known, pin, barred, option)
            self._made[key] = made
        return replace(self._made[key], spec=spec)

    def _pin(self, menu: Menu, config: MethodConfig) -> None:
        """One option, or a table to join that is of one size."""
        only = sized(config, config.program(menu.spec), menu.spec, menu.terms, self.frame.costs)
        if any(t.shared for t in only.program.tables):
            menu.pools.append(Joinable(None, only))
        else:
            fix(menu, only, self._losses(menu, [only], config.method)[0])

    def _fill(self, menu: Menu, known: bool, pin: str | None, barred: frozenset[str], option: str | None) -> None:
        found: list[tuple[Sizer, dict[int, Sized]]] = []
        for candidate in self.frame.candidates:
            name = candidate.name
            if name in barred or (pin is not None and name != pin):
                menu.refused[name] = "it is forbidden" if name in barred else f"{pin!r} is pinned"
                continue
            if option is not None and not candidate.info.embedding_cls.supports_torch_options:
                menu.refused[name] = f"it does not support the `{option}` of the model's table"
                continue
            try:
                variants = candidate.variants(menu.spec, menu.terms.curve) if self.frame.variants else [candidate]
                for variant in variants:
                    sizer = Sizer(variant, menu.spec, menu.terms, self.frame.costs)
                    kept = self._grid(menu, candidate, sizer, known)
                    found += [(sizer, kept)] if kept else []
            except ConfigError as e:
                menu.refused[name] = str(e)
        used = {sizer.name for sizer, _ in found} | {j.candidate.name for j in menu.pools if j.candidate}
        menu.refused = {name: why for name, why in menu.refused.items() if name not in used}
        self._refine(menu, found)

    def _grid(self, menu: Menu, candidate: Candidate, sizer: Sizer, known: bool) -> dict[int, Sized]:
        """A method at sizes of a coarse grid, without those that are refused; nothing where its tables are shared."""
        sizes = _grid_sizes(sizer.top(), self.frame.knots, self.frame.limits.width_multiple)
        first = sizer.at(sizes[0])
        shared = any(t.shared for t in first.program.tables)
        kept = {}
        for found in (first, *(sizer.at(s) for s in sizes[1:] if not shared)):
            asked = candidate.info.config_cls.order_option in (candidate.params or {})
            if not known and not asked and goes_by_frequency(found.program):
                menu.refused[candidate.name] = "it goes by frequencies, which no statistics tell"
                return {}
            reason = self._refusal(menu.spec, found)
            if reason is None:
                kept[found.size] = found
            else:
                menu.refused.setdefault(candidate.name, reason)
        if shared and kept:
            menu.pools.append(Joinable(candidate, first))
            return {}
        return kept

    def _refusal(self, spec: FeatureSpec, found: Sized) -> str | None:
        return self.frame.limits.refusal(found.program, found.parts, spec, self.frame.costs.itemsize)

    def _losses(self, menu: Menu, found: Sequence[Sized], method: str) -> list[float]:
        return losses_of(menu, found, [method] * len(found), self.frame)

    def _refine(self, menu: Menu, found: list[tuple[Sizer, dict[int, Sized]]]) -> None:
        """Look closely at sizes next to the best ones, then fill the gaps between sizes of a method."""
        known: dict[tuple[int, int], float] = {}
        pairs = [(c, s) for c, (_, kept) in enumerate(found) for s in kept]
        for turn in range(self.frame.rounds + 1):
            names = [found[c][0].name for c, _ in pairs]
            known.update(
                zip(pairs, losses_of(menu, [found[c][1][s] for c, s in pairs], names, self.frame), strict=True)
            )
            pairs = self._between(menu, found, known) if turn < self.frame.rounds else []
            if not pairs:
                break
        options = []
        pairs = list(known)
        best = reduce_options([found[c][1][s].cost for c, s in pairs], [known[p] for p in pairs])
        good = {pairs[i] for i in best.names.tolist()}
        for c, (sizer, kept) in enumerate(found):
            points = [Option(sizer, s, s, kept[s].config, kept[s].cost, known[c, s]) for s in sorted(kept)]
            options += points[-1:]
            for a, b in pairwise(points):
                between = self._allowed_between(kept[a.low], kept[b.low])
                options.append(a._replace(high=b.low) if between else a)
                # Between two sizes that others beat there is hardly one that others do not.
                if between and ((c, a.low) in good or (c, b.low) in good):
                    options += _interpolated(a, b, self.frame.step)
        _finish(menu, options)

    def _allowed_between(self, a: Sized, b: Sized) -> bool:
        """Whether all sizes between two that are allowed are allowed too."""
        if self.frame.limits.width_multiple == 1:
            return True
        return [t.width for t in a.program.tables] == [t.width for t in b.program.tables]

    def _between(
        self, menu: Menu, found: list[tuple[Sizer, dict[int, Sized]]], known: dict[tuple[int, int], float]
    ) -> list[tuple[int, int]]:
        """Sizes halfway between the best ones and their neighbours that were not looked at yet."""
        pairs = list(known)
        choices = reduce_options([found[c][1][s].cost for c, s in pairs], [known[p] for p in pairs])
        fresh: dict[tuple[int, int], None] = {}
        for i in hull(choices).tolist():
            c, size = pairs[int(choices.names[i])]
            kept = found[c][1]
            sizes = sorted(kept)
            at = sizes.index(size)
            for low, high in pairwise(sizes[max(0, at - 1) : at + 2]):
                if high - low > 1 and kept[high].cost > self.frame.step * kept[low].cost:
                    fresh[c, max(low + 1, min(high - 1, round(math.sqrt(low * high))))] = None
        out = []
        for c, size in fresh:
            one = found[c][0].at(size)
            if self._refusal(menu.spec, one) is None:
                found[c][1][size] = one
                out.append((c, size))
        return out


def losses_of(menu: Menu, found: Sequence[Sized], methods: Sequence[str], frame: Frame) -> list[float]:
    """Losses of configurations with tables of their own, importance and evidence included."""
    terms, spec = menu.terms, menu.spec
    plain = price(terms, [s.parts for s in found], spec.embedding_dim).tolist()
    penalty = tiny_penalty(menu, frame)
    out = []
    for one, method, loss in zip(found, methods, plain, strict=True):
        own = one.config.planning_loss(spec, terms.curve)
        loss = loss if own is None else float(own)
        out.append(loss * menu.weight * frame.factors.get(method, 1.0) + penalty * (method != FULL))
    return out


def fix(menu: Menu, only: Sized, loss: float) -> None:
    """Make a configuration the only option of a feature."""
    menu.pools = []
    _finish(menu, [Option(None, 0, 0, only.config, only.cost, loss)])


def _finish(menu: Menu, options: list[Option]) -> None:
    menu.options = options
    menu.choices = reduce_options([o.cost for o in options], [o.loss for o in options])
    menu.hull = hull(menu.choices)


def _grid_sizes(top: int, knots: int, multiple: int) -> list[int]:
    """Sizes in a geometric row up to ``top``, and 1; all, or all multiples, where these are few.

    Sizes far below a ten-thousandth matter only where bytes hardly suffice for a row.
    """
    if top <= knots:
        return list(range(1, top + 1))
    low = max(1, top >> 14)
    ratio = (top / low) ** (1 / max(1, knots - 1))
    # Where sizes are widths, only multiples may be left.
    whole = range(multiple, top + 1, multiple) if 1 < multiple <= top <= MOST_MULTIPLES * multiple else ()
    return sorted({1, top, *whole, *(min(top, round(low * ratio**j)) for j in range(knots))})


def _interpolated(a: Option, b: Option, step: float) -> list[Option]:
    """Options between two sizes of a method."""
    if b.low - a.low < 2 or b.cost <= step * a.cost or b.loss >= a.loss or a.cost < 1:
        return []
    count = min(b.low - a.low, MOST_BETWEEN, math.ceil(math.log(b.cost / a.cost) / math.log(step)))
    out = []
    for j in range(1, count):
        cost = round(a.cost * (b.cost / a.cost) ** (j / count))
        part = (cost - a.cost) / (b.cost - a.cost)
        out.append(Option(a.sizer, a.low, b.low, None, cost, a.loss + (b.loss - a.loss) * part))
    return out
