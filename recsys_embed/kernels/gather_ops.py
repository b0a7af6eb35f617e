"""Gathers whose backward updates the table, as custom torch operators for compiled models.

The compiler cannot trace the optimizer's Python state: step counts, a lock, deferred steps. So the gather, the update
in backward and the deferred steps are operators, which run uncompiled and refer to their owner by handle.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.library import custom_op

from recsys_embed.kernels.native.handles import KNOWN


class RowStepper(Protocol):
    """The owner of the optimizer of some storages."""

    training: bool

    def before_compiled_gather(self) -> None:
        """Refuse a lookup that cannot be trained, or prepare it."""

    def step_rows(self, storage: str, rows: Tensor, grad: Tensor, table: Tensor, states: list[Tensor]) -> None:
        """One step on the rows of ``table`` and of the list of its ``states``, in place."""

    def catch_up_rows(self, storage: str, rows: Tensor, table: Tensor, states: list[Tensor]) -> None:
        """Apply the deferred steps of rows of ``table``, in place."""

    def catch_up_all(self, tables: list[Tensor], states: list[Tensor]) -> None:
        """Apply all deferred steps to ``tables`` and the flat list of their ``states``, in place."""


@custom_op("recsys_embed::gather", mutates_args=())
def _gather(
    rows: Tensor,
    table: Tensor,
    states: list[Tensor],
    partial: bool,
    storage: str,
    owner: int,
) -> Tensor:
    stepper = cast("RowStepper", KNOWN[owner])
    if stepper.training:
        stepper.before_compiled_gather()
    return table.index_select(0, rows.clamp_min(0) if partial else rows)


@_gather.register_fake
def _(
    rows: Tensor,
    table: Tensor,
    states: list[Tensor],
    partial: bool,
    storage: str,
    owner: int,
) -> Tensor:
    return table.new_empty(rows.shape[0], table.shape[1])


@custom_op("recsys_embed::gather_step", mutates_args=("table", "states"))
def _step(
    rows: Tensor,
    grad: Tensor,
    table: Tensor,
    states: list[Tensor],
    partial: bool,
    storage: str,
    owner: int,
) -> None:
    if partial:
        present = rows >= 0
        rows, grad = rows[present], grad[present]
    cast("RowStepper", KNOWN[owner]).step_rows(storage, rows, grad.contiguous(), table, states)


@custom_op("recsys_embed::catch_up_rows", mutates_args=("table", "states"))
def _catch_up(rows: Tensor, table: Tensor, states: list[Tensor], storage: str, owner: int) -> None:
    cast("RowStepper", KNOWN[owner]).catch_up_rows(storage, rows, table, states)


@custom_op("recsys_embed::catch_up_all", mutates_args=("tables", "states"))
def catch_up_all(tables: list[Tensor], states: list[Tensor], owner: int) -> None:
    """Apply all deferred steps of the tables of an owner, in place."""
    cast("RowStepper", KNOWN[owner]).catch_up_all(tables, states)


_Inputs: TypeAlias = tuple[Tensor, Tensor, list[Tensor], bool, str, int]
"""Arguments of ``_gather``."""


class _Context(Protocol):
    """What a gather saves for backward."""

    held: tuple[Tensor, list[Tensor]]
    where: tuple[bool, str, int]

    @property
    def saved_tensors(self) -> tuple[Tensor]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _save(ctx: _Context, inputs: _Inputs, output: Tensor) -> None:
    rows, table, states, *where = inputs
    # What is updated is not saved: another part of the same backward may have stepped it, which is no error.
    ctx.held, ctx.where = (table, states), cast("tuple[bool, str, int]", tuple(where))
    ctx.save_for_backward(rows)


def _backward(ctx: _Context, grad: Tensor) -> tuple[list[None] | None, ...]:
    table, states = ctx.held
    with torch.no_grad():
        _step(ctx.saved_tensors[0], grad, table, states, *ctx.where)
    return None, None, [None] * len(states), None, None, None


_gather.register_autograd(_backward, setup_context=_save)


def gather(
    rows: Tensor,
    table: Tensor,
    states: list[Tensor],
    partial: bool,
    storage: str,
    owner: int,
    lazy: bool,
) -> Tensor:
    """As :class:`recsys_embed.kernels.fused_gather.FusedGather`, for compiled models: ``table[rows]``.

    Args:
        owner: handle of the :class:`RowStepper`.
        lazy: rows may have deferred steps.
    """
    if lazy:
        _catch_up(rows, table, states, storage, owner)
    out: Tensor = _gather(rows, table, states, partial, storage, owner)
    return out
