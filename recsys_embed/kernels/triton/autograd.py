"""Triton lookups with gradients: outputs of all features whose backward updates the tables or returns gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from recsys_embed.kernels import pointers
from recsys_embed.kernels.deferred_gradients import DeferredGradients
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.derivatives import (
    ReadTables,
    are_batched,
    beyond_kernels,
    differentiable_gradients,
    refuse_further_derivatives,
)
from recsys_embed.kernels.places import GradientLayout
from recsys_embed.kernels.triton.lookup import Kept, TritonLookup
from recsys_embed.optim import FusedOptimizer

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
        ctx.read = ReadTables(tables) if lookup.tables.kept else None
        ctx.save_for_backward(ids)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        if beyond_kernels(grads):
            return (None,) * 4 + tuple(_further(ctx, ids, grads))
        gradients = [g.contiguous() for g in grads]
        kept: Kept = ctx.kept
        if ctx.updater is not None:
            ctx.updater(ctx.lookup, ids, ctx.tables, gradients, kept)
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[4:]
        if ctx.layout == "rows":
            pointers.check(pointers.faults(ids, (ids.dtype,), 0, "ids", strided=True, device=ids.device))
            recorded = _Recorded(ctx.lookup, ids.clone(), ctx.tables, gradients, kept)
            return *(None,) * 4, *DeferredGradients(recorded, wanted).of_tables()
        return (None,) * 4 + tuple(ctx.lookup.gradients(ids, ctx.tables, gradients, kept, ctx.layout, wanted))


def _further(ctx: Any, ids: Tensor, grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients by torch's operations, of which there are further derivatives."""
    if ctx.updater is not None:
        refuse_further_derivatives()
    if ctx.read is not None:
        ctx.read.check(ctx.tables)
    # Torch has neither batched sparse gradients nor products of sparse gradients.
    sparse = ctx.layout == "sparse" and ctx.read is None and not are_batched(grads)
    torch_lookup = ctx.lookup.by_torch
    return differentiable_gradients(
        lambda tables: torch_lookup(ids, None, None, ids.shape[0], tables, sparse),
        ctx.tables,
        grads,
        ctx.needs_input_grad[4:],
    )


class _Recorded:
    """A lookup and what its backward was given; see :class:`DeferredLookup`."""

    def __init__(
        self, lookup: TritonLookup, ids: Tensor, tables: Sequence[Tensor], gradients: Sequence[Tensor], kept: Kept
    ) -> None:
        self.tables, self.read = tables, gradients
        self._lookup, self._ids, self._given, self._kept = lookup, ids, gradients, kept

    def gradients(self, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        return self._lookup.gradients(self._ids, self.tables, self._given, self._kept, "rows", wanted)

    def step(
        self,
        rule: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        logs: Sequence[StepLog],
        frozen: Sequence[int],
    ) -> None:
        self._lookup.update(self._ids, self.tables, self._given, self._kept, rule, states, logs, frozen)


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
