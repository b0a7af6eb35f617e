"""Sums of the gradients that a batch has for one row."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_duplicates(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Each distinct row once, with the sum of its gradients in order of occurrence.

    Args:
        rows: int64 ``[n]``.
        grad: ``[n, width]``.

    Returns:
        Sorted distinct rows ``[u]`` and sums ``[u, width]``; the same bits for any thread count.

    >>> rows, sums = sum_duplicates(torch.tensor([7, 2, 7]), torch.tensor([[1.0], [2.0], [3.0]]))
    >>> rows.tolist(), sums.tolist()
    ([2, 7], [[2.0], [4.0]])
    """
    if rows.numel() == 0:
        return rows, grad
    # Table rows are below 2**31, and sorting 32-bit keys takes the radix path, several times faster than 64-bit.
    ordered, position = rows.to(torch.int32).sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=first[1:])
    starts = first.nonzero().squeeze(1)
    sums = torch.nn.functional.embedding_bag(position, grad, starts, mode="sum")
    return ordered[starts].long(), sums
