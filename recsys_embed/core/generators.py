"""Generators: heads that compute rows which would otherwise be stored, once for each distinct id of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from recsys_embed.core.heads import Head, Shapes


@dataclass(frozen=True)
class TensorTrain(Head):
    """The product of one slice of each core of a tensor train (Oseledets 2011; TT-Rec, Yin et al. 2021).

    A slice is gathered as a row, core after core; that of core k is a tensor ``[ranks[k - 1], widths[k], ranks[k]]``,
    the outer ranks being 1.

    Args:
        widths: factors of the output's width, one per core.
        ranks: inner ranks, one fewer.

    >>> import torch
    >>> TensorTrain((2, 4), (3,)).apply(torch.ones(5, 2 * 3 + 3 * 4), []).shape
    torch.Size([5, 8])
    """

    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    pools = "ids"
    stacks = True
    generates = True
    shares_all = True

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Of a slice of each core."""
        return list(zip((1, *self.ranks), self.widths, (*self.ranks, 1), strict=True))

    def width(self, columns: int, shapes: Shapes) -> int:
        return prod(self.widths)

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        if not self.widths or len(self.ranks) != len(self.widths) - 1 or min((*self.widths, *self.ranks)) < 1:
            return [f"a tensor train has one rank fewer than cores, all >= 1; got {self.widths} and {self.ranks}"]
        held = sum(prod(shape) for shape in self.shapes)
        if held != columns:
            return [f"the slices of a tensor train must hold the {columns} columns gathered; they hold {held}"]
        return []

    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        first, *others = columns.split([prod(shape) for shape in self.shapes], -1)
        # From the left, as widths ascend: the product so far is [..., width so far, rank].
        out = first.unflatten(-1, self.shapes[0][1:])
        for part, (before, width, after) in zip(others, self.shapes[1:], strict=True):
            out = out @ part.unflatten(-1, (before, width * after))
            out = out.unflatten(-1, (width, after)).flatten(-3, -2)
        return out.flatten(-2)

    def describe(self) -> str:
        return "multiplied out as a tensor train"
