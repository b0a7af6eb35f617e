"""Ids of list and sequence features: any number per row and feature, selected by row without a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.errors import raise_faults


@dataclass(frozen=True, slots=True, eq=False)
class ListIds:
    """Ids of the L list and sequence features of B rows, row after row.

    Args:
        values: int32 or int64 ``[n]``: the ids of row 0, feature after feature, then those of row 1.
        offsets: int64 ``[B * L + 1]``: where the list of feature f of row b begins, at ``b * L + f``; ends with n.
        num_features: L.

    Raises:
        ConfigError: shapes or types disagree.

    Rows are taken as from a tensor, by a slice or by row numbers.

    >>> tags, seen = (torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3])), (torch.tensor([9]), torch.tensor([0, 0, 1]))
    >>> lists = ListIds.of([tags, seen])
    >>> len(lists), lists[1:].values.tolist(), lists[torch.tensor([1, 0])].values.tolist()
    (2, [7, 9], [7, 9, 5, 6])
    >>> [part.tolist() for part in lists.by_feature()]
    [[5, 6, 7, 9], [0, 2, 3, 3, 4]]
    """

    values: Tensor
    offsets: Tensor
    num_features: int

    def __post_init__(self) -> None:
        faults = []
        if self.values.dim() != 1 or self.values.dtype not in (torch.int32, torch.int64):
            faults.append(f"`values` must be int32 or int64 [n]; got {self.values.dtype} {list(self.values.shape)}")
        if self.num_features < 1:
            faults.append(f"`num_features` must be at least 1; got {self.num_features}")
        elif self.offsets.dim() != 1 or (self.offsets.numel() - 1) % self.num_features or not self.offsets.numel():
            faults.append(f"`offsets` must be [B * {self.num_features} + 1]; got {list(self.offsets.shape)}")
        if self.offsets.dtype != torch.int64:
            faults.append(f"`offsets` must be int64; got {self.offsets.dtype}")
        if faults:
            raise_faults(faults, "ListIds")

    @classmethod
    def of(cls, features: Sequence[tuple[Tensor, Tensor]]) -> ListIds:
        """From ``(values [n], offsets [B + 1])`` of each feature.

        Raises:
            ConfigError: none, or features of different numbers of rows.
        """
        rows = [len(offsets) - 1 for _, offsets in features]
        if not features or len(set(rows)) > 1:
            raise_faults([f"lists must have equally many rows; got {rows}"], "ListIds.of")
        if len(features) == 1:
            return cls(features[0][0], features[0][1], 1)
        lengths = torch.cat([offsets.diff() for _, offsets in features])
        starts = F.pad(lengths.cumsum(0), (1, 0))[:-1]
        order = torch.arange(len(lengths)).view(len(features), rows[0]).T.reshape(-1)
        values = torch.cat([values for values, _ in features])
        return cls(*_segments(values, starts[order], lengths[order]), len(features))

    @classmethod
    def cat(cls, parts: Sequence[ListIds]) -> ListIds:
        """The rows of several, one after another.

        Raises:
            ConfigError: they are of different numbers of features.
        """
        if len({p.num_features for p in parts}) > 1:
            raise_faults([f"`num_features` must be one; got {[p.num_features for p in parts]}"], "ListIds.cat")
        ends = torch.tensor([0, *(p.values.numel() for p in parts)]).cumsum(0).tolist()
        offsets = [p.offsets[1:] + end for p, end in zip(parts, ends, strict=False)]
        first = parts[0].offsets[:1] * 0
        return cls(torch.cat([p.values for p in parts]), torch.cat([first, *offsets]), parts[0].num_features)

    def __len__(self) -> int:
        return (self.offsets.numel() - 1) // self.num_features

    def __getitem__(self, rows: slice | Tensor) -> ListIds:
        if isinstance(rows, Tensor):
            return self.index_select(0, rows)
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self.index_select(0, torch.arange(start, stop, step, device=self.offsets.device))
        offsets = self.offsets[start * self.num_features : max(start, stop) * self.num_features + 1]
        return ListIds(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0], self.num_features)

    def index_select(self, dim: int, rows: Tensor) -> ListIds:
        """Given rows, int64 ``[m]``; ``dim`` must be 0, as for the parts of a batch that are tensors."""
        count = self.num_features
        lists = rows if count == 1 else (rows.unsqueeze(1) * count + torch.arange(count, device=rows.device)).view(-1)
        starts = self.offsets[lists]
        return ListIds(*_segments(self.values, starts, self.offsets[lists + 1] - starts), count)

    def by_feature(self) -> tuple[Tensor, Tensor]:
        """``values [n]``, feature after feature, and ``offsets [L * B + 1]``, as collections take bags."""
        if self.num_features == 1:
            return self.values, self.offsets
        starts = self.offsets[:-1].view(-1, self.num_features).T.reshape(-1)
        lengths = self.offsets.diff().view(-1, self.num_features).T.reshape(-1)
        return _segments(self.values, starts, lengths)

    def feature(self, number: int) -> tuple[Tensor, Tensor]:
        """``values [n]`` and ``offsets [B + 1]`` of one feature."""
        if self.num_features == 1:
            return self.values, self.offsets
        starts = self.offsets[:-1].view(-1, self.num_features)[:, number]
        lengths = self.offsets.diff().view(-1, self.num_features)[:, number]
        return _segments(self.values, starts, lengths)

    def to(self, device: torch.device | str | torch.dtype, non_blocking: bool = False) -> ListIds:
        """On another device, or with ids of another type."""
        if isinstance(device, torch.dtype):
            return ListIds(self.values.to(device), self.offsets, self.num_features)
        values = self.values.to(device, non_blocking=non_blocking)
        return ListIds(values, self.offsets.to(device, non_blocking=non_blocking), self.num_features)

    def clone(self) -> ListIds:
        """A copy."""
        return ListIds(self.values.clone(), self.offsets.clone(), self.num_features)

    def long(self) -> ListIds:
        """With int64 ids."""
        return self.to(torch.int64)

    def pin_memory(self) -> ListIds:
        """In memory that a GPU copies from asynchronously."""
        return ListIds(self.values.pin_memory(), self.offsets.pin_memory(), self.num_features)

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + self.offsets.nbytes)


def _segments(values: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces ``values[starts[i] : starts[i] + lengths[i]]`` one after another, and their offsets."""
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    moved = torch.repeat_interleave(starts - offsets[:-1], lengths)
    return values[moved + torch.arange(moved.numel(), device=values.device)], offsets
