"""Tables that several features share: what joining one loses, as a function of its rows and of who else may join.

A pool is not separable: a member's loss grows with the others in the table. It becomes so when everybody is priced as
if all features that MAY join had done so. The planner goes through nested sets of features that may, largest first, so
the price is right for one of them and errs to the cautious side for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Table
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.features import MAX_ROWS
from recsys_embed.planning.curves import Floats
from recsys_embed.planning.knapsack import Ints
from recsys_embed.planning.limits import Candidate, Costs
from recsys_embed.planning.options import Frame, Joinable, Menu, Sized, tiny_penalty
from recsys_embed.planning.price import BETWEEN, width_scale
from recsys_embed.registry import get_method

_AT_ONCE = 1 << 21
"""Elements of the arrays that losses are computed in."""


@dataclass(eq=False)
class Pool:
    """Features that can share the tables of one method.

    Attributes:
        candidate: the method with its options.
        tables: the shared tables at their smallest.
        members: positions of the features that may join, those with most to gain first.
        must: how many of them have nothing else to choose.
        unit: bytes of the budget per row of each shared table.
        least, most: rows that the tables need, and rows beyond which nothing is gained.
        own: int64 [members], bytes that a member adds (projections).
        tiny: [members], whose plain table is small enough to be kept.
    """

    candidate: Candidate
    tables: tuple[Table, ...]
    members: list[int]
    must: int
    unit: int
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

    def losses(self, rows: Floats, allowed: int) -> Floats:
        """Loss of each of the first ``allowed`` members in tables of ``rows`` [R]: [allowed, R]."""
        size = max(1, _AT_ONCE // (allowed * self._load.shape[1]))
        parts = [self._losses(rows[at : at + size], allowed) for at in range(0, len(rows), size)]
        return np.concatenate(parts, 1)

    def _losses(self, rows: Floats, allowed: int) -> Floats:
        load = self._load[:allowed]
        everybody = (self._reads[:allowed, None] * load).sum(0) / len(self.tables)
        met = load + BETWEEN * np.maximum(everybody - load, 0.0)
        exponent = (met / -self._scale[:allowed, None])[:, :, None] / rows
        lost = self._kernel[:allowed] @ np.exp(exponent, out=exponent)
        # In place from here: with a thousand members these are the planner's largest arrays.
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


def pools_of(menus: Sequence[Menu], frame: Frame, taken: set[str]) -> list[Pool]:
    """The pools that features can join, one per candidate method whose tables are shared.

    Args:
        taken: names of shared tables that pinned configurations fix; no pool may use them.
    """
    pools = []
    for candidate in frame.candidates:
        found = [(i, j.sized) for i, m in enumerate(menus) for j in m.pools if j.candidate is candidate]
        groups: dict[Any, list[tuple[int, Sized]]] = {}
        for i, sized in found:
            shape = tuple((t.name, t.width, t.init) for t in sized.program.tables if t.shared)
            groups.setdefault((shape, frame.kinds.get(menus[i].spec.name)), []).append((i, sized))
        if not groups:
            continue
        # Features that would shape the table otherwise cannot share it; the group with most to store gets it.
        members = max(groups.values(), key=lambda g: sum(_size(menus[i]) for i, _ in g))
        if not taken & {t.name for t in members[0][1].program.tables if t.shared}:
            pools.append(_pool(candidate, menus, members, frame))
    return pools


def _size(menu: Menu) -> int:
    return menu.spec.num_embeddings * menu.spec.embedding_dim


def _pool(candidate: Candidate, menus: Sequence[Menu], members: list[tuple[int, Sized]], frame: Frame) -> Pool:
    # Who can do nothing else comes first, then whoever has most to store.
    members = sorted(members, key=lambda m: (len(menus[m[0]].options) > 0, -_size(menus[m[0]]), menus[m[0]].spec.name))
    bins = max(len(menus[i].terms.value) for i, _ in members)
    rows = [_member(menus[i], s, bins, frame, candidate.name) for i, s in members]
    columns = [np.array([r[j] for r in rows]) for j in range(len(rows[0]))]
    biggest = max((s for _, s in members), key=lambda s: max(t.rows for t in s.program.tables if t.shared))
    tables = tuple(t for t in biggest.program.tables if t.shared)
    unit = sum(frame.costs.table(Table(t.name, 1, t.width, t.init, shared=True)) for t in tables)
    width = sum(t.width for t in tables)
    most = min(MAX_ROWS, max(1, sum(_size(menus[i]) for i, _ in members) // width))
    least = max(t.rows for t in tables)
    must = sum(not menus[i].options for i, _ in members)
    own = np.array([s.cost for _, s in members], np.int64)
    tiny = [tiny_penalty(menus[i], frame) > 0 for i, _ in members]
    return Pool(candidate, tables, [i for i, _ in members], must, unit, least, max(least, most), own, tiny, *columns)


def _member(menu: Menu, sized: Sized, bins: int, frame: Frame, method: str) -> tuple[Floats | float, ...]:
    """Arrays of one member, in the order of the fields of :class:`Pool`."""
    terms, dim = menu.terms, menu.spec.embedding_dim
    tau = width_scale(dim)
    shared = [f for f in sized.parts if f.table is not None]
    base = np.ones(len(terms.value))
    for f in sized.parts:
        if f.table is None:
            kept = terms.kept(np.array([float(f.rows)]), f.shared[None])[0] ** f.power
            base = base * (1 - (1 - np.exp(-f.width / tau)) * (f.private + f.shared * kept))
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
        1 - np.exp(-width / tau),
        sum(f.power for f in shared) / len(shared),
        float(len(shared)),
        np.exp(-dim / tau),
        menu.weight * frame.factors.get(method, 1.0),
        tiny_penalty(menu, frame),
    )


def _of(pools: Sequence[Joinable], candidate: Candidate) -> Joinable:
    return next(j for j in pools if j.candidate is candidate)


def configs_of(pool: Pool, menus: Sequence[Menu], members: Sequence[int], rows: int) -> dict[str, MethodConfig] | None:
    """Configurations that put ``members`` into one set of tables of at most ``rows`` rows, or None if it cannot be.

    The method's own :meth:`recsys_embed.core.method_config.MethodConfig.plan` makes them agree on the tables.
    """
    specs = [menus[i].spec for i in members]
    plain = get_method("full").config_cls.from_params({})
    serve = Costs(None, False)
    small = [_of(menus[i].pools, pool.candidate).sized for i in members]
    heads = sum(serve.own(s.config, s.program, menus[i].spec) for i, s in zip(members, small, strict=True))
    budget = heads + sum(serve.table(t) // t.rows for t in pool.tables) * rows
    try:
        configs = pool.candidate.info.config_cls.plan(
            specs, budget, plain, full_below=0, **(pool.candidate.params or {})
        )
    except RecsysEmbedError:
        return None
    for spec in specs:
        program = configs[spec.name].program(spec)
        shared = [t for t in program.tables if t.shared]
        if not shared or max(t.rows for t in shared) > rows:
            return None
    return configs
