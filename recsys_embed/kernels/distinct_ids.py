"""The distinct ids of a batch: rows that are computed, rather than stored, are computed once for each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recsys_embed.kernels.recording import hidden


class DistinctIds(NamedTuple):
    """Distinct ids, and where each id of the batch stands among them.

    Args:
        ids: int64 ``[m]``.
        places: int64 ``[n]``; None where ``ids`` are those of the batch as they are.
    """

    ids: Tensor
    places: Tensor | None

    def scatter(self, vectors: Tensor) -> Tensor:
        """Vectors ``[n, width]`` of the batch, given those of the distinct ids ``[m, width]``.

        Its backward sums the gradients of equal ids.
        """
        return vectors if self.places is None else vectors.index_select(0, self.places)


def distinct_ids(ids: Tensor) -> DistinctIds:
    """The distinct ones of int64 ``ids [n]``.

    Where their number must not decide what runs (compiled, exported and traced models, ``vmap``, graphs of a GPU), ids
    stay as they are.

    >>> found = distinct_ids(torch.tensor([7, 2, 7]))
    >>> found.ids.tolist(), found.scatter(torch.tensor([[0.2], [0.7]])).squeeze(1).tolist()
    ([2, 7], [0.699999988079071, 0.20000000298023224, 0.699999988079071])
    """
    if ids.shape[0] < 2 or type(ids) is not Tensor or hidden(ids) or ids.is_meta or _captured(ids):
        return DistinctIds(ids, None)
    found, places = torch.unique(ids, return_inverse=True)
    return DistinctIds(ids, None) if found.shape == ids.shape else DistinctIds(found, places)


def _captured(ids: Tensor) -> bool:
    """Whether a graph of a GPU is captured, in which shapes cannot depend on values."""
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()
