"""Estimated loss of a lookup program: how much of a feature's signal it loses, from the feature's frequency curve.

This is a model, not a measurement; its constants were fitted to test AUCs of DeepFM and DCNv2 on a Criteo sample
(``benchmarks/results/criteo_sample.json``) and :mod:`recsys_embed.planning.calibration` refits it to runs of your own.

**Loss of a feature.** ``sum over ids of  p * s * lost``: p is the id's share of the feature's lookups; ``s = c / (c +
100)`` is how much of what the id could tell is learned from the c lookups that were counted, so that rare ids weigh
little; ``lost`` in [0, 1] is the part of it that the program destroys. Missing rows (-1) lose all of it.

**Sharing rows.** Let a row be shared by ids whose vectors are independent. The row that fits them best is their mean
weighted by frequency, which keeps ``p / (p + O)`` of an id's signal, O being the frequency of the others in its row.
With M rows and a random hash the number of others of each frequency is Poisson, and ``E[p / (p + O)]`` is exactly
``integral over u of  p exp(-p u) exp(-G(u) / M)`` with ``G(u) = sum over ids of (1 - exp(-p u))``: one quadrature for
any M. Ids of *other* features in a shared table count :data:`BETWEEN` as much, since the layers above tell features
apart (Coleman et al., NeurIPS 2023, section 3.4), and so do other chunks of the same feature.

**Several rows per id.** Rows that add up or multiply have to undo each other's changes: what one hash over as many rows
would keep is raised to :data:`SUM_POWER` or :data:`MUL_POWER`.

A run of consecutive elements that starts anywhere is overlapped in parts, so its loss is computed in :data:`RUN_PIECES`
pieces side by side.

**Width.** A vector of width w keeps ``1 - exp(-w / tau)`` of a wide one's signal, ``tau = 1.7 sqrt(D / 16)`` with D the
full width: the first columns carry most. Chunks side by side each take their share away from what the others left, so
an id keeps most of its signal as long as one of its chunks is its own. A learned scalar per id is a chunk of width 1.

**Rows that are computed.** Where ids share all that is stored (:attr:`recsys_embed.core.heads.Head.shares_all`: cores
of a tensor train, a network), they are rated as sums of rows shared at random, as many as the stored numbers make.

**Rounding.** Rows served at fewer bits keep a part of what they carry (:mod:`recsys_embed.planning.rounding`): no
program keeps more than a full table at the highest of its precisions, whatever its widths and its rows per id.

**Features without a network.** Where no network reads a vector beside many others
(:mod:`recsys_embed.planning.network_context`), it is all that is known of an id. Then ids that share a row keep only
:data:`SHARED_KEPT_WITHOUT_NETWORK` of what the formula says, a factor on a shared row adds nothing, an id is learned
from fewer lookups (:data:`HALF_KNOWN_WITHOUT_NETWORK`), and a few columns carry most whatever the full width is
(:data:`WIDTH_WITHOUT_NETWORK`). These were set by recall@20 of matrix factorisation on MovieLens-100K: rows 14, 5, 3
and 1 wide keep 94, 95, 81 and 55 % of that of rows 64 wide, hashed rows of a twentieth of the bytes 15 %.

Two ids of one feature are treated as equally similar whatever they mean, training noise and regularisation (small
tables sometimes generalise better) are left out, and features have equal weight unless ``importance`` is given.

A method whose lookup is more than a program (``config.computes``) is rated by the program it declares, which is
conservative: its network is not counted. A configuration can return a better estimate from
``planning_loss(spec, curve)``, in the unit above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recsys_embed.core.program import LookupProgram, Table, Transform
from recsys_embed.planning.curves import Floats, FrequencyCurve
from recsys_embed.planning.rounding import signal_kept

HALF_KNOWN = 100.0
"""Lookups after which half of an id's signal is learned."""
BETWEEN = 0.25
"""Harm of an id of another feature in the same row, against one of the same feature."""
SUM_POWER = 1.4
MUL_POWER = 3.0
SHARED_KEPT_WITHOUT_NETWORK = 0.1
HALF_KNOWN_WITHOUT_NETWORK = 10.0
WIDTH_WITHOUT_NETWORK = 2.0
AUC_PER_LOSS = 0.0022
"""AUC that a loss of 1 (all of one feature's signal) costs, on the sample above."""

RUN_PIECES = 4
"""Number of pieces of a run of elements."""
ROUNDING = 1e-12
_STEP = 0.5
_U = np.exp(np.arange(np.log(1e-4), np.log(4e13), _STEP))


