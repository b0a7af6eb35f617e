"""Gathers whose backward updates the table, without a gradient tensor or a separate optimizer step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from recsys_embed.kernels.deferred_steps import StepLog, catch_up
from recsys_embed.kernels.derivatives import needs_torch_gradients, refuse_further_derivatives
from recsys_embed.kernels.low_precision_table import rows_to_step, step_rows
from recsys_embed.kernels.triton import status
from recsys_embed.optim import FusedOptimizer, RowGradient, sum_duplicates
from recsys_embed.optim.state_format import read_state, write_state


class Updater(Protocol):
    """Applies summed gradients to the rows of one storage."""

    def __call__(self, weight: Tensor, rows: Tensor, grad: Tensor) -> None: ...


class _Context(Protocol):
    """What a gather saves for backward."""

    partial: bool
    updater: Updater | None
    weight: Tensor

    @property
    def saved_tensors(self) -> tuple[Tensor]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class FusedGather(Function):
    """``weight[rows]`` whose backward hands the gradient to ``updater``, or returns a :class:`RowGradient` without one.

    With ``partial``, rows of -1 read anything and update nothing.
    """

    @staticmethod
    def forward(ctx: _Context, weight: Tensor, rows: Tensor, partial: bool, updater: Updater | None) -> Tensor:
        ctx.save_for_backward(rows)
        # Not as a saved tensor: its values are not needed again, so they may change before backward.
        ctx.partial, ctx.updater, ctx.weight = partial, updater, weight
        return weight.index_select(0, rows.clamp_min(0) if partial else rows)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (rows,) = ctx.saved_tensors
        if needs_torch_gradients((grad,)):
            if ctx.updater is not None:
                refuse_further_derivatives()
            if ctx.partial:
                grad = grad.masked_fill((rows < 0).unsqueeze(1), 0.0)
            return grad.new_zeros(ctx.weight.shape).index_add(0, rows.clamp_min(0), grad), None, None, None
        if ctx.partial:
            present = rows >= 0
            rows, grad = rows[present], grad[present]
        if ctx.updater is None:
            return RowGradient(rows, grad.contiguous(), ctx.weight.shape[0]), None, None, None
        ctx.updater(ctx.weight, rows, grad.contiguous())
        return None, None, None, None


def apply_update(
    optimizer: FusedOptimizer,
    weight: Tensor,
    state: dict[str, Tensor],
    rows: Tensor,
    grad: Tensor,
    log: StepLog,
    kernels: bool = False,
) -> None:
    """One exact step in place on the rows of ``weight`` and ``state`` that occur in ``rows``.

    Args:
        weight: ``[rows, width]``.
        state: per name of ``optimizer.tensors`` ``[rows, 1]`` or ``[rows, width]``, in its format.
        rows: int64 ``[n]``, duplicates allowed.
        grad: ``[n, width]``.
        log: advanced to this step.
        kernels: whether the GPU kernels may be used; else torch's operations.
    """
    if rows.numel() == 0:
        return
    if kernels and status.runs_on(rows, [weight]) and status.knows(optimizer):
        from recsys_embed.kernels.triton.rows import update_rows

        if optimizer.lazy:
            catch_up(optimizer, weight, state, rows.unique(), log, log.step - 1)
        update_rows(optimizer, weight, state, rows, grad, log)
        return
    # Half-precision weights are updated in float32, so that small sums and state survive.
    work = torch.promote_types(weight.dtype, torch.float32)
    touched, sums = sum_duplicates(rows, grad.to(work))
    if optimizer.lazy:
        catch_up(optimizer, weight, state, touched, log, log.step - 1)
        state["last"][touched] = log.step
    picked = read_state(optimizer, state, touched, work)
    before = rows_to_step(weight, touched).to(work)
    if optimizer.weight_decay:
        sums = sums.add(before, alpha=optimizer.weight_decay)
    step_rows(weight, touched, optimizer.checked_update(before, sums, picked, log.rates[-1], log.step), log.step)
    write_state(optimizer, state, touched, picked, log.seed, log.step)
