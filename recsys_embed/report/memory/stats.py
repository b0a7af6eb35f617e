"""Frequency statistics of a table: coverage by its most frequent ids, and unseen ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.statistics import FeatureStatistics, read_statistics
from recsys_embed.typing import Statistics
from recsys_embed.utils.types import Counts

TOPS = (1, 10, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)


@dataclass(frozen=True, eq=False)
class FieldStats:
    """Frequency statistics of one feature.

    Args:
        name: of the feature.
        curve: share of all occurrences by rank.
        seen_once: values that occur once, where known.
        unseen: per split, the share of its occurrences whose value training did not know.
        ids: int64 ``[n]`` the ids that occur, where they are known one by one.
        counts: float64 ``[n]`` how often each occurs.
    """

    name: str
    curve: FrequencyCurve
    seen_once: int | None = None
    unseen: Mapping[str, float] = field(default_factory=dict)
    ids: Tensor | None = field(default=None, repr=False)
    counts: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of_counts(
        cls,
        name: str,
        counts: Counts,
        ids: Counts | None = None,
        curve: FrequencyCurve | None = None,
        seen_once: int | None = None,
        unseen: Mapping[str, float] | None = None,
    ) -> FieldStats:
        """From ``counts [n]`` of ids 0 to n - 1, or of ``ids [n]``.

        Raises:
            ConfigError: of another shape, not finite, negative, or all zero.

        >>> stats = FieldStats.of_counts("C1", [5, 0, 3, 2])
        >>> stats.distinct, stats.coverage()
        (3, ((1, 0.5), (3, 1.0)))
        """
        count = np.asarray(counts.cpu() if isinstance(counts, Tensor) else counts)
        each = np.arange(len(count)) if ids is None and count.ndim == 1 else ids
        each = np.asarray(each.cpu() if isinstance(each, Tensor) else each)
        if count.ndim != 1 or count.dtype.kind not in "iuf" or each.shape != count.shape or each.dtype.kind not in "iu":
            raise ConfigError(
                "statistics of a feature are counts [n], or (ids [n], counts [n]) with integer ids; got shapes "
                f"{count.shape} and {each.shape} of {count.dtype} and {each.dtype} (feature {name!r})"
            )
        if not (np.isfinite(count).all() and (count >= 0).all() and count.any()):
            raise ConfigError(f"counts must be finite numbers >= 0 and not all 0 (feature {name!r})")
        seen = count > 0
        return cls(
            name,
            FrequencyCurve.from_counts(count) if curve is None else curve,
            int((count == 1).sum()) if seen_once is None else seen_once,
            dict(unseen or {}),
            torch.from_numpy(each[seen].astype(np.int64)),
            torch.from_numpy(count[seen].astype(np.float64)),
        )

    @property
    def distinct(self) -> int:
        """Ids that occur."""
        return self.curve.seen

    def share(self, k: float) -> float:
        """Share of all occurrences that the ``k`` most frequent ids make up."""
        return min(1.0, self.curve.coverage(k))

    def coverage(self) -> tuple[tuple[int, float], ...]:
        """``(k, share of the k most frequent ids)`` for the powers of ten below the number of ids, and all of them."""
        ks = [k for k in TOPS if k < self.distinct] + [self.distinct]
        return tuple((k, self.share(k)) for k in ks)


def read_stats_of(source: Statistics) -> dict[str, FieldStats]:
    """Statistics per feature, from every supported source.

    Args:
        source: mapping of feature name to counts ``[n]``, ``(ids, counts)``, :class:`FrequencyCurve` or
            :class:`FieldStats`; the content of a data folder's ``stats.json``; a data folder or a data set, whose
            counts are exact.

    Raises:
        ConfigError: the source is of another kind.
        DataError: the folder cannot be read.
    """
    if isinstance(source, str | Path):
        from recsys_embed.data import open_dataset

        source = open_dataset(source)
    return {name: _of_known(name, known) for name, known in read_statistics(source)}


def _of_known(name: str, known: FeatureStatistics) -> FieldStats:
    given, once, unseen = known.given, known.seen_once, known.unseen or {}
    if isinstance(given, FieldStats):
        return given
    if given is None or isinstance(given, FrequencyCurve):
        return FieldStats(name, known.curve(), once, unseen)
    pair = given if isinstance(given, tuple) and len(given) == 2 else (None, given)
    ids, counts = cast("tuple[Counts | None, Counts]", pair)
    if known.coarse is not None and not cast("Tensor", counts).any():  # a data set: its counts are tensors
        return FieldStats(name, known.coarse, once, unseen)
    return FieldStats.of_counts(name, counts, ids, seen_once=once, unseen=unseen)