class CurveTerms:
    """Terms of the loss that depend on the frequency curve alone; ``B`` bins, ``U`` quadrature points.

    Args:
        curve: how often ids occur.
        without_network: no network reads the feature beside many others.

    Attributes:
        value: [B] learned signal of a bin: its share of the lookups, shrunk where ids are seen rarely.
        kernel: [B, U] weights of the quadrature.
        taken: [B, U] the bin's contribution to G(u).
    """

    def __init__(self, curve: FrequencyCurve, without_network: bool = False) -> None:
        self.curve, self.n, self.without_network = curve, curve.n, without_network
        share, ids = curve.share, curve.ids
        count = share * curve.total
        self.ends = np.cumsum(ids)
        self.begins = self.ends - ids
        self.value = curve.mass * count / (count + (HALF_KNOWN_WITHOUT_NETWORK if without_network else HALF_KNOWN))
        exponent = share[:, None] * _U
        decay = np.exp(-exponent)
        self.kernel = exponent * decay * (_STEP * SHARED_KEPT_WITHOUT_NETWORK if without_network else _STEP)
        # An id does not collide with itself; the factor matters for tables of a few ids.
        self.taken = ids[:, None] * (1 - decay) * (max(self.n - 1, 0) / max(self.n, 1))
        self.ones, self.zeros = np.ones(len(ids)), np.zeros(len(ids))
        self.load = self.taken.sum(0)

    def width_scale(self, dim: int) -> float:
        """Columns that carry 63 % of the signal of a vector of width ``dim``."""
        return WIDTH_WITHOUT_NETWORK if self.without_network else float(1.7 * np.sqrt(dim / 16))

    def members(self, start: float, count: float) -> Floats:
        """Part of each bin whose frequency rank lies in ``[start, start + count)``: [B]."""
        inside = np.minimum(self.ends, start + count) - np.maximum(self.begins, start)
        out: Floats = np.clip(inside / self.curve.ids, 0.0, 1.0)
        return out

    def kept(self, rows: Floats, shared: Floats, others: Floats | float = 0.0) -> Floats:
        """What ids keep of their signal that share ``rows`` [Q] with the parts ``shared`` [Q, B] of the bins: [Q, B].

        Args:
            others: [Q, U] or 0, load of ids of other features, already weighted.
        """
        load = shared @ self.taken + others
        out: Floats = np.exp(-load / rows[:, None]) @ self.kernel.T
        return out


class ColumnSpan(NamedTuple):
    """A span of output columns, and which ids share the rows behind it.

    Args:
        private: [B] part of each bin whose ids have rows of their own.
        shared: [B] part whose ids share rows; the rest has none.
        rows: how many rows are shared.
        width: columns.
        power: exponent on the signal that sharing keeps, see the module.
        table: name of the table where features share it, else None.
        reads: rows of that table that an id reads for these columns.
        rounded: share of the signal that rows keep at the precision of the table, see
            :mod:`recsys_embed.planning.rounding`; [B] where ids have rows of several precisions.
    """

    private: Floats
    shared: Floats
    rows: float
    width: float
    power: float
    table: str | None
    reads: float = 1.0
    rounded: float | Floats = 1.0


def sharing(transform: Transform, table: Table, terms: CurveTerms) -> tuple[Floats, Floats, float]:
    """Private part [B], sharing part [B] and number of shared rows of a transform into ``table``."""
    found = transform.sharing(terms.n, table.rows)
    if found.private[0] <= 0 and found.private[1] >= terms.n:
        return terms.ones, terms.zeros, 1
    own, none = (terms.zeros if start >= stop else terms.members(start, stop - start) for start, stop in found[:2])
    if not found.rows:
        return own, terms.zeros, 1
    # Equal arrays are one object, so that estimate_loss computes each distinct case once.
    all_share = own is terms.zeros and none is terms.zeros
    return own, terms.ones if all_share else np.maximum(terms.ones - own - none, 0.0), found.rows


def column_spans(program: LookupProgram, terms: CurveTerms) -> list[ColumnSpan]:
    """The column spans of a program's output, each with the ids that share its rows."""
    program = program.of_one_id
    tables = {t.name: t for t in program.tables}
    if program.head is not None and program.head.shares_all:
        rows = sum(t.elements for t in program.tables) / program.width
        rounded = min(signal_kept(t, terms.without_network, columns=program.width) for t in program.tables)
        return [ColumnSpan(terms.zeros, terms.ones, rows, program.width, SUM_POWER, None, rounded=rounded)]
    groups: dict[tuple[int, int], list[tuple[str, ColumnSpan]]] = {}
    found: list[ColumnSpan] = []
    power = MUL_POWER if program.combine == "mul" else SUM_POWER
    spans = program.spans
    for row_lookup, span in zip(program.row_lookups, spans, strict=True):
        table = tables[row_lookup.table]
        name = table.name if table.shared else None
        own, rest, rows = sharing(row_lookup.transform, table, terms)
        width, rounded = span[1] - span[0], signal_kept(table, terms.without_network, columns=program.width)
        if row_lookup.num_rows > 1 and spans.count(span) == 1:
            found += _pieces(own, rest, rows, row_lookup.num_rows, name, rounded)
        elif width > 1 and table.width == 1 and row_lookup.num_rows == 1:
            found.append(ColumnSpan(own, rest, rows, 1, 1.0, name, rounded=rounded))
        else:
            group = groups.setdefault(span, [])
            group.append((table.name, ColumnSpan(own, rest, rows, width, 1.0, name, rounded=rounded)))
        if row_lookup.weight is not None and not terms.without_network:
            weights = tables[row_lookup.weight.table]
            own, rest, rows = sharing(row_lookup.weight.transform, weights, terms)
            rounded = signal_kept(weights, terms.without_network, columns=program.width)
            found.append(ColumnSpan(own, rest, rows, 1, 1.0, weights.name if weights.shared else None, rounded=rounded))
    for members in groups.values():
        found.append(members[0][1] if len(members) == 1 else _together(members, power))
    return found


