"""Frequency curves: the distribution of a feature's lookups over its ids, in a few dozen bins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.utils.types import Counts

Floats = NDArray[np.float64]

BINS = 56
"""Approximate largest number of bins of a curve."""
LOOKUPS_PER_ID = 5.0
"""Assumed lookups per id where their number is unknown: about Criteo's 45 million rows over its largest field."""
EXPONENT = 1.05
"""Exponent of the Zipf distribution assumed for unknown frequencies."""


@dataclass(frozen=True, eq=False)
class FrequencyCurve:
    """Ids of one feature in bins of falling frequency.

    Args:
        ids: float64 [bins], number of ids per bin.
        mass: float64 [bins], share of all lookups that reads ids of the bin; sums to 1 (to 0 without lookups).
        total: number of lookups that were counted.
        ranked: ids are numbered by falling frequency (id 0, which often stands for unknown values, aside).

    Raises:
        ConfigError: values are negative or not finite, or shares do not sum to 1.

    >>> curve = FrequencyCurve.from_counts([70, 20, 5, 5, 0])
    >>> curve.n, curve.total, round(curve.coverage(2), 6), curve.seen
    (5, 100.0, 0.9, 4)
    """

    ids: Floats
    mass: Floats
    total: float
    ranked: bool = False

    def __post_init__(self) -> None:
        ids, mass = np.asarray(self.ids, np.float64), np.asarray(self.mass, np.float64)
        faults = []
        if ids.ndim != 1 or ids.shape != mass.shape or not len(ids):
            faults.append(f"`ids` and `mass` must be of one length, at least 1; got shapes {ids.shape}, {mass.shape}")
        elif not (np.isfinite(ids).all() and np.isfinite(mass).all() and (ids > 0).all() and (mass >= 0).all()):
            faults.append("`ids` must be positive and `mass` not negative, all finite")
        elif mass.any() and abs(mass.sum() - 1) > 1e-6:
            faults.append(f"`mass` must sum to 1; got {mass.sum():g}")
        if not (math.isfinite(self.total) and self.total >= 0):
            faults.append(f"`total` must be a number >= 0; got {self.total!r}")
        raise_faults(faults, "FrequencyCurve")
        order = np.argsort(-mass / ids, kind="stable")
        object.__setattr__(self, "ids", ids[order])
        object.__setattr__(self, "mass", mass[order])

    # -- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def from_counts(cls, counts: Counts) -> FrequencyCurve:
        """Curve of counts per id (array, tensor or list, any order).

        Raises:
            ConfigError: not one-dimensional, or counts are negative or not finite.
        """
        given = counts.detach().cpu().numpy() if isinstance(counts, torch.Tensor) else np.asarray(counts)
        if given.ndim != 1 or not len(given) or given.dtype.kind not in "iuf":
            raise ConfigError(f"counts must be a list of one number per id; got shape {given.shape}, {given.dtype}")
        low, high = given.min(), given.max()
        if not (np.isfinite(low) and np.isfinite(high) and low >= 0):
            raise ConfigError(f"counts must be finite and not negative; got values from {low} to {high}")
        ranked = bool((given[1:-1] >= given[2:]).all())
        falling = np.sort(given)[::-1]
        seen = int(len(falling) - np.searchsorted(falling[::-1], 0, side="right"))
        edges = _edges(len(falling), seen)
        sums = np.add.reduceat(falling, edges[:-1], dtype=np.float64)
        total = float(sums.sum())
        return cls(np.diff(edges).astype(np.float64), sums / total if total else sums, total, ranked and total > 0)

    @classmethod
    def zipf(cls, n: int, exponent: float = EXPONENT, total: float | None = None) -> FrequencyCurve:
        """Curve of ``n`` ids whose k-th most frequent one has a share in proportion to ``k ** -exponent``.

        Args:
            total: number of lookups, which determines how well ids are learned; five per id by default.

        >>> round(FrequencyCurve.zipf(10**9, 1.0).coverage(31_623), 2)
        0.51
        """
        if not n >= 1 or not math.isfinite(exponent) or exponent < 0:
            raise ConfigError(f"a Zipf curve needs n >= 1 ids and an exponent >= 0; got {n!r} and {exponent!r}")
        edges = _edges(n, n)
        # The integral over half-open steps is the sum but for 1/(24 k^2); the first ranks are bins of their own.
        mass = _power_integral(edges[:-1] + 0.5, edges[1:] + 0.5, exponent)
        single = np.diff(edges) == 1
        mass[single] = (edges[:-1][single] + 1.0) ** -exponent
        return cls(np.diff(edges).astype(np.float64), mass / mass.sum(), LOOKUPS_PER_ID * n if total is None else total)

    @classmethod
    def from_coverage(
        cls,
        coverage: Mapping[int, float] | Mapping[str, float],
        distinct: int,
        seen_once: int = 0,
        total: float | None = None,
        ranked: bool = False,
    ) -> FrequencyCurve:
        """Curve through known points: the ``k`` most frequent ids take the share ``coverage[k]`` of the lookups.

        Between two points shares fall as 1/k, or more slowly where they would begin above those before.

        Args:
            coverage: share by number of ids, as ``stats.json`` of a data folder holds it.
            distinct: number of ids that occur.
            seen_once: those of them that occur once.
            total: lookups; five per id by default.
            ranked: whether ids are numbered by falling frequency.
        """
        if distinct < 1:
            raise ConfigError(f"`distinct` must be at least 1; got {distinct!r}")
        total = LOOKUPS_PER_ID * distinct if total is None else total
        points = {float(k): float(v) for k, v in coverage.items() if 0 < float(k) < distinct}
        if 0 < seen_once < distinct and total > 0:
            points[float(distinct - seen_once)] = 1 - seen_once / total
        points[float(distinct)] = 1.0
        ks = np.array(sorted(points))
        shares = np.array([points[k] for k in ks])
        if (np.diff(shares) < -1e-6).any() or not (shares.min() >= 0 and shares.max() <= 1 + 1e-9):
            raise ConfigError(f"`coverage` must be shares in [0, 1] that rise with k; got {dict(points)!r:.200}")
        edges = np.unique(np.concatenate([_edges(distinct, distinct), ks.astype(np.int64)])).astype(np.float64)
        reached = _between_points(edges, np.append(0.0, ks), np.append(0.0, np.maximum.accumulate(shares)))
        return cls(np.diff(edges), np.diff(reached), float(total), ranked)

    # -- queries -----------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Number of ids."""
        return round(float(self.ids.sum()))

    @property
    def seen(self) -> int:
        """Number of ids that occur."""
        return round(float(self.ids[self.mass > 0].sum()))

    @property
    def share(self) -> Floats:
        """Share of the lookups that one id of each bin takes."""
        out: Floats = self.mass / self.ids
        return out

    def coverage(self, k: float) -> float:
        """Share of the lookups that the ``k`` most frequent ids take."""
        ends = np.concatenate([[0.0], np.cumsum(self.ids)])
        return float(np.interp(k, ends, np.concatenate([[0.0], np.cumsum(self.mass)])))

    def head(self, share: float) -> int:
        """Number of the most frequent ids that together take ``share`` of the lookups.

        >>> FrequencyCurve.from_counts([70, 20, 5, 5]).head(0.9)
        2
        """
        ends = np.concatenate([[0.0], np.cumsum(self.mass)])
        return math.ceil(np.interp(share, ends, np.concatenate([[0.0], np.cumsum(self.ids)])) - 1e-6)

    def resized(self, n: int) -> FrequencyCurve:
        """The curve with ids that never occur added up to ``n``, or the rarest beyond ``n`` merged into one id."""
        if n > self.n:
            return FrequencyCurve(np.append(self.ids, n - self.n), np.append(self.mass, 0.0), self.total, self.ranked)
        if n == self.n:
            return self
        ends = np.concatenate([[0.0], np.cumsum(self.ids)])
        kept = np.clip(n - 1 - ends[:-1], 0.0, self.ids)
        mass = self.mass * kept / self.ids
        keep = kept > 0
        rest = max(0.0, float(self.mass.sum() - mass.sum()))
        return FrequencyCurve(np.append(kept[keep], 1.0), np.append(mass[keep], rest), self.total, self.ranked)


