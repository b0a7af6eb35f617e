"""Native lookups with gradients: outputs of all features whose backward updates the tables or returns gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.native import NativeLookup
from recsys_embed.kernels.outputs import OutputPool

Updater = Callable[[NativeLookup, Tensor, Sequence[Tensor]], None]


class _Lookup(Function):
    """``anchor`` requires grad where no table does: it makes autograd run the backward and receives no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        lookup: NativeLookup,
        pool: OutputPool,
        ids: Tensor,
        updater: Updater | None,
        sparse: bool,
        *tables: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = _outputs(lookup, pool, ids, tables)
        ctx.lookup, ctx.updater, ctx.sparse = lookup, updater, sparse
        ctx.save_for_backward(ids, *(() if updater else tables))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ids, *tables = ctx.saved_tensors
        gradients = [g.contiguous() for g in grads]
        if ctx.updater is not None:
            ctx.updater(ctx.lookup, ids, gradients)
            return (None,) * len(ctx.needs_input_grad)
        return (None,) * 6 + tuple(ctx.lookup.gradients(ids, tables, gradients, ctx.sparse))


def _outputs(lookup: NativeLookup, pool: OutputPool, ids: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = tuple(pool.take((ids.shape[0], width)) for width in lookup.widths)
    if not lookup.forward(ids, tables, outputs):
        raise IdRangeError("an id lies outside the range its feature declares")
    return outputs


def look_up(
    lookup: NativeLookup,
    pool: OutputPool,
    ids: Tensor,
    tables: Sequence[Tensor],
    *,
    anchor: Tensor | None = None,
    updater: Updater | None = None,
    sparse: bool = False,
) -> tuple[Tensor, ...]:
    """Vectors of ``ids [B, F]``: per output of the lookup, float32 ``[B, width]``.

    Args:
        tables: per storage, float32 ``[rows, width]``.
        updater: with ``anchor``, backward hands it the outputs' gradients instead of returning the tables'.
        sparse: gradients of the tables are sparse.

    Raises:
        IdRangeError: some id has no row; the caller knows which.
    """
    if updater is None and not (torch.is_grad_enabled() and any(t.requires_grad for t in tables)):
        return _outputs(lookup, pool, ids, tables)
    out: tuple[Tensor, ...] = _Lookup.apply(anchor, lookup, pool, ids, updater, sparse, *tables)
    return out
