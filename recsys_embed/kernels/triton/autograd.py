"""Triton lookups with gradients: outputs of all features whose backward updates the tables or returns gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from recsys_embed.kernels import pointers
from recsys_embed.kernels.deferred_gradients import DeferredGradients, RecordedLookup
from recsys_embed.kernels.derivatives import ReadTables, needs_torch_gradients
from recsys_embed.kernels.places import GradientLayout
from recsys_embed.kernels.torch_gradients import gradients_by_torch
from recsys_embed.kernels.triton.lookup import Kept, TritonLookup

Updater = Callable[[Any, Tensor, Sequence[Tensor], Sequence[Tensor], Any], None]


class _Lookup(Function):
    @staticmethod
    def forward(
        ctx: Any,
        lookup: TritonLookup,
        ids: Tensor,
        updater: Updater | None,
        layout: GradientLayout,
        *tables: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, kept = lookup.forward(ids, tables, keep=True)
        ctx.lookup, ctx.updater, ctx.layout = lookup, updater, layout
        # Values of the tables are not needed again, so they may change before backward, as those of a gather may.
        ctx.kept, ctx.tables = kept, tables
        ctx.read = ReadTables(tables) if lookup.tables.kept and updater is None else None
        ctx.arrays = lookup.arrays_read()
        ctx.save_for_backward(ids)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        if needs_torch_gradients(grads):
            run = ctx.lookup.by_torch
            return (None,) * 4 + tuple(
                gradients_by_torch(
                    ctx,
                    lambda tables, sparse: run(ids, None, None, ids.shape[0], tables, sparse),
                    grads,
                    ctx.needs_input_grad[4:],
                )
            )
        gradients = [g.contiguous() for g in grads]
        kept: Kept = ctx.kept
        if ctx.updater is not None:
            ctx.updater(ctx.lookup, ids, ctx.tables, gradients, kept)
            return (None,) * len(ctx.needs_input_grad)
        wanted = [needed and i in ctx.lookup.read for i, needed in enumerate(ctx.needs_input_grad[4:])]
        if ctx.layout == "rows":
            pointers.check(pointers.faults(ids, (ids.dtype,), 0, "ids", strided=True, device=ids.device))
            # Forward kept the rows that it found, so that nothing reads the index arrays again.
            recorded = RecordedLookup(ctx.lookup, ids.clone(), ctx.tables, gradients, kept)
            return *(None,) * 4, *DeferredGradients(recorded, wanted).of_tables()
        return (None,) * 4 + tuple(ctx.lookup.gradients(ids, ctx.tables, gradients, kept, ctx.layout, wanted))


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
        step: of tables with a fused optimizer.
        sparse: gradients of other tables are sparse.

    Raises:
        IdRangeError: an id is out of range, in this lookup or in an earlier one whose check has finished.
    """
    if step is not None:
        step.catch_up(lookup, ids)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tables)):
        return lookup.forward(ids, tables, keep=False)[0]
    updater = None if step is None else step.update
    layout = "rows" if step is not None else "sparse" if sparse else "dense"
    out: tuple[Tensor, ...] = _Lookup.apply(lookup, ids, updater, layout, *tables)
    return out