def _edges(n: int, seen: int) -> NDArray[np.int64]:
    """Ranks between which bins lie, from 0 to ``n``: single ranks first, then in a geometric row; one is ``seen``."""
    grown = np.geomspace(1, max(n, 1), BINS).astype(np.int64)
    return np.unique(np.concatenate([[0], np.arange(1, min(n, 8) + 1), grown, [seen, n]])).astype(np.int64)


def _between_points(edges: Floats, ks: Floats, shares: Floats) -> Floats:
    """Coverage at ``edges`` of a curve through the points ``(ks, shares)``, which begin at (0, 0)."""
    reached = np.interp(edges, ks, shares)
    steepest = np.inf
    for low, high in pairwise(range(len(ks))):
        inside = (edges > ks[low]) & (edges < ks[high])
        if inside.any():
            at = edges[inside]
            log = np.log((1 + at) / (1 + ks[low])) / np.log((1 + ks[high]) / (1 + ks[low]))
            curved = shares[low] + (shares[high] - shares[low]) * log
            reached[inside] = np.maximum(reached[inside], np.minimum(curved, shares[low] + steepest * (at - ks[low])))
        last = int(np.searchsorted(edges, ks[high]))
        steepest = (reached[last] - reached[last - 1]) / (edges[last] - edges[last - 1])
    return reached


def _power_integral(low: NDArray[np.floating[Any]], high: NDArray[np.floating[Any]], exponent: float) -> Floats:
    if abs(exponent - 1) < 1e-9:
        logs: Floats = np.log(high / low)
        return logs
    out: Floats = (high ** (1 - exponent) - low ** (1 - exponent)) / (1 - exponent)
    return out
