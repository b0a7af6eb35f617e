"""Products of tensor trains in the native kernels, where their matrices are too small for calls of BLAS."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from recsys_embed.core.generators import TensorTrain
from recsys_embed.core.heads import Head
from recsys_embed.kernels import pointers
from recsys_embed.kernels.derivatives import needs_torch_gradients
from recsys_embed.kernels.native.library import Train, loaded
from recsys_embed.kernels.native.lookup import runs_on
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.kernels.native.row_steps import checked
from recsys_embed.kernels.pointers import checked_address

MOST_CORES = len(Train().widths)
_WORTH_A_THREAD = 64
_POOL = OutputPool()
"""Memory for products and their gradients."""


class _Context(Protocol):
    """What a product saves for backward."""

    head: TensorTrain

    @property
    def saved_tensors(self) -> tuple[Tensor]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Products(Function):
    @staticmethod
    def forward(ctx: _Context, columns: Tensor, head: TensorTrain) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(columns)
        out = _POOL.take((columns.shape[0], head.width(0, {})))
        _run(head, columns, out=out)
        return out

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        if needs_torch_gradients(grads) or not runs_on(columns, [*grads, columns]):
            with torch.enable_grad():
                # Of the columns as they are, so that the result can be differentiated again.
                again = columns if columns.requires_grad else columns.detach().requires_grad_(True)
                out = ctx.head.apply(again, [])
                (found,) = torch.autograd.grad(out, again, grads[0], create_graph=torch.is_grad_enabled())
            return found, None
        found = _POOL.take(columns.shape)
        _run(ctx.head, columns, gradient=grads[0].contiguous(), of_columns=found)
        return found, None


def _run(head: TensorTrain, columns: Tensor, **others: Tensor) -> None:
    record = Train(cores=len(head.widths), count=columns.shape[0], columns=checked_address(columns))
    record.widths[: len(head.widths)] = head.widths
    record.ranks[: len(head.widths) + 1] = (1, *head.ranks, 1)
    for name, tensor in others.items():
        setattr(record, name, checked_address(tensor))
    threads = min(torch.get_num_threads(), max(1, columns.shape[0] // _WORTH_A_THREAD))
    checked(loaded().handle.rse_train(pointers.of_record(record), threads))


def run_natively(head: Head, columns: Tensor) -> Tensor | None:
    """Vectors of ``columns [n, columns]`` by the kernels; None where they lack the head or cannot read the tensors."""
    if type(head) is not TensorTrain or len(head.widths) > MOST_CORES or columns.dim() != 2:
        return None
    if torch.compiler.is_compiling() or not runs_on(columns, [columns]):
        return None
    out: Tensor = _Products.apply(columns, head)
    return out
