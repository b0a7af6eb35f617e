"""Native lookups with gradients: outputs of all features whose backward updates the tables or returns gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.native.lookup import Ids, NativeLookup
from recsys_embed.kernels.native.masks import MaskParameters, masked
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.kernels.native.records import Slot
from recsys_embed.kernels.places import Place

Updater = Callable[[NativeLookup, Ids, Sequence[Tensor], Tensor | None], None]


class NativeStep(NamedTuple):
    """What a lookup whose backward steps an optimizer does.

    Args:
        anchor: requires grad, so that autograd runs the backward.
        catch_up: applies the steps that the rows of ids missed, before they are read.
        update: gets the outputs' gradients in backward.
        states: tensors of the optimizer's state, storage after storage.
        owner: handle of who steps, for compiled models.
        lazy: rows may have missed steps.
    """

    anchor: Tensor
    catch_up: Callable[[NativeLookup, Ids], None]
    update: Updater
    states: list[Tensor]
    owner: int
    lazy: bool


class _Context(Protocol):
    """What a lookup keeps for its backward."""

    lookup: NativeLookup
    updater: Updater | None
    sparse: bool
    kept: Tensor | None
    tables: tuple[Tensor, ...]
    batch: int

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Lookup(Function):
    """``anchor`` requires grad where no table does: it makes autograd run the backward and receives no gradient."""

    @staticmethod
    def forward(
        ctx: _Context,
        anchor: Tensor | None,
        lookup: NativeLookup,
        pool: OutputPool,
        ids: Ids,
        updater: Updater | None,
        sparse: bool,
        mask: tuple[MaskParameters, Tensor | None] | None,
        *tables: Tensor,
    ) -> tuple[Tensor, ...]:
        kept = pool.take(lookup.kept_shape(ids)) if lookup.kept_width else None
        outputs = tuple(_outputs(lookup, pool, ids, tables, kept, mask))
        ctx.lookup, ctx.updater, ctx.sparse = lookup, updater, sparse
        # Values of the tables are not needed again, so they may change before backward, as those of a gather may.
        ctx.kept, ctx.tables, ctx.batch = kept, tables, ids.batch
        ctx.save_for_backward(ids.values, ids.offsets, ids.weights)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, offsets, weights = ctx.saved_tensors
        ids = Ids(values, offsets, weights, ctx.batch)
        gradients = [g.contiguous() for g in grads]
        if ctx.updater is not None:
            ctx.updater(ctx.lookup, ids, gradients, ctx.kept)
            return (None,) * len(ctx.needs_input_grad)
        return (None,) * 7 + tuple(ctx.lookup.gradients(ids, ctx.tables, gradients, ctx.kept, ctx.sparse))


def _outputs(
    lookup: NativeLookup,
    pool: OutputPool,
    ids: Ids,
    tables: Sequence[Tensor],
    kept: Tensor | None = None,
    mask: tuple[MaskParameters, Tensor | None] | None = None,
) -> list[Tensor]:
    """``mask``: of the first output, and where to put what it makes of it; None: in its place."""
    outputs = [pool.take((ids.batch, *shape)) for shape in lookup.shapes]
    record = None
    if mask is not None:
        parameters, done = mask
        record = parameters.record(ids.values, outputs[0], outputs[0] if done is None else done)
    if not lookup.forward(ids, tables, outputs, kept, record):
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
        step: its optimizer updates the tables in backward, which otherwise returns their gradients.
        sparse: gradients of the tables are sparse.
        mask: of the vectors of the first output, which are those of all features; ids are no bags.

    Raises:
        IdRangeError: some id has no row; the caller knows which.
    """
    learns = step is not None or (torch.is_grad_enabled() and any(t.requires_grad for t in tables))
    if mask is None and not learns:
        return _outputs(lookup, pool, ids, tables)
    if step is not None:
        step.catch_up(lookup, ids)
    masking = None
    if mask is not None:
        beside = learns or (torch.is_grad_enabled() and mask.learns)
        masking = mask, pool.take((ids.batch, *lookup.shapes[0])) if beside else None
    if learns:
        anchor, updater = (None, None) if step is None else (step.anchor, step.update)
        out: Sequence[Tensor] = _Lookup.apply(anchor, lookup, pool, ids, updater, sparse, masking, *tables)
    else:
        out = _outputs(lookup, pool, ids, tables, mask=masking)
    if masking is None or masking[1] is None:
        return out
    return masked(masking[0], ids.values, out[0], pool, masking[1]), *out[1:]


class SingleLookup:
    """One program over tables of its own, as a drop-in runs it.

    Args:
        program: the kernels know its transforms.
        index: of the program.
        optional: the id -1 is none.
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
