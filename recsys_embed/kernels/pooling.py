"""Pooling of vectors over bags, as torch does it."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from recsys_embed.kernels.derivatives import have_tangents, transformed

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
        skipped: bool ``[n]``, vectors to leave out; means do not count them.

    >>> rows = torch.tensor([[1.0], [2.0], [4.0]])
    >>> pool_vectors(rows, torch.tensor([0, 1]), "mean", skipped=torch.tensor([False, True, False])).tolist()
    [[1.0], [4.0]]
    """
    weights = None if weights is None else weights.to(vectors.dtype)
    # Torch's own error where weights come with another mode.
    plain = weights is None or mode == "sum"
    if plain and not torch.compiler.is_compiling() and not torch._C._is_tracing():
        if transformed() or have_tangents((vectors, weights)):
            return _by_torch(vectors, offsets, mode, weights, skipped, include_last_offset)
        learns = vectors.requires_grad or (weights is not None and weights.requires_grad)
        if learns and torch.is_grad_enabled():
            out: Tensor = _Pool.apply(vectors, weights, offsets, mode, skipped, include_last_offset)
            return out
    order = torch.arange(vectors.shape[0], device=vectors.device)
    if skipped is not None:
        vectors = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
    elif not torch.compiler.is_exporting() and (torch.compiler.is_compiling() or vectors.shape[0] == 0):
        # An empty input must stay connected to the graph. Programs must not branch on an input's size, so compiled
        # ones always append a row.
        vectors = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
    if skipped is None or (weights is not None and mode != "sum"):
        return F.embedding_bag(
            order, vectors, offsets, mode=mode, per_sample_weights=weights, include_last_offset=include_last_offset
        )
    # Not F.embedding_bag: with a padding index, it makes the number of ids constant in compiled and exported programs.
    return _bags(vectors, torch.where(skipped, 0, order + 1), offsets, mode, weights, include_last_offset, 0)[0]


def _bags(
    vectors: Tensor,
    order: Tensor,
    offsets: Tensor,
    mode: str,
    weights: Tensor | None,
    include_last_offset: bool,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Torch's pooled vectors, the bag of each id, the number of ids of each bag, and the row of each maximum."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch._embedding_bag(
        vectors, order, offsets, False, _MODES[mode], False, weights, include_last_offset, padding
    )
    return found


class _Context(Protocol):
    """What pooling saves for backward."""

    mode: str
    rows: int
    include_last_offset: bool

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Pool(Function):
    """Torch's pooling, whose gradients can be differentiated again and be batched, unlike torch's own."""

    @staticmethod
    def forward(
        ctx: _Context,
        vectors: Tensor,
        weights: Tensor | None,
        offsets: Tensor,
        mode: str,
        skipped: Tensor | None,
        include_last_offset: bool,
    ) -> Tensor:
        ctx.mode, ctx.rows, ctx.include_last_offset = mode, vectors.shape[0], include_last_offset
        order, rows = torch.arange(vectors.shape[0], device=vectors.device), vectors
        if skipped is not None:
            order, rows = torch.where(skipped, 0, order + 1), torch.cat([vectors.new_zeros(1, vectors.shape[1]), rows])
        elif not ctx.rows:
            rows = vectors.new_zeros(1, vectors.shape[1])
        padding = -1 if skipped is None else 0
        out, _, counts, largest = _bags(rows, order, offsets, mode, weights, include_last_offset, padding)
        of_weights = weights is not None and weights.requires_grad
        rows_of_largest = None if mode != "max" else largest if skipped is None else largest - 1
        ctx.save_for_backward(vectors if of_weights else None, weights, offsets, skipped, counts, rows_of_largest)
        return out

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        vectors, weights, offsets, skipped, counts, largest = ctx.saved_tensors
        (grad,) = grads
        if counts is None or offsets is None:
            return (None,) * 6
        if largest is not None:
            filled = (counts[: grad.shape[0]] > 0).unsqueeze(1)
            at = torch.where(filled, largest, 0)
            found = grad.new_zeros(ctx.rows, grad.shape[1])
            found = found if not ctx.rows else found.scatter_add(0, at, grad * filled)
            return found, None, None, None, None, None
        bag, outside = _bag_of_each(offsets, ctx.rows, ctx.include_last_offset)
        outside = outside if skipped is None else skipped if outside is None else outside | skipped
        if ctx.mode == "mean":
            grad = grad * counts[: grad.shape[0]].clamp_min(1).to(grad.dtype).reciprocal().unsqueeze(1)
        moved = grad.index_select(0, bag) if grad.shape[0] else grad.new_zeros(ctx.rows, grad.shape[1])
        if outside is not None:
            moved = moved.masked_fill(outside.unsqueeze(1), 0.0)
        of_weights = None if vectors is None else (moved * vectors).sum(1)
        return moved if weights is None else moved * weights.unsqueeze(1), of_weights, None, None, None, None


def _bag_of_each(offsets: Tensor, rows: int, include_last_offset: bool) -> tuple[Tensor, Tensor | None]:
    """The bag of each row, and a mask of those in none: int64 and bool ``[rows]``."""
    place = torch.arange(rows, device=offsets.device)
    if include_last_offset:
        bag = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
        outside = bag >= offsets.shape[0] - 1
        return bag.clamp_max(max(offsets.shape[0] - 2, 0)), outside
    return torch.searchsorted(offsets[1:].contiguous(), place, right=True), None


def _by_torch(
    vectors: Tensor,
    offsets: Tensor,
    mode: str,
    weights: Tensor | None,
    skipped: Tensor | None,
    include_last_offset: bool,
) -> Tensor:
    """As :func:`pool_vectors`, by operations that ``torch.func`` and forward mode differentiate."""
    bags, (rows, width) = offsets.shape[0] - int(include_last_offset), vectors.shape
    bag, outside = _bag_of_each(offsets, rows, include_last_offset)
    outside = outside if skipped is None else skipped if outside is None else outside | skipped
    # Vectors that no bag takes go to a bag of their own.
    bag = bag if outside is None else torch.where(outside, bags, bag)
    if mode == "max":
        return _maxima(vectors, bag, bags)
    if weights is not None:
        vectors = vectors * weights.unsqueeze(1)
    sums = vectors.new_zeros(bags + 1, width).index_add(0, bag, vectors)[:bags]
    if mode == "sum":
        return sums
    ones = torch.ones(rows, dtype=vectors.dtype, device=vectors.device)
    counts = torch.zeros(bags + 1, dtype=vectors.dtype, device=vectors.device).index_add(0, bag, ones)[:bags]
    return sums / counts.clamp_min(1).unsqueeze(1)


def _maxima(vectors: Tensor, bag: Tensor, bags: int) -> Tensor:
    """The first of the largest elements of each bag."""
    rows, width = vectors.shape
    if not rows:
        return vectors.new_zeros(bags, width)
    fixed, at = vectors.detach(), bag.unsqueeze(1).expand(rows, width)
    most = fixed.new_full((bags + 1, width), -torch.inf).scatter_reduce(0, at, fixed, "amax")
    place = torch.arange(rows, device=vectors.device).unsqueeze(1).expand(rows, width)
    place = torch.where(fixed == most.gather(0, at), place, rows)
    first = torch.full((bags + 1, width), rows, device=vectors.device).scatter_reduce(0, at, place, "amin")[:bags]
    return vectors.gather(0, first.clamp_max(rows - 1)) * (first < rows)
