"""Gathers whose backward updates the table: no gradient tensor, no optimizer step of its own."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from recsys_embed.kernels.deferred_steps import StepLog, catch_up
from recsys_embed.kernels.triton import status
from recsys_embed.optim import FusedOptimizer, sum_duplicates


class Updater(Protocol):
    """Applies summed gradients to the rows of one storage."""

    def __call__(self, rows: Tensor, grad: Tensor) -> None: ...


class _Context(Protocol):
    """What a gather keeps for its backward."""

    partial: bool
    updater: Updater

    @property
    def saved_tensors(self) -> tuple[Tensor]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class FusedGather(Function):
    """``weight[rows]`` whose backward hands the gradient to ``updater`` instead of returning it.

    With ``partial``, rows of -1 read anything and update nothing.
    ``anchor`` is any tensor that requires grad: it makes autograd run the backward and receives no gradient.
    """

    @staticmethod
    def forward(ctx: _Context, anchor: Tensor, weight: Tensor, rows: Tensor, partial: bool, updater: Updater) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.partial, ctx.updater = partial, updater
        return weight.index_select(0, rows.clamp_min(0) if partial else rows)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, ...]:
        (rows,) = ctx.saved_tensors
        if ctx.partial:
            present = rows >= 0
            rows, grad = rows[present], grad[present]
        ctx.updater(rows, grad.contiguous())
        return (None,) * 5


def read_rows(weight: Tensor, rows: Tensor, partial: bool, sparse: bool) -> Tensor:
    """``weight[rows]`` for int64 ``rows [n]``, with ordinary gradients; with ``partial``, rows of -1 read anything.

    Sparse gradients leave such rows out: a sparse optimizer moves every row that its gradient names.
    """
    if not partial or not sparse:
        return F.embedding(rows.clamp_min(0) if partial else rows, weight, sparse=sparse)
    present = (rows >= 0).nonzero().squeeze(1)
    read = F.embedding(rows[present], weight, sparse=True)
    return weight.new_zeros(rows.shape[0], weight.shape[1]).index_copy(0, present, read)


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
        state: per name of ``optimizer.tensors`` ``[rows, 1]`` or ``[rows, width]``; float32, steps int32.
        rows: int64 ``[n]``, duplicates allowed.
        grad: ``[n, width]``.
        log: advanced to this step.
        kernels: may be those of the GPU; else torch's operations.
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
    picked = {name: state[name].index_select(0, touched) for name in state if name != "last"}
    picked = {name: values.to(work) if values.is_floating_point() else values for name, values in picked.items()}
    before = weight.index_select(0, touched).to(work)
    if optimizer.weight_decay:
        sums = sums.add(before, alpha=optimizer.weight_decay)
    weight[touched] = optimizer.update(before, sums, picked, log.rates[-1], log.step).to(weight.dtype)
    for name, values in picked.items():
        state[name][touched] = values.to(state[name].dtype)
