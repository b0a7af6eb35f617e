"""Parts of tensor trains: factors of numbers of ids and of widths, and the train nearest to a table (TT-SVD)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Order = Literal["most_significant", "least_significant"]
_DOUBLE_BELOW = 1 << 25


def covering_factors(n: int, count: int) -> tuple[int, ...]:
    """``count`` factors near each other whose product is at least ``n``.

    >>> covering_factors(1_000_000, 3), covering_factors(1001, 3)
    ((100, 100, 100), (11, 10, 10))
    """
    out = []
    for left in range(count, 0, -1):
        # A root of an exact power must not be rounded up by its last bit.
        factor = max(1, ceil(round(n ** (1 / left), 9)))
        out.append(factor)
        n = ceil(n / factor)
    return tuple(out)


def width_factors(n: int, count: int) -> tuple[int, ...]:
    """``count`` factors of ``n``, near each other and ascending.

    >>> width_factors(64, 3), width_factors(16, 3), width_factors(10, 2)
    ((4, 4, 4), (2, 2, 4), (2, 5))
    """
    out = []
    for left in range(count, 1, -1):
        factor = max(f for f in range(1, n + 1) if n % f == 0 and f**left <= n)
        out.append(factor)
        n //= factor
    return (*out, n)


def rank_bounds(id_shape: Sequence[int], width_shape: Sequence[int]) -> tuple[int, ...]:
    """The inner ranks with which a train holds any table; larger ones add nothing.

    >>> rank_bounds((10, 10, 10), (2, 2, 4))
    (20, 40)
    """
    sizes = [p * q for p, q in zip(id_shape, width_shape, strict=True)]
    return tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes)))


def train_elements(id_shape: Sequence[int], width_shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers that the cores hold."""
    return sum(p * a * q * b for p, q, a, b in zip(id_shape, width_shape, (1, *ranks), (*ranks, 1), strict=True))


def tensor_train_of(
    weight: Tensor, id_shape: Sequence[int], width_shape: Sequence[int], ranks: Sequence[int], order: Order
) -> list[Tensor]:
    """Cores whose train is nearly the nearest to a table in least squares (TT-SVD, Oseledets 2011, theorem 2.2).

    The squared error is at most the sum of what the truncations to each rank leave, so it is at most ``d - 1`` times
    the least possible one. Cores have equal norms.

    Args:
        weight: ``[prod(id_shape), width]``.
        order: of the digits of an id.

    Returns:
        Core k as ``[id_shape[k], ranks[k - 1] * width_shape[k] * ranks[k]]``, of the dtype that computed them.
    """
    count, dtype = len(id_shape), torch.float64 if weight.numel() <= _DOUBLE_BELOW else torch.float32
    digits = list(range(count)) if order == "most_significant" else list(range(count))[::-1]
    tensor = weight.to(dtype).view(*(id_shape[k] for k in digits), *width_shape)
    # To one dimension pair (digit, columns) per core.
    rest = tensor.permute(*(axis for k in range(count) for axis in (digits.index(k), count + k)))
    cores, before = [], 1
    for k, rank in enumerate(ranks):
        matrix = rest.reshape(before * id_shape[k] * width_shape[k], -1)
        left, rest = _leading(matrix, rank)
        cores.append(left.reshape(before, id_shape[k], width_shape[k], rank))
        before = rank
    cores.append(rest.reshape(before, id_shape[-1], width_shape[-1], 1))
    norms = torch.stack([core.norm() for core in cores])
    if (norms > 0).all():
        cores = [core * float(norms.log().mean().exp() / norm) for core, norm in zip(cores, norms, strict=True)]
    return [core.transpose(0, 1).reshape(p, -1) for core, p in zip(cores, id_shape, strict=True)]


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank: orthonormal columns ``[m, rank]`` times ``[rank, n]``; zeros beyond its own."""
    rows, columns = matrix.shape
    if rows <= columns:
        basis = torch.linalg.eigh((matrix @ matrix.T).double()).eigenvectors.flip(1)[:, :rank]
    else:
        right = torch.linalg.eigh((matrix.T @ matrix).double()).eigenvectors.flip(1)[:, :rank]
        basis = torch.linalg.qr(matrix.double() @ right).Q
    basis = basis.to(matrix.dtype)
    missing = rank - basis.shape[1]
    return F.pad(basis, (0, missing)), F.pad(basis.T @ matrix, (0, 0, 0, missing))