def _pieces(own: Floats, rest: Floats, rows: float, run: int, name: str | None, rounded: float) -> list[ColumnSpan]:
    """A run of elements that starts anywhere: other runs overlap parts of it, so each piece collides separately."""
    count = min(RUN_PIECES, run)
    # A piece is met by every run that starts within its length and a run before it.
    return [ColumnSpan(own, rest, rows / (run + run / count), run / count, 1.0, name, 1 / count, rounded)] * count


def _together(members: Sequence[tuple[str, ColumnSpan]], power: float) -> ColumnSpan:
    """One column span for rows that add up or multiply: an id's own row is enough, and shared rows help each other."""
    # Tiers of ids have rows in one table each, and a bin may lie in two; otherwise ids have rows in several tables.
    total = np.add.reduce([m.private for _, m in members])
    own = total if total.max() <= 1 + 1e-9 else np.maximum.reduce([m.private for _, m in members])
    rest = np.minimum(np.maximum.reduce([m.shared for _, m in members]), 1 - own)
    sharers = [(table, m) for table, m in members if m.shared.any()]
    rows = sum({table: m.rows for table, m in sharers}.values()) or 1
    name = next((m.table for _, m in sharers if m.table), None)
    power = power if len(sharers) > 1 else 1.0
    kept = [m.rounded for _, m in members]
    rounded: float | Floats = min(kept)
    if not sharers and rounded != max(kept):
        # Ids have rows in tables of several precisions.
        parts = np.stack([m.private for _, m in members])
        rounded = (parts * np.array(kept)[:, None]).sum(0) / np.maximum(parts.sum(0), 1e-300)
    return ColumnSpan(own, rest, rows, members[0][1].width, power, name, rounded=rounded)


def estimate_loss(
    terms: CurveTerms, programs: Sequence[Sequence[ColumnSpan]], dim: int, others: Mapping[str, Floats] | None = None
) -> Floats:
    """Loss of each program (given by its column spans) for a feature of width ``dim``: float64 [programs].

    Args:
        others: by shared table, [U] weighted load of the other features in it, see :func:`load_of_others`.
    """
    if not programs:
        return np.zeros(0)
    flat = [f for program in programs for f in program]
    places = np.cumsum([0, *(len(p) for p in programs[:-1])])
    tau = terms.width_scale(dim)
    queries: dict[tuple[float, int, str | None], int] = {}
    where: list[int] = []
    asked: list[ColumnSpan] = []
    for f in flat:
        key = (f.rows, id(f.shared), f.table)
        if key not in queries:
            queries[key] = len(asked)
            asked.append(f)
        where.append(queries[key])
    rows = np.array([float(f.rows) for f in asked])
    shared = np.stack([f.shared for f in asked])
    beside: Floats | float = 0.0
    if others:
        beside = np.stack([others.get(f.table or "", np.zeros(len(_U))) for f in asked])
    kept = terms.kept(rows, shared, beside)[where]
    power = np.array([f.power for f in flat])[:, None]
    keep = np.stack([f.private for f in flat]) + np.stack([f.shared for f in flat]) * kept**power
    carried: Floats = (1 - np.exp(-np.array([f.width for f in flat]) / tau))[:, None]
    if any(isinstance(f.rounded, np.ndarray) for f in flat):
        rounded = np.stack([np.broadcast_to(f.rounded, len(terms.value)) for f in flat])
    else:
        rounded = np.array([f.rounded for f in flat])[:, None]
    carried = carried * rounded
    lost = np.multiply.reduceat(1 - keep * carried, places, axis=0)
    floor = np.exp(-dim / tau)
    lost = np.clip((lost - floor) / (1 - floor), 0.0, 1.0)
    # Several rows per id make up for what each loses to sharing and width, but not for the noise that all carry.
    # Errors of this arithmetic must not order programs that lose nothing else.
    least = np.minimum.reduceat(1 - rounded, places, axis=0)
    lost = np.where(lost < least + ROUNDING, least, lost)
    # A product of matrices would sum equal rows in several orders, and so break ties.
    out: Floats = (lost * terms.value).sum(1)
    return out


def load_of_others(terms: CurveTerms, total_load: Floats) -> Floats:
    """Load [U] of the other features in a shared table, weighted by :data:`BETWEEN`.

    Args:
        total_load: [U] load of all features in the table, each times the rows of it that an id reads.
    """
    out: Floats = BETWEEN * np.maximum(total_load - terms.load, 0.0)
    return out
