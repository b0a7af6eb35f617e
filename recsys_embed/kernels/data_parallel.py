"""What DistributedDataParallel has to be told: it knows buffers, and sparse gradients of nn.Embedding alone."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.utils.ddp_reducer import rebuild_reducer, sparse_parameters


def prepare_data_parallel() -> None:
    """Within the first call by DistributedDataParallel: share index arrays, and announce sparse gradients.

    On construction it sends the buffers of its first process to all others; index arrays, which are none, follow here.
    Gradients that it does not expect to be sparse would fail within its reduction, so its reducer is built anew.
    """
    ddp: Any = DistributedDataParallel._active_ddp_module
    if ddp is None or getattr(ddp, "_recsys_embed_prepared", False):
        return
    object.__setattr__(ddp, "_recsys_embed_prepared", True)
    group = ddp.process_group
    for part in ddp.module.modules():
        if isinstance(part, IndexStore):
            for array in part.arrays.held.values():
                distributed.broadcast(array, src=distributed.get_global_rank(group, 0), group=group)
    if sparse_parameters(ddp.module):
        rebuild_reducer(ddp)


def sparse_of(module: nn.Module, names: list[str], sparse: bool) -> list[nn.Parameter]:
    """The named parameters of a module that get sparse gradients."""
    return [p for n in names if sparse and (p := module._parameters.get(n)) is not None and p.requires_grad]
