"""The largest elements of tables by radix selection on the bits of floats, without sorting anything of their size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Non-negative float32 values are ordered as their bits are as integers. Shift and width in bits of each radix digit.
_DIGITS = ((20, 11), (10, 10), (0, 10))
_PART = 1 << 21
"""Elements that are copied at a time."""


class LargestElements:
    """The elements of tables in order of descending absolute value; ties in order of table, row and column.

    It needs memory for a histogram per column, besides the tables.

    Args:
        tables: float32, or narrower, ``[rows, D]`` each, of one width.

    >>> ranking = LargestElements([torch.tensor([[3.0, -1.0]]), torch.tensor([[0.0, 2.0], [-3.0, 1.0]])])
    >>> ranking.mask(2)
    [tensor([[ True, False]]), tensor([[False, False],
            [ True, False]])]
    >>> ranking.columns(3)
    tensor([[1, 0],
            [1, 1]])
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self.width, self.total = tables[0].shape[1], sum(t.numel() for t in tables)
        self.shapes = [t.shape for t in tables]
        rows = max(1, _PART // self.width)
        self._parts = [(number, part) for number, table in enumerate(tables) for part in table.split(rows)]
        # By digit, what precedes it in the elements that were counted last, and their counts.
        self._counted: dict[int, tuple[int, Tensor]] = {}
        self._tied: tuple[int, Tensor] | None = None

    def _counts(self, level: int, prefix: int) -> Tensor:
        """Elements whose earlier digits are ``prefix`` by their next one, the largest first: ``[., tables, D]``."""
        if level in self._counted and self._counted[level][0] == prefix:
            return self._counted[level][1]
        (shift, bits), width = _DIGITS[level], self.width
        top = (1 << bits) - 1
        found = torch.zeros(top + 1, len(self.shapes), width, dtype=torch.int64)
        for number, part in self._parts:
            whole = _bits(part).view(-1)
            places = (whole >> (shift + bits) == prefix).nonzero().squeeze(1)
            falling = top - (whole[places] >> shift & top)
            counts = torch.bincount(falling * width + places % width, minlength=(top + 1) * width)
            found[:, number] += counts.view(top + 1, width).cpu()
        self._counted[level] = prefix, found
        return found

    def _cut(self, count: int) -> tuple[Tensor, Tensor, int, int]:
        """What is larger than the ``count``-th, and its equals, by column; how many of these count, and its bits."""
        above, equal = torch.zeros(2, len(self.shapes), self.width, dtype=torch.int64)
        prefix, left = 0, count
        for level, (_, bits) in enumerate(_DIGITS):
            counts = self._counts(level, prefix)
            sums = counts.sum((1, 2)).cumsum(0)
            at = int(torch.searchsorted(sums, left))
            above, equal = above + counts[:at].sum(0), counts[at]
            left -= int(sums[at - 1]) if at else 0
            prefix = (prefix + 1 << bits) - 1 - at
        return above, equal, left, prefix

    def _ties(self, bits: int) -> Tensor:
        """Elements of these bits by part and column."""
        if self._tied is None or self._tied[0] != bits:
            self._tied = bits, torch.stack([(_bits(part) == bits).sum(0).cpu() for _, part in self._parts])
        return self._tied[1]

    def columns(self, count: int) -> Tensor:
        """How many of the ``count`` largest each column holds: int64 ``[tables, D]``."""
        found, equal, left, bits = self._cut(count)
        if left == int(equal.sum()):
            return found + equal
        for (number, part), ties in zip(self._parts, self._ties(bits), strict=True):
            if int(ties.sum()) > left:
                places = (_bits(part) == bits).view(-1).nonzero().squeeze(1)[:left]
                found[number] += torch.bincount(places % self.width, minlength=self.width).cpu()
                break
            found[number] += ties
            left -= int(ties.sum())
        return found

    def mask(self, count: int) -> list[Tensor]:
        """Which elements the ``count`` largest are: bool ``[rows, D]`` per table, on the CPU."""
        kept = [torch.zeros(shape, dtype=torch.bool) for shape in self.shapes]
        _, _, left, bits = self._cut(count)
        ends = [0] * len(kept)
        for number, part in self._parts:
            whole = _bits(part)
            chosen = whole > bits
            ties = (whole == bits).view(-1).nonzero().squeeze(1)[:left]
            chosen.view(-1)[ties] = True
            left -= len(ties)
            kept[number][ends[number] : ends[number] + len(part)] = chosen.cpu()
            ends[number] += len(part)
        return kept


def _bits(part: Tensor) -> Tensor:
    """Absolute values as integers of the same order."""
    return part.detach().float().abs().contiguous().view(torch.int32)
