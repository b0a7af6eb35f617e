"""The rows of one of several processes: whole row groups where that is fair, every row in exactly one portion."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from recsys_embed.data.loader import Dataset
from recsys_embed.data.manifest import Shard
from recsys_embed.errors import ConfigError

TOLERANCE = 0.01
"""A portion may differ by this share from an equal one so that it ends with a row group."""


@dataclass
class Portion(Dataset):
    """Portion ``rank`` of ``world`` of every split; ``splits``, ``stats`` and ``digest`` are those of the whole.

    A portion is a run of consecutive rows: no row group is read by two processes, but for the ones that hold the ends
    of portions where a split has too few of them.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"`rank` must be in [0, {self.world}); got {self.rank}")

    @classmethod
    def of(cls, data: Dataset, rank: int, world: int) -> Portion:
        """Portion ``rank`` of ``world`` of an opened data set."""
        if type(data) is not Dataset:
            raise ConfigError(
                f"portions are of a data set as open_dataset() gives it, not of part of one; got {type(data).__name__}"
            )
        return cls(data.path, data.manifest, data.memory_limit, rank, world)

    def ends(self, split: str) -> list[int]:
        """Where portions begin and end: rows of the split, ``[world + 1]``, the same in every process."""
        total = self._split(split).rows
        groups = [0, *accumulate(rows for *_, rows in super()._chunks(split))]
        slack = TOLERANCE * total / self.world
        ends = []
        for r in range(self.world + 1):
            fair = total * r // self.world
            place = bisect(groups, fair)
            near = min(groups[max(place - 1, 0) : place + 1], key=lambda end: abs(end - fair))
            ends.append(near if abs(near - fair) <= slack else fair)
        return ends

    def rows_of_all(self, split: str) -> list[int]:
        """Rows of every portion."""
        ends = self.ends(split)
        return [stop - start for start, stop in pairwise(ends)]

    def rows(self, split: str) -> int:
        return self.rows_of_all(split)[self.rank]

    def _chunks(self, split: str) -> list[tuple[Shard, int, int]]:
        start, stop = self.ends(split)[self.rank : self.rank + 2]
        return between(super()._chunks(split), start, stop)


def between(chunks: Iterable[tuple[Shard, int, int]], start: int, stop: int) -> list[tuple[Shard, int, int]]:
    """Shard, first row and rows of what chunks hold of rows ``start`` to ``stop`` of a split."""
    found, at = [], 0
    for shard, offset, rows in chunks:
        low, high = max(start, at), min(stop, at + rows)
        if low < high:
            found.append((shard, offset + low - at, high - low))
        at += rows
    return found
