"""Native lookups with gradients: outputs of all features whose backward updates the tables or returns gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.deferred_gradients import DeferredGradients, RecordedLookup
from recsys_embed.kernels.derivatives import ReadTables, needs_torch_gradients
from recsys_embed.kernels.indexes import ArrayVersions, IndexStore
from recsys_embed.kernels.native.lookup import Ids, NativeLookup
from recsys_embed.kernels.native.masks import MaskParameters, masked
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.kernels.native.records import Slot
from recsys_embed.kernels.places import GradientLayout, Place
from recsys_embed.kernels.torch_gradients import gradients_by_torch

Updater = Callable[[NativeLookup, Ids, Sequence[Tensor], Sequence[Tensor], Tensor | None], None]
"""Takes a lookup's records, ids and tables, gradients of its outputs, and what forward kept."""


class NativeStep(NamedTuple):
    """What a lookup of tables with a fused optimizer does.

    Args:
        catch_up: applies the steps that the rows of ids missed, before they are read.
        update: steps the optimizer in backward; None leaves a :class:`RowGradient` per table.
        states: tensors of the optimizer's state, storage after storage.
        owner: handle of who steps, for compiled models.
        lazy: rows may have missed steps.
        collects: in compiled models, gradients wait for those of other parts of this backward.
    """

    catch_up: Callable[[NativeLookup, Ids], None]
    update: Updater | None
    states: list[Tensor]
    owner: int
    lazy: bool
    collects: bool = False


class _Context(Protocol):
    """What a lookup saves for backward."""

    lookup: NativeLookup
    updater: Updater | None
    layout: GradientLayout
    pool: OutputPool
    kept: Tensor | None
    tables: tuple[Tensor, ...]
    batch: int
    read: ReadTables | None
    arrays: ArrayVersions

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Lookup(Function):
    @staticmethod
    def forward(
        ctx: _Context,
        lookup: NativeLookup,
        pool: OutputPool,
        ids: Ids,
        updater: Updater | None,
        layout: GradientLayout,
        mask: tuple[MaskParameters, Tensor | None] | None,
        *tables: Tensor,
    ) -> tuple[Tensor, ...]:
        kept = pool.take(lookup.kept_shape(ids)) if lookup.kept_width else None
        outputs = tuple(_outputs(lookup, pool, ids, tables, kept, mask))
        ctx.lookup, ctx.updater, ctx.layout, ctx.pool = lookup, updater, layout, pool
        # Values of the tables are not needed again, so they may change before backward, as those of a gather may:
        # what products need of them is kept. Further derivatives of products do need them.
        ctx.kept, ctx.tables, ctx.batch = kept, tables, ids.batch
        # A step in backward refuses further derivatives.
        ctx.read = ReadTables(tables) if kept is not None and updater is None else None
        ctx.arrays = lookup.arrays_read()
        # Offsets are not checked again, so they are kept as they are: `.data =` does not reach what is detached.
        offsets = None if ids.offsets is None else ids.offsets.detach()
        ctx.save_for_backward(ids.values, offsets, ids.weights)
        return outputs

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, offsets, weights = ctx.saved_tensors
        ids = Ids(values, offsets, weights, ctx.batch)
        if needs_torch_gradients(grads):
            found = gradients_by_torch(
                ctx, lambda tables, sparse: ctx.lookup.by_torch(*ids, tables, sparse), grads, ctx.needs_input_grad[6:]
            )
            return (None,) * 6 + tuple(found)
        ctx.lookup.check_arrays(ctx.arrays)
        gradients = [g.contiguous() for g in grads]
        if ctx.updater is not None:
            ctx.updater(ctx.lookup, ids, ctx.tables, gradients, ctx.kept)
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[6:]
        if ctx.layout == "rows":
            ctx.lookup.check(ids, ctx.tables, gradients, ctx.kept)
            given = ids.copy(), ctx.tables, gradients, ctx.kept, ctx.pool
            recorded = RecordedLookup(ctx.lookup, *given, arrays=ctx.arrays)
            return *(None,) * 6, *DeferredGradients(recorded, wanted).of_tables()
        found = ctx.lookup.gradients(ids, ctx.tables, gradients, ctx.kept, ctx.layout, wanted, ctx.pool)
        return (None,) * 6 + tuple(found)


def _outputs(
    lookup: NativeLookup,
    pool: OutputPool,
    ids: Ids,
    tables: Sequence[Tensor],
    kept: Tensor | None = None,
    mask: tuple[MaskParameters, Tensor | None] | None = None,
) -> list[Tensor]:
    """``mask``: of the first output, and where the masked vectors go; None: in place."""
    outputs = [pool.take((ids.batch, *shape)) for shape in lookup.shapes]
    record = None
    if mask is not None:
        parameters, done = mask
        record = parameters.record(ids.values, outputs[0], outputs[0] if done is None else done)
    if not lookup.forward(ids, tables, outputs, kept, record, known=True):
        raise IdRangeError("an id lies outside the range its feature declares, or has no parameters in the mask")
    return outputs


def look_up(
    lookup: NativeLookup,
    pool: OutputPool,
    ids: Ids,
    tables: Sequence[Tensor],
    *,
    step: NativeStep | None = None,
    sparse: bool = False,
    mask: MaskParameters | None = None,
) -> Sequence[Tensor]:
    """Vectors of ids, or of bags: per output of the lookup, float32 ``[B, *shape]``.

    Args:
        tables: per storage, float32 ``[rows, width]``.
        step: of tables with a fused optimizer.
        sparse: gradients of other tables are sparse.
        mask: of the vectors of the first output, which are those of all features; ids are no bags.

    Raises:
        IdRangeError: an id has no row; the caller finds out which.
    """
    if step is not None:
        step.catch_up(lookup, ids)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tables)
    if mask is None and not learns:
        return _outputs(lookup, pool, ids, tables)
    masking = None
    if mask is not None:
        beside = learns or (torch.is_grad_enabled() and mask.learns)
        masking = mask, pool.take((ids.batch, *lookup.shapes[0])) if beside else None
    if learns:
        updater = None if step is None else step.update
        layout = "rows" if step is not None else "sparse" if sparse else "dense"
        out: Sequence[Tensor] = _Lookup.apply(lookup, pool, ids, updater, layout, masking, *tables)
    else:
        out = _outputs(lookup, pool, ids, tables, mask=masking)
    if masking is None or masking[1] is None:
        return out
    return masked(masking[0], ids.values, out[0], pool, masking[1]), *out[1:]


class SingleLookup:
    """A lookup of one program in its own tables, as drop-in modules use it.

    Args:
        program: with transforms that the kernels know.
        index: of the program.
        optional: an id of -1 means no id.
    """

    def __init__(self, program: LookupProgram, index: IndexStore, optional: bool) -> None:
        self.tables = [t.name for t in program.tables if not t.dense]
        self._lookup = NativeLookup(
            [program],
            [{name: Place(name, 0) for name in self.tables}],
            index,
            {name: (program.table(name).rows, program.table(name).width) for name in self.tables},
            [Slot(0, 0)],
            [program.combined_width],
            [0],
            [-1],
            [optional],
        )
        self._pool = OutputPool()

    def __call__(self, ids: Tensor, tables: Sequence[Tensor], sparse: bool) -> Tensor:
        """Combined vectors ``[n, combined_width]`` of resolved int64 ``ids [n]``.

        Raises:
            IdRangeError: an id has no row.
        """
        return look_up(self._lookup, self._pool, Ids.matrix(ids), tables, sparse=sparse)[0]
