"""Groups of features that can share tables: each member's loss, given the rows of the tables and the possible members.

The loss of a group is not separable: a member's loss grows with the ids of the other members. An upper bound is
separable: compute every loss as if all features that MAY join had joined. The planner tries nested sets of possible
members, so the bound is exact for the set that joins in full and too high for its subsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.precision import Layout
from recsys_embed.core.program import Table
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.features import MAX_ROWS
from recsys_embed.planning.candidates import Candidate
from recsys_embed.planning.costs import Costs
from recsys_embed.planning.curves import Floats
from recsys_embed.planning.knapsack import Ints
from recsys_embed.planning.loss_estimate import BETWEEN
from recsys_embed.planning.options import (
    FeatureOptions,
    PlanningContext,
    SharedTableOption,
    SizedMethod,
    params_of,
    sharing_penalty,
    tiny_penalty,
)
from recsys_embed.registry import get_method

ROWS = 64
"""Rows that shared tables are priced by, since several may share a scale."""
_AT_ONCE = 1 << 21
"""Elements of the arrays that losses are computed in."""


@dataclass(eq=False)
class TableGroup:
    """Features that can share the tables of one method.

    Attributes:
        candidate: the method with its options.
        tables: the shared tables at their smallest.
        members: positions of the features that may join, those with most to gain first.
        must: how many of them have nothing else to choose.
        unit: bytes of the budget per :data:`ROWS` rows of each shared table.
        block: rows that share a scale; tables have multiples of it.
        least, most: rows that the tables need, and rows beyond which nothing is gained.
        own: int64 [members], bytes that a member adds (projections).
        tiny: [members], whose full table is small enough to be kept.
    """

    candidate: Candidate
    tables: tuple[Table, ...]
    members: list[int]
    must: int
    unit: int
    block: int
    least: int
    most: int
    own: Ints
    tiny: list[bool]
    _load: Floats
    _kernel: Floats
    _value: Floats
    _base: Floats
    _reads: Floats
    _scale: Floats
    _carried: Floats
    _power: Floats
    _chunks: Floats
    _floor: Floats
    _factor: Floats
    _penalty: Floats

    @property
    def name(self) -> str:
        return self.candidate.name

    def rows_within(self, available: int) -> int:
        """Rows of each shared table, at most ``most``, that fit so many bytes."""
        rows = min(self.most, available * ROWS // self.unit)
        return rows - rows % self.block

    @property
    def least_bytes(self) -> int:
        """Bytes of the shared tables at their smallest."""
        return -(-self.unit * self.least // ROWS)

    def losses(self, rows: Floats, allowed: int) -> Floats:
        """Loss of each of the first ``allowed`` members in tables of ``rows`` [R]: [allowed, R]."""
        size = max(1, _AT_ONCE // (allowed * self._load.shape[1]))
        parts = [self._losses(rows[at : at + size], allowed) for at in range(0, len(rows), size)]
        return np.concatenate(parts, 1)

    def _losses(self, rows: Floats, allowed: int) -> Floats:
        load = self._load[:allowed]
        total_load = (self._reads[:allowed, None] * load).sum(0) / len(self.tables)
        met = load + BETWEEN * np.maximum(total_load - load, 0.0)
        exponent = (met / -self._scale[:allowed, None])[:, :, None] / rows
        lost = self._kernel[:allowed] @ np.exp(exponent, out=exponent)
        # In place from here: with a thousand members these are the largest arrays of the planner.
        lost **= self._power[:allowed, None, None]
        lost *= -self._carried[:allowed, None, None]
        lost += 1.0
        lost **= self._chunks[:allowed, None, None]
        lost *= self._base[:allowed, :, None]
        floor = self._floor[:allowed, None, None]
        lost -= floor
        lost /= 1.0 - floor
        np.clip(lost, 0.0, 1.0, out=lost)
        out: Floats = np.einsum("mb,mbr->mr", self._value[:allowed], lost)
        return out * self._factor[:allowed, None] + self._penalty[:allowed, None]


def table_groups(features: Sequence[FeatureOptions], context: PlanningContext, taken: set[str]) -> list[TableGroup]:
    """The groups of features that can share tables, one per candidate method whose tables are shared.

    Args:
        taken: names of shared tables that pinned configurations fix; no other group may use them.
    """
    groups = []
    for candidate in context.candidates:
        found = [(i, j.smallest) for i, m in enumerate(features) for j in m.shared if j.candidate is candidate]
        by_shape: dict[Any, list[tuple[int, SizedMethod]]] = {}
        for i, sized in found:
            shape = tuple((t.name, t.width, t.init) for t in sized.program.tables if t.shared)
            by_shape.setdefault((shape, context.kinds.get(features[i].spec.name)), []).append((i, sized))
        if not by_shape:
            continue
        # Members must agree on the shape of the table. Where features disagree, the largest set of them gets the table.
        members = max(by_shape.values(), key=lambda g: sum(_size(features[i]) for i, _ in g))
        if not taken & {t.name for t in members[0][1].program.tables if t.shared}:
            groups.append(_table_group(candidate, features, members, context))
    return groups


def undominated_groups(groups: Sequence[TableGroup], budget: int) -> list[TableGroup]:
    """The groups without those that the same method at another precision beats at every size within the budget.

    Sizes do not depend on the budget, so that a larger one never leaves fewer groups.
    """
    sizes = [int(2 ** (k / 4)) for k in range(24, 256) if 2 ** (k / 4) <= budget] or [budget]
    curves = []
    for group in groups:
        rows = np.array([float(group.rows_within(size)) for size in sizes])
        fits = rows >= max(group.least, 1)
        losses = np.full(len(sizes), np.inf)
        if fits.any():
            losses[fits] = group.losses(rows[fits], len(group.members)).sum(0)
        curves.append(losses)
    kept: list[TableGroup] = []
    for i, group in enumerate(groups):
        rivals = [j for j, other in enumerate(groups) if j != i and _no_worse(other, curves[j], group, curves[i])]
        if not any((curves[j] < curves[i]).any() or j < i for j in rivals):
            kept.append(group)
    return kept


def _no_worse(a: TableGroup, losses_a: Floats, b: TableGroup, losses_b: Floats) -> bool:
    """Whether a group of the same method and members takes no more bytes per member and loses no more at any size."""
    if (a.name, a.members) != (b.name, b.members):
        return False
    return bool((a.own <= b.own).all() and (losses_a <= losses_b).all())


def _size(feature: FeatureOptions) -> int:
    return feature.spec.num_embeddings * feature.spec.embedding_dim


def _table_group(
    candidate: Candidate,
    features: Sequence[FeatureOptions],
    members: list[tuple[int, SizedMethod]],
    context: PlanningContext,
) -> TableGroup:
    # Features without another option come first, then those with the largest full tables.
    members = sorted(
        members, key=lambda m: (len(features[m[0]].options) > 0, -_size(features[m[0]]), features[m[0]].spec.name)
    )
    bins = max(len(features[i].terms.value) for i, _ in members)
    rows = [_member(features[i], s, bins, context, candidate.name) for i, s in members]
    columns = [np.array([r[j] for r in rows]) for j in range(len(rows[0]))]
    biggest = max((s for _, s in members), key=lambda s: max(t.rows for t in s.program.tables if t.shared))
    tables = tuple(t for t in biggest.program.tables if t.shared)
    unit = sum(context.costs.table(replace(t, rows=ROWS)) for t in tables)
    width = sum(t.width for t in tables)
    most = min(MAX_ROWS, max(1, sum(_size(features[i]) for i, _ in members) // width))
    block = max(Layout.of(t.width, t.precision, rows=ROWS).block for t in tables)
    least = -(-max(t.rows for t in tables) // block) * block
    must = sum(not features[i].options for i, _ in members)
    own = np.array([s.cost for _, s in members], np.int64)
    tiny = [tiny_penalty(features[i], context) > 0 for i, _ in members]
    return TableGroup(
        candidate, tables, [i for i, _ in members], must, unit, block, least, max(least, most), own, tiny, *columns
    )


def _member(
    feature: FeatureOptions, sized: SizedMethod, bins: int, context: PlanningContext, method: str
) -> tuple[Floats | float, ...]:
    """Arrays of one member, in the order of the fields of :class:`TableGroup`."""
    terms, dim = feature.terms, feature.spec.embedding_dim
    tau = terms.width_scale(dim)
    shared = [f for f in sized.spans if f.table is not None]
    base = np.ones(len(terms.value))
    for f in sized.spans:
        if f.table is None:
            kept = terms.kept(np.array([float(f.rows)]), f.shared[None])[0] ** f.power
            base = base * (1 - f.rounded * (1 - np.exp(-f.width / tau)) * (f.private + f.shared * kept))
    gap = bins - len(base)
    reference = max(t.rows for t in sized.program.tables if t.shared)
    width = sum(f.width for f in shared) / len(shared)
    return (
        terms.load,
        np.pad(terms.kernel, ((0, gap), (0, 0))),
        np.pad(terms.value, (0, gap)),
        np.pad(base, (0, gap)),
        sum(f.reads for f in shared),
        sum(f.rows for f in shared) / len(shared) / reference,
        min(f.rounded for f in shared) * (1 - np.exp(-width / tau)),
        sum(f.power for f in shared) / len(shared),
        float(len(shared)),
        np.exp(-dim / tau),
        feature.weight * context.loss_scales.get(method, 1.0),
        tiny_penalty(feature, context) + sharing_penalty(feature, sized.spans, context),
    )


def _of(groups: Sequence[SharedTableOption], candidate: Candidate) -> SharedTableOption:
    return next(j for j in groups if j.candidate is candidate)


def group_configs(
    group: TableGroup, features: Sequence[FeatureOptions], members: Sequence[int], rows: int
) -> dict[str, MethodConfig] | None:
    """Configurations that put ``members`` into one set of tables of at most ``rows`` rows, or None if impossible.

    The method's own :meth:`recsys_embed.core.method_config.MethodConfig.plan` makes them agree on the tables.
    """
    specs = [features[i].spec for i in members]
    params = params_of(group.candidate, ranked=True)
    plain = get_method("full").config_cls.from_params({})
    serve = Costs(None, False)
    small = [_of(features[i].shared, group.candidate).smallest for i in members]
    heads = sum(serve.own(s.config, s.program, features[i].spec) for i, s in zip(members, small, strict=True))
    budget = heads + sum(serve.table(replace(t, rows=rows)) for t in group.tables)
    try:
        configs = group.candidate.info.config_cls.plan(specs, budget, plain, full_below=0, **params)
    except RecsysEmbedError:
        return None
    for spec in specs:
        program = configs[spec.name].program(spec)
        shared = [t for t in program.tables if t.shared]
        if not shared or max(t.rows for t in shared) > rows:
            return None
    return configs
