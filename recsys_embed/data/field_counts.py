"""Counts of the values of a field, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.random_bits import mix64


@dataclass(frozen=True)
class FieldCounts:
    """Distinct values of a field with their counts, in no particular order; ``missing`` counts the empty ones.

    ``level`` is 0 for exact counts. Otherwise only values whose hash ends in ``level`` zero bits were kept: an
    unbiased sample of the distinct values, each of which stands for ``2**level``.
    """

    values: NDArray[Any]
    counts: NDArray[np.int64]
    missing: int
    level: int = 0


class FieldCounter:
    """Counts a field's values, chunk by chunk.

    Args:
        max_rows: values held before they are merged into the counts.
        max_distinct: distinct values held exactly; beyond it, counting goes on with a sample (see ``FieldCounts``).

    >>> c = FieldCounter()
    >>> c.add(np.array([7, 7, 9, 0], np.uint32), np.array([False, False, False, True]))
    >>> r = c.result(); sorted(zip(r.values.tolist(), r.counts.tolist())), r.missing
    ([(7, 2), (9, 1)], 1)
    """

    def __init__(self, max_rows: int = 1 << 24, max_distinct: int = 1 << 62) -> None:
        self.max_rows = max_rows
        self.max_distinct = max_distinct
        self._pending: list[NDArray[Any]] = []
        self._rows = 0
        self._merged: pl.DataFrame | None = None
        self._missing = 0
        self._level = 0

    def add(self, values: NDArray[Any], missing: NDArray[np.bool_]) -> None:
        """Count values; where ``missing`` is true the value is ignored."""
        gone = int(missing.sum())
        self._missing += gone
        self._pending.append(values[~missing] if gone else values)
        self._rows += len(values)
        if self._rows >= self.max_rows:
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        kind = np.result_type(*self._pending)
        fresh = pl.DataFrame({"value": np.concatenate(self._pending, dtype=kind)})
        self._pending, self._rows = [], 0
        counted = self._sample(fresh.group_by("value").agg(pl.len().cast(pl.Int64).alias("count")))
        if self._merged is not None:
            both = pl.concat([self._merged, counted], how="vertical_relaxed")
            counted = both.group_by("value").agg(pl.col("count").sum())
        while len(counted) > self.max_distinct:
            self._level += 1
            counted = self._sample(counted)
        self._merged = counted

    def _sample(self, counted: pl.DataFrame) -> pl.DataFrame:
        if not self._level:
            return counted
        low = mix64(counted["value"].to_numpy().astype(np.uint64)) & np.uint64((1 << self._level) - 1)
        return counted.filter(pl.Series(low == 0))

    def result(self) -> FieldCounts:
        """Counts of everything added so far."""
        self._merge()
        if self._merged is None:
            return FieldCounts(np.zeros(0, np.uint32), np.zeros(0, np.int64), self._missing)
        m = self._merged
        return FieldCounts(m["value"].to_numpy(), m["count"].to_numpy(), self._missing, self._level)


def describe(counts: FieldCounts) -> dict[str, Any]:
    """Distinct values, those seen once, and the share of training rows the k most frequent values cover.

    The empty field counts as a value. With sampled counts (``level`` above 0) distinct and seen-once are estimates
    and the coverage is left out.
    """
    count = counts.counts
    if counts.missing:
        count = np.append(count, counts.missing)
    scale = 1 << counts.level
    stats: dict[str, Any] = {
        "distinct": int(len(counts.counts) * scale + (counts.missing > 0)),
        "seen_once": int((count == 1).sum() * scale),
        "missing": counts.missing,
        "estimated": counts.level > 0,
    }
    if not counts.level:
        ordered = np.sort(count)[::-1]
        total = int(ordered.sum())
        running = np.cumsum(ordered)
        ks = [10**e for e in range(10) if e == 0 or 10 ** (e - 1) < len(ordered)]
        stats["coverage"] = {str(k): round(int(running[min(k, len(ordered)) - 1]) / total, 6) for k in ks if total}
    return stats
