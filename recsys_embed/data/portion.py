"""Deprecated: the class of a process's rows; :meth:`recsys_embed.data.RowSource.portion` returns them now."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise

from recsys_embed.data.rows import Rows, RowSource, portion_ends


class Portion(Rows):
    """Portion ``rank`` of ``world`` of every split; ``splits`` and ``digest`` are those of the whole."""

    rank: int
    world: int

    @classmethod
    def of(cls, data: RowSource, rank: int, world: int) -> Portion:
        """Portion ``rank`` of ``world`` of an opened data set."""
        warnings.warn(
            "Portion.of(data, rank, world) goes away; use data.portion(rank, world)", DeprecationWarning, stacklevel=2
        )
        found = cls(data, data.portion(rank, world).runs)
        found.rank, found.world = rank, world
        return found

    @property
    def splits(self) -> Mapping[str, int]:
        return self.whole.splits

    @property
    def digest(self) -> str:
        return self.whole.digest

    def ends(self, split: str) -> list[int]:
        """Where portions begin and end: rows of the split, ``[world + 1]``."""
        return portion_ends(self.whole, split, self.world)

    def rows_of_all(self, split: str) -> list[int]:
        """Rows of every portion."""
        return [stop - start for start, stop in pairwise(self.ends(split))]

    def rows(self, split: str) -> int:
        _, start, stop = self._run(split)
        return stop - start
