"""Replicas of tables whose fused optimizer steps at ``step()``: each backward ends with the mean of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from recsys_embed.collection.backward_steps import active_replica
from recsys_embed.optim import RowGradient
from recsys_embed.optim.fused_table_optimizer import SteppedTables, keep_from_replicas

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


class _Tables(SteppedTables, Protocol):
    storages: tuple[str, ...]
    _parameters: dict[str, nn.Parameter | None]
    _buffers: dict[str, Tensor | None]


class Replicas:
    """Exchanges the rows of gradients between replicas, in place of DistributedDataParallel's dense buckets.

    Args:
        tables: those of one module.
    """

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables
        self._group: ProcessGroup | None = None
        self._given: ProcessGroup | None = None
        self._replica: DistributedDataParallel | None = None
        self._averages = False
        self._waiting = False

    def use(self, group: ProcessGroup | None) -> None:
        """Take a group of processes as replicas, whatever stands around the lookup."""
        self._given = group
        if group is not None and group.size() > 1:
            self._start(group)

    def prepare(self) -> None:
        """Before a lookup with gradients: whether its backward is one that replicas share."""
        replica = active_replica()
        if replica is None:
            self._averages = self._given is not None and self._given.size() > 1
            return
        if replica is not self._replica:
            self._replica = replica
            self._leave(replica)
            self._start(replica.process_group)
        self._averages = bool(replica.require_backward_grad_sync)

    def _start(self, group: ProcessGroup) -> None:
        """Make tables and states those of the first process, and listen to gradients."""
        from torch import distributed

        self._group = group
        first = distributed.get_global_rank(group, 0)
        held: list[Tensor | None] = [self._tables._parameters[name] for name in self._tables.storages]
        held += [b for name, b in self._tables._buffers.items() if name.startswith(self._tables.storages)]
        with torch.no_grad():
            for tensor in held:
                if tensor is not None:
                    distributed.broadcast(tensor.detach(), first, group)
        for name in self._tables.storages:
            weight = self._tables._parameters[name]
            if weight is not None:
                weight.register_post_accumulate_grad_hook(self._after_gradient)

    def _leave(self, replica: DistributedDataParallel) -> None:
        """Take the tables out of DistributedDataParallel's buckets, where it was made before the optimizer."""
        own = {id(self._tables._parameters[name]) for name in self._tables.storages}
        if not any(id(p) in own for p in replica._module_parameters):
            return
        tables = {n: self._tables for n, m in replica.module.named_modules() if m is self._tables}
        keep_from_replicas(replica.module, tables)
        replica.parameters_to_ignore |= set(replica.module._ddp_params_and_buffers_to_ignore)
        replica._module_parameters = [
            p for n, p in replica.module.named_parameters() if n not in replica.parameters_to_ignore
        ]
        parameters, sparse = replica._build_params_for_reducer()
        names = replica._build_debug_param_to_name_mapping(parameters)
        replica._ddp_init_helper(parameters, sparse, names, replica.static_graph)

    def _after_gradient(self, _: Tensor) -> None:
        if self._averages and not self._waiting:
            self._waiting = True
            torch.autograd.Variable._execution_engine.queue_callback(self._exchange)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Put the mean of all replicas' gradients in the place of each one's own."""
        from torch import distributed

        self._waiting = False
        group = self._group
        if group is None:
            return
        for name in self._tables.storages:
            weight = self._tables._parameters[name]
            if weight is None or not weight.requires_grad:
                continue
            grad = weight.grad
            if grad is not None and not isinstance(grad, RowGradient):
                distributed.all_reduce(grad, group=group)
                grad.div_(group.size())
                continue
            weight.grad = _mean(grad, weight, group)


def _mean(grad: RowGradient | None, weight: Tensor, group: ProcessGroup) -> RowGradient:
    """Of the gradients of all replicas, by row: the same bits in each."""
    from torch import distributed

    size, device = group.size(), weight.device
    if grad is None:
        rows, values = torch.empty(0, dtype=torch.int64, device=device), weight.new_empty(0, weight.shape[1])
    else:
        grad.coalesce()
        rows, values = grad.rows, grad.values
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.zeros_like(count) for _ in range(size)]
    distributed.all_gather(counts, count, group=group)
    sizes = [int(n) for n in counts]
    all_rows = _gathered(rows, sizes, group)
    all_values = _gathered(values, sizes, group)
    out = RowGradient(torch.cat(all_rows), torch.cat(all_values), weight.shape[0]).coalesce()
    out.values.div_(size)
    return out


def _gathered(part: Tensor, sizes: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """Each replica's part, of which there are as many rows as ``sizes`` says."""
    from torch import distributed

    most = max(sizes)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part
    out = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(out, padded, group=group)
    return [whole[:n] for whole, n in zip(out, sizes, strict=True)]
