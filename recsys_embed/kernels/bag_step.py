"""Sums of a storage's rows with gradients, or with an optimizer's step in backward, by FBGEMM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from recsys_embed.errors import BackendError
from recsys_embed.kernels.fbgemm import LANES, TableBatch
from recsys_embed.optim import FusedOptimizer, RowwiseAdagrad


def runs_here() -> bool:
    """Whether nobody traces or transforms what runs: the kernels are none of torch's own."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


class BagCall(NamedTuple):
    """What a step reads of one storage.

    Args:
        tables: how the storage is divided; None for widths that the kernels do not take, rows being those of the
            storage.
        rows, offsets, factors: as :meth:`TableBatch.forward` has them.
    """

    tables: TableBatch | None
    rows: Tensor
    offsets: Tensor
    factors: Tensor | None


class _Wide:
    """The rows that a call reads, copied into a table of a width that the kernels take.

    Columns are filled up with zeros, which have no gradient: they change neither sums nor the rows copied back.
    """

    def __init__(self, call: BagCall, width: int) -> None:
        self.rows, places = torch.unique(call.rows, return_inverse=True)
        self.missing = -width % LANES
        self.width = width + self.missing
        self.tables = TableBatch(self.width, [0], [max(1, len(self.rows))])
        self.read = (places, call.offsets, call.factors)

    def copy(self, values: Tensor) -> Tensor:
        """Rows of a storage, widened; at least one, so that an empty call has a table."""
        out = values.new_zeros(max(1, len(self.rows)), values.shape[1] + self.missing)
        out[: len(self.rows), : values.shape[1]] = values.detach()[self.rows]
        return out

    def put_back(self, target: Tensor, values: Tensor) -> None:
        target[self.rows] = values[: len(self.rows), : target.shape[1]]


class BagReader(NamedTuple):
    """The storages that lookups read, and what their backward does.

    Args:
        tables: float32 ``[rows, width]`` by name.
        anchor: requires grad, where an optimizer steps in backward, so that autograd runs it.
        update: steps the optimizer: the storage's name, what was read, the gradient of the sums.
    """

    tables: Mapping[str, Tensor]
    anchor: Tensor | None = None
    update: Callable[[str, BagCall, Tensor], None] | None = None

    def __call__(self, storage: str, call: BagCall) -> Tensor:
        """Sums of rows ``[bags, features * width]``.

        Raises:
            BackendError: the tables have moved to where the kernels do not run.
        """
        weight = self.tables[storage]
        if weight.dtype != torch.float32 or not weight.is_cpu:
            raise BackendError(
                f"backend 'fbgemm' reads float32 tables on the CPU; these have become {weight.dtype} on "
                f"{weight.device.type}. Build the collection with backend 'auto' or 'torch'"
            )
        out: Tensor = _Sums.apply(self.anchor, weight, call, storage, self.update)
        return out


class _Sums(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor | None, weight: Tensor, call: BagCall, storage: str, update: Any) -> Tensor:
        # Values of the table are not needed again, so it may change before backward, as that of a gather may.
        ctx.call, ctx.storage, ctx.update, ctx.weight = call, storage, update, weight
        # Saved by autograd, which refuses a second backward over a graph that was not retained: it would step again.
        ctx.save_for_backward(call.rows)
        if call.tables is not None:
            return call.tables.forward(weight, *call[1:])
        wide = _Wide(call, weight.shape[1])
        return wide.tables.forward(wide.copy(weight), *wide.read)[:, : weight.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        call = ctx.call._replace(rows=rows)
        if ctx.update is not None:
            ctx.update(ctx.storage, call, grad)
            return (None,) * 5
        return None, _gradient(ctx.weight, call, grad), None, None, None


def _gradient(weight: Tensor, call: BagCall, grad: Tensor) -> Tensor:
    if call.tables is not None:
        return call.tables.gradient(grad, weight, *call[1:])
    wide, out = _Wide(call, weight.shape[1]), torch.zeros_like(weight)
    wide.put_back(out, wide.tables.gradient(F.pad(grad, (0, wide.missing)), wide.copy(weight), *wide.read))
    return out


def apply_bags(
    optimizer: FusedOptimizer, lr: float, weight: Tensor, state: Mapping[str, Tensor], call: BagCall, grad: Tensor
) -> None:
    """One exact step in place on the rows of a storage, and of its state, that a call read.

    Args:
        state: per name of ``optimizer.tensors``.
        grad: of the sums that the call gave.
    """
    if call.tables is not None:
        call.tables.update(optimizer, lr, grad, weight, state, *call[1:])
    else:
        wide = _Wide(call, weight.shape[1])
        grad = F.pad(grad, (0, wide.missing))
        if isinstance(optimizer, RowwiseAdagrad):
            # Its mean of squares counts the zeros too: a larger gradient makes up for that, a smaller rate for it.
            factor = (wide.width / weight.shape[1]) ** 0.5
            grad, lr = grad * factor, lr / factor
        table = wide.copy(weight)
        own = {
            name: wide.copy(state[name]) if kind == "element" else state[name][wide.rows]
            for name, kind in optimizer.state.items()
        }
        wide.tables.update(optimizer, lr, grad, table, own, *wide.read)
        wide.put_back(weight, table)
        for name, values in own.items():
            wide.put_back(state[name], values)
    increment_version([weight, *state.values()])
