"""Dense building blocks of the models; each is checked against an independent float64 formula in the tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Sequential):
    """Linear -> [BatchNorm] -> ReLU -> [Dropout] per hidden layer, then an optional last Linear.

    Args:
        width: input floats per sample.
        hidden: sizes of the hidden layers.
        out: size of a last plain Linear; None leaves the last hidden layer as the output.
        dropout: probability of zeroing a hidden unit while training.
        batch_norm: normalise before each ReLU.

    >>> MLP(8, (4,), 1)(torch.zeros(2, 8)).shape
    torch.Size([2, 1])
    """

    def __init__(
        self, width: int, hidden: Sequence[int], out: int | None, *, dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        for size in hidden:
            layers.append(nn.Linear(width, size))
            layers += hidden_tail(size, dropout, batch_norm)
            width = size
        if out is not None:
            layers.append(nn.Linear(width, out))
            width = out
        super().__init__(*layers)
        self.out_width = width


def hidden_tail(size: int, dropout: float, batch_norm: bool) -> list[nn.Module]:
    """The layers after the Linear of a hidden layer."""
    tail: list[nn.Module] = [nn.BatchNorm1d(size)] if batch_norm else []
    tail.append(nn.ReLU(inplace=True))
    if dropout:
        tail.append(nn.Dropout(dropout))
    return tail


class InputLinear(nn.Module):
    """Linear over categorical vectors and numeric field vectors that never builds the latter.

    Equals ``nn.Linear`` over ``cat([categories, values[:, :, None] * vectors])``. As a numeric field's vector is its
    value times a constant, its share of the product is ``values @ (weight . vectors)``: one small matrix per step
    instead of a wider input, a concatenation and their gradients.

    >>> layer = InputLinear(6, 3, 2, 4)
    >>> layer(torch.zeros(5, 6), torch.zeros(5, 3), torch.zeros(3, 2)).shape
    torch.Size([5, 4])
    """

    def __init__(self, cat_width: int, num_dense: int, numeric_dim: int, out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(cat_width + num_dense * numeric_dim)
        self.weight = nn.Parameter(torch.empty(out, cat_width).uniform_(-bound, bound))
        self.numeric_weight = nn.Parameter(torch.empty(out, num_dense, numeric_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out).uniform_(-bound, bound))

    def forward(self, cat: Tensor, dense: Tensor, vectors: Tensor) -> Tensor:
        """``cat [B, cat_width], dense [B, num_dense], vectors [num_dense, numeric_dim] -> [B, out]``."""
        folded = (self.numeric_weight * vectors).sum(-1)
        return torch.addmm(F.linear(dense, folded, self.bias), cat, self.weight.t())


class FieldMLP(nn.Module):
    """MLP over categorical vectors and numeric field vectors, its first layer an :class:`InputLinear`."""

    def __init__(
        self,
        cat_width: int,
        num_dense: int,
        numeric_dim: int,
        hidden: Sequence[int],
        out: int | None,
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        first = hidden[0]
        self.first = InputLinear(cat_width, num_dense, numeric_dim, first)
        self.tail = nn.Sequential(*hidden_tail(first, dropout, batch_norm))
        self.rest = MLP(first, hidden[1:], out, dropout=dropout, batch_norm=batch_norm)
        self.out_width = self.rest.out_width

    def forward(self, cat: Tensor, dense: Tensor, vectors: Tensor) -> Tensor:
        out: Tensor = self.rest(self.tail(self.first(cat, dense, vectors)))
        return out


def pair_sum(vectors: Tensor, dense: Tensor, numeric: Tensor) -> Tensor:
    """Sum of the dot products of all pairs of field vectors: the second-order term of a factorization machine.

    ``vectors [B, V, D], dense [B, n], numeric [n, D] -> [B]``. Uses the linear-time identity
    ``sum_{i<j} <v_i, v_j> = (|sum v|^2 - sum |v|^2) / 2`` (Rendle, Factorization Machines, ICDM 2010, lemma 3.1); the
    numeric field vectors ``value * numeric`` enter by two small products.

    >>> pair_sum(torch.ones(1, 3, 2), torch.ones(1, 1), torch.ones(1, 2))
    tensor([12.])
    """
    total = torch.addmm(vectors.sum(1), dense, numeric)
    flat = vectors.flatten(1)
    squares = (flat * flat).sum(1) + (dense * dense) @ (numeric * numeric).sum(1)
    return 0.5 * ((total * total).sum(1) - squares)


class CrossVector(nn.Module):
    """Cross layers with a weight vector each: ``x_{l+1} = x_0 * <x_l, w_l> + b_l + x_l``.

    Source: Wang et al., Deep & Cross Network for Ad Click Predictions, ADKDD 2017.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(layers, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(layers, width))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for w, b in zip(self.weight, self.bias, strict=True):
            x = torch.addcmul(x + b, x0, (x @ w).unsqueeze(1))
        return x


class CrossMatrix(nn.Module):
    """Cross layers with a matrix each: ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l``.

    ``rank`` factors ``W_l = U_l V_l`` (``V_l [rank, width]``); None keeps it full.
    Source: Wang et al., DCN V2, WWW 2021, equations 1 and 2.
    """

    def __init__(self, width: int, layers: int, rank: int | None = None) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Linear(width, width)
            if rank is None
            else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
            for _ in range(layers)
        )

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.maps:
            x = torch.addcmul(x, x0, layer(x))
        return x


class PairDots(nn.Module):
    """Dot products of all pairs i < j of ``n`` field vectors: ``[B, n, D] -> [B, n (n - 1) / 2]``.

    >>> PairDots(3)(torch.ones(1, 3, 2))
    tensor([[2., 2., 2.]])
    """

    index: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        rows, cols = torch.triu_indices(n, n, offset=1)
        self.register_buffer("index", rows * n + cols, persistent=False)
        self.out_width = int(rows.numel())

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, x.transpose(1, 2)).flatten(1).index_select(1, self.index)
