"""The native kernels as operators of torch, opaque to its compiler: what compiled models call.

Operators take tensors and numbers, so the records of a lookup, and the module whose optimizer steps, go by a handle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.library import custom_op

from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.native.handles import KNOWN
from recsys_embed.kernels.native.lookup import Ids, NativeLookup

if TYPE_CHECKING:
    from recsys_embed.kernels.native.autograd import NativeStep

NOBODY = -1


class Stepper(Protocol):
    """Who owns the optimizer of some tables."""

    def step_native(
        self,
        lookup: NativeLookup,
        ids: Ids,
        tables: list[Tensor],
        states: list[Tensor],
        grads: list[Tensor],
        kept: Tensor,
    ) -> None:
        """One step on ``tables`` and the flat list of their ``states``, in place."""

    def catch_up_native(self, lookup: NativeLookup, ids: Ids, tables: list[Tensor], states: list[Tensor]) -> None:
        """Apply the steps missed by rows that ids read, in place."""


@custom_op("recsys_embed::look_up", mutates_args=())
def _look_up(
    ids: Tensor, tables: list[Tensor], states: list[Tensor], anchor: Tensor | None, lookup: int, owner: int
) -> list[Tensor]:
    found = cast("NativeLookup", KNOWN[lookup])
    out = _empty(ids, tables, lookup)
    kept = out[-1] if found.kept_width else None
    if not found.forward(Ids.matrix(ids), tables, out[:-1], kept):
        raise IdRangeError("an id lies outside the range its feature declares; the uncompiled collection says which")
    return out


@_look_up.register_fake
def _(
    ids: Tensor, tables: list[Tensor], states: list[Tensor], anchor: Tensor | None, lookup: int, owner: int
) -> list[Tensor]:
    return _empty(ids, tables, lookup)


def _empty(ids: Tensor, tables: list[Tensor], lookup: int) -> list[Tensor]:
    """Memory for the outputs of a lookup, and for what it keeps for backward."""
    found = cast("NativeLookup", KNOWN[lookup])
    like = tables[0].detach()
    return [like.new_empty(ids.shape[0], width) for width in (*found.widths, found.kept_width)]


@custom_op("recsys_embed::look_up_gradients", mutates_args=())
def _gradients(ids: Tensor, tables: list[Tensor], grads: list[Tensor], kept: Tensor, lookup: int) -> list[Tensor]:
    return cast("NativeLookup", KNOWN[lookup]).gradients(Ids.matrix(ids), tables, grads, kept, sparse=False)


@_gradients.register_fake
def _(ids: Tensor, tables: list[Tensor], grads: list[Tensor], kept: Tensor, lookup: int) -> list[Tensor]:
    return [torch.empty_like(t) for t in tables]


@custom_op("recsys_embed::look_up_step", mutates_args=("tables", "states"))
def _step(
    ids: Tensor, tables: list[Tensor], states: list[Tensor], grads: list[Tensor], kept: Tensor, lookup: int, owner: int
) -> None:
    stepper = cast("Stepper", KNOWN[owner])
    stepper.step_native(cast("NativeLookup", KNOWN[lookup]), Ids.matrix(ids), tables, states, grads, kept)


@custom_op("recsys_embed::catch_up", mutates_args=("tables", "states"))
def _catch_up(ids: Tensor, tables: list[Tensor], states: list[Tensor], lookup: int, owner: int) -> None:
    stepper = cast("Stepper", KNOWN[owner])
    stepper.catch_up_native(cast("NativeLookup", KNOWN[lookup]), Ids.matrix(ids), tables, states)


_Inputs: TypeAlias = tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, int, int]
"""Arguments of ``_look_up``."""


class _Context(Protocol):
    """What a lookup keeps for its backward; ``tables`` and ``states`` say how many there are."""

    lookup: int
    owner: int
    tables: int
    states: int

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _save(ctx: _Context, inputs: _Inputs, output: list[Tensor]) -> None:
    ids, tables, states, _, ctx.lookup, ctx.owner = inputs
    ctx.tables, ctx.states = len(tables), len(states)
    ctx.save_for_backward(ids, output[-1], *tables, *states)


def _backward(ctx: _Context, grads: list[Tensor]) -> tuple[Tensor | list[Tensor] | list[None] | None, ...]:
    ids, kept, *rest = ctx.saved_tensors
    tables, states = rest[: ctx.tables], rest[ctx.tables :]
    given = [g.contiguous() for g in grads[:-1]]
    none: list[None] = [None] * len(states)
    if ctx.owner == NOBODY:
        return None, _gradients(ids, tables, given, kept, ctx.lookup), none, None, None, None
    with torch.no_grad():
        _step(ids, tables, states, given, kept, ctx.lookup, ctx.owner)
    return None, [None] * len(tables), none, None, None, None


_look_up.register_autograd(_backward, setup_context=_save)


def look_up(lookup: NativeLookup, ids: Tensor, tables: list[Tensor], step: NativeStep | None) -> list[Tensor]:
    """Vectors of ``ids [B, F]`` as :func:`recsys_embed.kernels.native.autograd.look_up` has them, for compiled models.

    Gradients of tables are dense.
    """
    if step is None:
        return _look_up(ids, tables, [], None, lookup.handle, NOBODY)[:-1]
    if step.lazy:
        _catch_up(ids, tables, step.states, lookup.handle, step.owner)
    return _look_up(ids, tables, step.states, step.anchor, lookup.handle, step.owner)[:-1]
