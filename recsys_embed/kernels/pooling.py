"""Pooling of vectors over bags, as torch does it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MODES = {"sum": 0, "mean": 1, "max": 2}


def pool_vectors(
    vectors: Tensor,
    offsets: Tensor,
    mode: str,
    weights: Tensor | None = None,
    skipped: Tensor | None = None,
    include_last_offset: bool = False,
) -> Tensor:
    """Pool each bag's rows of ``vectors [n, width]``, in order: ``[bags, width]``; empty bags give zeros.

    Args:
        offsets: int64 ``[bags]``, or ``[bags + 1]`` with ``include_last_offset``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        weights: ``[n]``, of any float type, for sums.
        skipped: bool ``[n]``, what bags do without; means do not count it.

    >>> rows = torch.tensor([[1.0], [2.0], [4.0]])
    >>> pool_vectors(rows, torch.tensor([0, 1]), "mean", skipped=torch.tensor([False, True, False])).tolist()
    [[1.0], [4.0]]
    """
    order = torch.arange(vectors.shape[0], device=vectors.device)
    weights = None if weights is None else weights.to(vectors.dtype)
    # The empty case is autograd's; an exported program must not ask for a size that its input decides.
    if skipped is not None or (not torch.compiler.is_exporting() and vectors.shape[0] == 0):
        vectors = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])  # stays in the graph
    if skipped is None or (weights is not None and mode != "sum"):
        return F.embedding_bag(
            order, vectors, offsets, mode=mode, per_sample_weights=weights, include_last_offset=include_last_offset
        )
    order = torch.where(skipped, 0, order + 1)
    # Not F.embedding_bag, which with a padding index fixes the number of ids in compiled and exported programs.
    out: Tensor = torch._embedding_bag(
        vectors, order, offsets, False, _MODES[mode], False, weights, include_last_offset, 0
    )[0]
    return out
