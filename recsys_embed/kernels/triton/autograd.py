"""Triton lookups with gradients: outputs of all features whose backward updates the tables or returns gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recsys_embed.kernels.triton.lookup import Kept, TritonLookup

Updater = Callable[[Any, Tensor, Sequence[Tensor], Any], None]


class _Lookup(Function):
    """``anchor`` requires grad where no table does: it makes autograd run the backward and receives no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        lookup: TritonLookup,
        ids: Tensor,
        updater: Updater | None,
        sparse: bool,
        *tables: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, kept = lookup.forward(ids, tables, keep=True)
        ctx.lookup, ctx.updater, ctx.sparse = lookup, updater, sparse
        # Values of the tables are not needed again, so they may change before backward, as those of a gather may.
        ctx.kept, ctx.tables = kept, tables
        ctx.save_for_backward(ids)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        gradients = [g.contiguous() for g in grads]
        kept: Kept = ctx.kept
        if ctx.updater is not None:
            ctx.updater(ctx.lookup, ids, gradients, kept)
            return (None,) * len(ctx.needs_input_grad)
        return (None,) * 5 + tuple(ctx.lookup.gradients(ids, ctx.tables, gradients, kept, ctx.sparse))


def look_up(
    lookup: TritonLookup,
    ids: Tensor,
    tables: Sequence[Tensor],
    *,
    step: Any = None,
    sparse: bool = False,
) -> tuple[Tensor, ...]:
    """Vectors of ``ids [B, F]``: per output of the lookup ``[B, width]``, in the tables' type.

    Args:
        tables: per storage ``[rows, width]``.
        step: its optimizer updates the tables in backward, which otherwise returns their gradients.
        sparse: gradients of the tables are sparse.

    Raises:
        IdRangeError: an id of this lookup, or of one before whose check has come in, is out of range.
    """
    if step is not None:
        step.catch_up(lookup, ids)
    elif not (torch.is_grad_enabled() and any(t.requires_grad for t in tables)):
        return lookup.forward(ids, tables, keep=False)[0]
    anchor, updater = (None, None) if step is None else (step.anchor, step.update)
    out: tuple[Tensor, ...] = _Lookup.apply(anchor, lookup, ids, updater, sparse, *tables)
    return out
