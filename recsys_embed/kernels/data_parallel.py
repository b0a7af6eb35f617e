"""What DistributedDataParallel has to be told: it knows buffers, and sparse gradients of nn.Embedding alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from recsys_embed.errors import ConfigError
from recsys_embed.kernels.indexes import IndexStore


def prepare_data_parallel() -> None:
    """Within the first call by DistributedDataParallel: share index arrays, and announce sparse gradients.

    On construction it sends the buffers of its first process to all others; index arrays, which are none, follow here.
    Gradients that it does not expect to be sparse would fail within its reduction, so its reducer is built anew.
    """
    ddp: Any = DistributedDataParallel._active_ddp_module
    if ddp is None or getattr(ddp, "_recsys_embed_prepared", False):
        return
    object.__setattr__(ddp, "_recsys_embed_prepared", True)
    sparse: set[int] = set()
    group = ddp.process_group
    for part in ddp.module.modules():
        if isinstance(part, IndexStore):
            for array in part.arrays.held.values():
                distributed.broadcast(array, src=distributed.get_global_rank(group, 0), group=group)
        sparse |= {id(p) for p in getattr(part, "sparse_parameters", list)()}
    if sparse:
        _announce(ddp, sparse)


def _announce(ddp: Any, sparse: set[int]) -> None:
    """Build the reducer anew, as DDP does when it is unpickled, with sparse gradients of these parameters."""
    try:
        parameters, expected = ddp._build_params_for_reducer()
        expected = [e or id(p) in sparse for p, e in zip(parameters, expected, strict=True)]
        names = ddp._build_debug_param_to_name_mapping(parameters)
        ddp._ddp_init_helper(parameters, expected, names, ddp.static_graph)
        if ddp.static_graph:
            ddp.reducer._set_static_graph()
            ddp.logger._set_static_graph()
        if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
            ddp.reducer.prepare_for_forward()
    except (AttributeError, TypeError) as e:
        raise ConfigError(
            "DistributedDataParallel of this version of torch takes sparse gradients of nn.Embedding alone; build the "
            "embeddings with sparse=False"
        ) from e


def sparse_of(module: nn.Module, names: list[str], sparse: bool) -> list[nn.Parameter]:
    """The named parameters of a module that get sparse gradients."""
    return [p for n in names if sparse and (p := module._parameters.get(n)) is not None and p.requires_grad]
