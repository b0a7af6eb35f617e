"""Which rows FBGEMM's tables add up: a storage divided into tables, and the rows of a step as they take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.kernels.bag_step import BagCall
from recsys_embed.kernels.fbgemm import TableBatch


class Block(NamedTuple):
    """Columns of a group's vectors: the sum of some of its reads.

    Args:
        group, span: which columns.
        reads: place among the group's reads, and of the probes in it.
        features: of the group.
    """

    group: int
    span: tuple[int, int]
    reads: list[tuple[int, list[int]]]
    features: int


def divide(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The table of each feature, as a range of rows: it holds what the feature reads, overlaps no other table, and
    features of one table are neighbours. Rows of two tables would be updated twice.

    >>> divide([(0, 5), (5, 9), (7, 12)])
    [(0, 5), (5, 12), (5, 12)]
    """
    table = list(range(len(ranges)))
    spans = {t: (*r, i, i) for i, (t, r) in enumerate(zip(table, ranges, strict=True))}
    while True:
        count = len(spans)
        # By rows, then by the order of the features: what overlaps becomes one.
        for low, high in ((0, 1), (2, 3)):
            merged: dict[int, tuple[int, int, int, int]] = {}
            names: dict[int, int] = {}
            last = -1
            for t, s in sorted(spans.items(), key=lambda item: item[1][low]):
                touching = merged and s[low] < merged[last][high] + (low == 2)
                if touching:
                    m = merged[last]
                    merged[last] = (min(m[0], s[0]), max(m[1], s[1]), min(m[2], s[2]), max(m[3], s[3]))
                else:
                    merged[t], last = s, t
                names[t] = last
            spans, table = merged, [names[t] for t in table]
        if len(spans) == count:
            return [spans[t][:2] for t in table]


def picked(reads: Sequence[tuple[int, list[int]]], values: Sequence[Tensor]) -> Tensor:
    """Of values per read ``[..., probes]``, those of a block: ``[..., its rows]``."""
    parts = [values[r] if len(at) == values[r].shape[-1] else values[r][..., at] for r, at in reads]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Rows(NamedTuple):
    """What one block reads.

    Args:
        rows: of the storage, int64 ``[..., n]``, feature after feature; -1 for none.
        start: first row of each one's table, broadcasting with ``rows``; None where they are counted in the storage.
        factors: of the rows, their shape; None for 1.
        offsets: of the bags among the ids, which are all but the last dimension; None where each is a bag.
    """

    rows: Tensor
    start: Tensor | None
    factors: Tensor | None
    offsets: Tensor | None

    def lengths(self, partial: bool) -> Tensor:
        """Rows of each bag, those of -1 left out."""
        count = self.rows.shape[-1]
        if partial:
            each = (self.rows >= 0).sum(-1).reshape(-1)
            return each if self.offsets is None else F.pad(each.cumsum(0), (1, 0))[self.offsets].diff()
        if self.offsets is None:
            return torch.full((self.rows.numel() // count,), count)
        return self.offsets.diff() * count


def call(tables: TableBatch | None, blocks: Sequence[Rows], partial: bool) -> BagCall:
    """What to read of a storage.

    Args:
        partial: some rows may be -1.
    """
    parts = [(b.rows if b.start is None else b.rows - b.start).reshape(-1) for b in blocks]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    weights = None
    if any(b.factors is not None for b in blocks):
        full = [torch.ones(b.rows.shape) if b.factors is None else b.factors for b in blocks]
        weights = torch.cat([f.reshape(-1) for f in full])
    counts = {b.rows.shape[-1] for b in blocks}
    if not partial and len(counts) == 1 and all(b.offsets is None for b in blocks):
        return BagCall(tables, flat, torch.arange(0, len(flat) + 1, counts.pop()), weights)
    lengths = torch.cat([b.lengths(partial) for b in blocks])
    if partial:
        kept = torch.cat([(b.rows >= 0).reshape(-1) for b in blocks])
        flat, weights = flat[kept], None if weights is None else weights[kept]
    return BagCall(tables, flat, F.pad(lengths.cumsum(0), (1, 0)), weights)
