"""The native kernels as custom torch operators, which compiled models call.

Operators only take tensors and numbers, so a lookup and the module that owns the optimizer are passed as handles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.library import custom_op

from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.native.handles import KNOWN
from recsys_embed.kernels.native.lookup import Ids, NativeLookup, reads

if TYPE_CHECKING:
    from recsys_embed.kernels.native.autograd import NativeStep

NO_OWNER = -1


class Stepper(Protocol):
    """The owner of the optimizer of some tables."""

    training: bool

    def before_compiled_lookup(self) -> None:
        """Refuse a lookup that cannot be trained, or prepare it."""

    def step_native(
        self,
        lookup: NativeLookup,
        ids: Ids,
        tables: list[Tensor],
        states: list[Tensor],
        grads: list[Tensor],
        kept: Tensor,
        collects: bool,
    ) -> None:
        """One step on ``tables`` and the flat list of their ``states``, in place."""

    def catch_up_native(self, lookup: NativeLookup, ids: Ids, tables: list[Tensor], states: list[Tensor]) -> None:
        """Apply the deferred steps of rows that ids read, in place."""


@custom_op("recsys_embed::look_up", mutates_args=())
def _look_up(
    ids: Tensor,
    bags: list[Tensor],
    batch: int,
    tables: list[Tensor],
    states: list[Tensor],
    collects: bool,
    lookup: int,
    owner: int,
) -> list[Tensor]:
    if owner != NO_OWNER and cast("Stepper", KNOWN[owner]).training:
        cast("Stepper", KNOWN[owner]).before_compiled_lookup()
    found, given = cast("NativeLookup", KNOWN[lookup]), _ids(ids, bags, batch)
    like = tables[0].detach()
    kept = like.new_empty(found.kept_shape(given), dtype=torch.float32)
    out = [like.new_empty(batch, width, dtype=torch.float32) for width in found.widths]
    # Tables that train are checked by the lookup; served ones of other types here.
    served = any(t.dtype is not torch.float32 for t in tables) and reads(ids, tables)
    if not found.forward(given, tables, out, kept if found.kept_width else None, known=served):
        raise IdRangeError("an id lies outside the range its feature declares; the uncompiled collection says which")
    return [*out, *found.arrays_as_numbers(), kept]


@_look_up.register_fake
def _(
    ids: Tensor,
    bags: list[Tensor],
    batch: int,
    tables: list[Tensor],
    states: list[Tensor],
    collects: bool,
    lookup: int,
    owner: int,
) -> list[Tensor]:
    found, like = cast("NativeLookup", KNOWN[lookup]), tables[0].detach()
    rows, width = batch, found.kept_width
    if bags:  # the size of saved values depends on the lengths of bags
        rows, width = (cast("int", torch.library.get_ctx().new_dynamic_size()), 1) if width else (0, 1)
    arrays = [torch.empty_like(numbers, device=like.device) for numbers in found.arrays_as_numbers()]
    vectors = (like.new_empty(batch, w, dtype=torch.float32) for w in found.widths)
    return [*vectors, *arrays, like.new_empty(rows, width, dtype=torch.float32)]


def _ids(ids: Tensor, bags: list[Tensor], batch: int) -> Ids:
    """Ids ``[B, F]``, or bags with offsets and optional weights."""
    if not bags:
        return Ids.matrix(ids)
    return Ids(ids, bags[0], bags[1] if len(bags) > 1 else None, batch)


@custom_op("recsys_embed::look_up_gradients", mutates_args=())
def _gradients(
    ids: Tensor,
    bags: list[Tensor],
    batch: int,
    tables: list[Tensor],
    grads: list[Tensor],
    kept: Tensor,
    arrays: list[Tensor],
    lookup: int,
) -> list[Tensor]:
    known = cast("NativeLookup", KNOWN[lookup])
    known.check_numbers(arrays)
    found = known.gradients(_ids(ids, bags, batch), tables, grads, kept, "dense")
    return cast("list[Tensor]", found)


@_gradients.register_fake
def _(
    ids: Tensor,
    bags: list[Tensor],
    batch: int,
    tables: list[Tensor],
    grads: list[Tensor],
    kept: Tensor,
    arrays: list[Tensor],
    lookup: int,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in tables]


@custom_op("recsys_embed::look_up_step", mutates_args=("tables", "states"))
def _step(
    ids: Tensor,
    bags: list[Tensor],
    batch: int,
    tables: list[Tensor],
    states: list[Tensor],
    grads: list[Tensor],
    kept: Tensor,
    arrays: list[Tensor],
    collects: bool,
    lookup: int,
    owner: int,
) -> None:
    known = cast("NativeLookup", KNOWN[lookup])
    known.check_numbers(arrays)
    cast("Stepper", KNOWN[owner]).step_native(known, _ids(ids, bags, batch), tables, states, grads, kept, collects)


@custom_op("recsys_embed::catch_up", mutates_args=("tables", "states"))
def _catch_up(
    ids: Tensor, bags: list[Tensor], batch: int, tables: list[Tensor], states: list[Tensor], lookup: int, owner: int
) -> None:
    stepper = cast("Stepper", KNOWN[owner])
    stepper.catch_up_native(cast("NativeLookup", KNOWN[lookup]), _ids(ids, bags, batch), tables, states)


_Inputs: TypeAlias = tuple[Tensor, list[Tensor], int, list[Tensor], list[Tensor], bool, int, int]
"""Arguments of ``_look_up``."""


class _Context(Protocol):
    """Saved for backward; ``held``: tensors that an optimizer updates, ``parts``: counts of bag and array tensors."""

    batch: int
    lookup: int
    owner: int
    parts: tuple[int, int]
    collects: bool
    held: tuple[list[Tensor], list[Tensor]]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _save(ctx: _Context, inputs: _Inputs, output: list[Tensor]) -> None:
    ids, bags, ctx.batch, tables, states, ctx.collects, ctx.lookup, ctx.owner = inputs
    arrays = output[len(cast("NativeLookup", KNOWN[ctx.lookup]).widths) : -1]
    ctx.parts = len(bags), len(arrays)
    if ctx.owner == NO_OWNER:
        ctx.held = [], []
        ctx.save_for_backward(ids, output[-1], *bags, *arrays, *tables)
        return
    # What is updated is not saved: another part of the same backward may have stepped it, which is no error.
    ctx.held = tables, states
    ctx.save_for_backward(ids, output[-1], *bags, *arrays)


def _backward(ctx: _Context, grads: list[Tensor]) -> tuple[Tensor | list[Tensor] | list[None] | None, ...]:
    ids, kept, *saved = ctx.saved_tensors
    count, more = ctx.parts
    bags, arrays, saved = saved[:count], saved[count : count + more], saved[count + more :]
    none: list[None] = [None] * count
    given = [g.contiguous() for g in grads[: -1 - more]]
    if ctx.owner == NO_OWNER:
        found = _gradients(ids, bags, ctx.batch, saved, given, kept, arrays, ctx.lookup)
        return None, none, None, found, [], None, None, None
    tables, states = ctx.held
    with torch.no_grad():
        _step(ids, bags, ctx.batch, tables, states, given, kept, arrays, ctx.collects, ctx.lookup, ctx.owner)
    return None, none, None, [None] * len(tables), [None] * len(states), None, None, None


_look_up.register_autograd(_backward, setup_context=_save)


def look_up(lookup: NativeLookup, ids: Ids, tables: list[Tensor], step: NativeStep | None) -> list[Tensor]:
    """Vectors of ids or bags as :func:`recsys_embed.kernels.native.autograd.look_up` has them, for compiled models.

    Gradients of tables are dense.
    """
    bags = [t for t in (ids.offsets, ids.weights) if t is not None]
    given = ids.values, bags, ids.batch
    if step is None:
        return _look_up(*given, tables, [], False, lookup.handle, NO_OWNER)[: len(lookup.widths)]
    if step.lazy:
        _catch_up(*given, tables, step.states, lookup.handle, step.owner)
    return _look_up(*given, tables, step.states, step.collects, lookup.handle, step.owner)[: len(lookup.widths)]
