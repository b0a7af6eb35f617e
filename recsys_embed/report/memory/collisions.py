"""Collisions (ids that share a vector): expected from a lookup program, and measured by hashing ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.program import LookupProgram, Sharing
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.report.memory.stats import FieldStats

_CHUNK = 1 << 20
_SIGNS_OF_A_RUN = 32
_STEPS = 64
_ALMOST_ONE = 1 - 1e-12


def row_keys(program: LookupProgram, store: IndexStore | None = None, place: int = 0) -> Callable[[Tensor], Tensor]:
    """A function from int64 ids ``[n]`` to keys ``[n]``, equal for ids that have equal vectors in all tables.

    The keys are 64 mixed bits of all rows, signs and weights that an id reads, independent of order where rows add up.

    Args:
        program: the lookup.
        store: arrays of its indexes; by default for ids numbered by falling frequency.
        place: position of the program in the store.
    """

    program = program.of_one_id

    def keys(ids: Tensor) -> Tensor:
        arrays = IndexStore([program.indexes]) if store is None else store
        at = arrays.places(0 if store is None else place)
        ids = ids.to(arrays.device)
        names = [t.name for t in program.tables]
        read: dict[tuple[int, int], list[Tensor]] = {}
        for row_lookup, span in zip(program.row_lookups, program.spans, strict=True):
            code = torch.full_like(ids, names.index(row_lookup.table) << 40)  # beyond any row
            for transform in row_lookup.transforms:
                rows = transform.rows(ids, at.get(transform.reads or "", 0), arrays.arrays)
                code = hashing.splitmix64(code + rows, 1)
            for step in range(0 if row_lookup.sign is None else min(row_lookup.num_rows, _SIGNS_OF_A_RUN)):
                salt: Any = row_lookup.sign
                if row_lookup.num_rows > 1:
                    salt = hashing.sequence(salt, torch.tensor(step, device=ids.device))
                code = hashing.splitmix64(code + hashing.hash_signs(ids, salt), 2)
            read.setdefault(span, []).append(code)
        key = torch.zeros_like(ids)
        for span in sorted(read):
            # Sums and products are the same in any order of their rows.
            for code in torch.stack(read[span]).sort(0).values:
                key = hashing.splitmix64(key + code, 3)
        for code in () if program.head is None else program.head.keys(ids):
            key = hashing.splitmix64(key + code, 4)
        return key

    return keys


@dataclass(frozen=True)
class Collisions:
    """Shares of ids and lookups that collide.

    Args:
        ids: share of ids whose vector is also that of another id.
        traffic: share of lookups that read a shared vector.
        mixed: share of a vector's lookups that other ids make, averaged over lookups: near 0 where frequent ids share
            only with rare ones, near 1 where every vector is shared by many ids.
    """

    ids: float
    traffic: float | None
    mixed: float | None


def measured_collisions(keys: Callable[[Tensor], Tensor], stats: FieldStats) -> Collisions:
    """Exact collisions among the ids that occur, by hashing each."""
    if stats.ids is None or stats.counts is None:
        raise ConfigError(f"collisions are measured on counts per id, which {stats.name!r} does not have")
    found = torch.cat([keys(part).cpu() for part in stats.ids.split(_CHUNK)])
    _, group, size = found.unique(return_inverse=True, return_counts=True)
    shares, counts = size[group] > 1, stats.counts
    total = torch.zeros(len(size), dtype=counts.dtype).index_add_(0, group, counts)
    own = float((counts.square() / total[group]).sum() / counts.sum())
    traffic = float(counts[shares].sum() / counts.sum())
    return Collisions(float(shares.double().mean()), traffic, max(0.0, 1.0 - own))


def expected_collisions(program: LookupProgram, ids: int, stats: FieldStats | None = None) -> Collisions:
    """Expected collisions of a program, averaged over the salts of its hashes.

    Ids that own a row (frequent ids, ids in an id set) do not collide. Each of the n others shares all its hashed rows
    with at least one of the rest with probability ``1 - (1 - 1/cells)**(n - 1)``, ``cells`` being the number of
    combinations of rows and signs in any order; ids that differ in a mixed-radix digit cannot collide.

    Args:
        program: the lookup.
        ids: number of ids, taken as ranks of frequency.
        stats: restricts the count to ids that occur, and adds the share of lookups.

    >>> from recsys_embed import FeatureSpec, get_method
    >>> config = get_method("hash").config_cls(num_buckets=1000)
    >>> round(expected_collisions(config.program(FeatureSpec("C1", 1001, 16)), 1001).ids, 3)
    0.632
    """
    n = ids if stats is None else max(1, min(ids, stats.distinct))
    sharing = _sharing(program, n)
    heads = _merge([s.private for s in sharing], n)
    others = n - sum(stop - start for start, stop in heads)
    if others <= 0:
        return Collisions(0.0, *((None, None) if stats is None else (0.0, 0.0)))
    rate, cells = _rate(program, sharing, n, others)
    if stats is None:
        return Collisions(rate * others / n, None, None)
    private = sum(stats.share(stop) - stats.share(start) for start, stop in heads)
    return Collisions(rate * others / n, rate * max(0.0, 1.0 - private), _mixed(stats, heads, rate, cells))


def _mixed(stats: FieldStats, heads: Sequence[tuple[int, int]], rate: float, cells: float) -> float:
    """Expected share of other ids among the lookups of a vector, averaged over lookups and salts."""
    size, mass = stats.curve.ids, stats.curve.mass
    ends = np.cumsum(size)
    private = np.zeros(len(size))
    for start, stop in heads:
        private += np.clip(np.minimum(ends, stop) - np.maximum(ends - size, start), 0.0, None)
    open_share = np.clip(1.0 - private / size, 0.0, 1.0)
    live = (open_share > 0) & (mass > 0)
    if rate <= 0 or not live.any():
        return 0.0
    # An id with share c of the lookups whose cell has other lookups X keeps c / (c + X) of its vector. Laplace
    # transform: c / (c + X) = integral over u > 0 of exp(-u) exp(-s X) with s = u / c. X is a sum over independent ids
    # of share m, each in the cell with probability 1 / cells, so E[exp(-s X)] is the product over ids of
    # (1 - (1 - exp(-s m)) / cells). Its logarithm is summed below per bin of ``n`` ids of share ``m``, less the id
    # itself; the integral over u is the trapezoid rule in log u (hence the factor u).
    count, each = (size * open_share)[live], (mass / size)[live]
    u = np.geomspace(1e-9, 40.0, _STEPS)
    s = u / each[:, None]
    absent = np.zeros_like(s)
    for m, n in zip(each, count, strict=True):
        absent += n * np.log1p(-np.minimum(-np.expm1(-s * m) / cells, _ALMOST_ONE))
    absent -= np.log1p(-np.minimum(-np.expm1(-s * each[:, None]) / cells, _ALMOST_ONE))
    inside = u * np.exp(-u + np.minimum(absent, 0.0))
    own = ((inside[:, 1:] + inside[:, :-1]) / 2 * np.diff(np.log(u))).sum(1)
    return float((count * each * (1.0 - np.minimum(own, 1.0))).sum())


def _sharing(program: LookupProgram, n: int) -> list[Sharing]:
    """How the rows of each transform are shared among n ids."""
    reads = [(p.transform, p.table) for p in program.row_lookups]
    reads += [(p.weight.transform, p.weight.table) for p in program.row_lookups if p.weight is not None]
    return [transform.sharing(n, program.table(table).rows) for transform, table in reads]


def _merge(spans: list[tuple[int, int]], n: int) -> list[tuple[int, int]]:
    """Disjoint spans of [0, n) with the same union."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted((min(a, n), min(b, n)) for a, b in spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        elif start < stop:
            out.append((start, stop))
    return out


def _cells(program: LookupProgram, sharing: Sequence[Sharing]) -> float:
    """Number of equally likely combinations of hashed rows and signs; no limit where vectors are computed from ids."""
    if not program.row_lookups:
        return math.inf
    sizes = {s.key: s.rows for s in sharing if s.rows and not s.even}
    signs = math.prod(2.0 ** min(p.num_rows, _SIGNS_OF_A_RUN) for p in program.row_lookups if p.sign is not None)
    alike = Counter(
        (p.table, span) for p, span in zip(program.row_lookups, program.spans, strict=True) if p.weight is None
    )
    orders = math.prod(math.factorial(k) for k in alike.values())
    return max(1.0, signs * math.prod(float(s) for s in sizes.values()) / orders)


def _rate(program: LookupProgram, sharing: Sequence[Sharing], n: int, others: int) -> tuple[float, float]:
    """Probability that an id without a row of its own collides with another such id; and the number of cells."""
    cells = _cells(program, sharing)
    even = {s.key: s.rows for s in sharing if s.rows and s.even}
    if not even:
        return _birthday(cells, others - 1), cells
    classes = math.prod(even.values())
    if classes >= n:
        return 0.0, cells * classes
    # Ids with equal digits form classes of n // classes or n // classes + 1 ids; only ids of one class collide.
    small, larger = divmod(n, classes)
    in_larger = larger * (small + 1) / n
    rate = in_larger * _birthday(cells, small) + (1 - in_larger) * _birthday(cells, small - 1)
    return rate, cells * classes


def _birthday(cells: float, rest: int) -> float:
    """Probability that at least one of ``rest`` other ids falls into the same of ``cells`` cells."""
    if rest <= 0:
        return 0.0
    return 1.0 if cells <= 1 else -math.expm1(rest * math.log1p(-1.0 / cells))
