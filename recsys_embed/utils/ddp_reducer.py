"""A new reducer of DistributedDataParallel, which knows what its first one was told."""

from __future__ import annotations

from typing import Any

import torch

from recsys_embed.errors import ConfigError


def sparse_parameters(model: torch.nn.Module) -> set[int]:
    """Ids of a model's parameters that get sparse gradients, but for those of nn.Embedding, which torch knows."""
    return {id(p) for part in model.modules() for p in getattr(part, "sparse_parameters", list)()}


def rebuild_reducer(replica: Any) -> None:
    """Build the reducer anew, as DistributedDataParallel does when it is unpickled, within a forward of ``replica``.

    It expects sparse gradients of all parameters that get them, and keeps communication hooks.

    Raises:
        ConfigError: this version of torch builds reducers in another way.
    """
    try:
        built_in = _built_in_hook(replica)
        parameters, expected = replica._build_params_for_reducer()
        sparse = sparse_parameters(replica.module)
        expected = [e or id(p) in sparse for p, e in zip(parameters, expected, strict=True)]
        names = replica._build_debug_param_to_name_mapping(parameters)
        replica._ddp_init_helper(parameters, expected, names, replica.static_graph)
        if replica.static_graph:
            replica.static_graph = False
            replica._set_static_graph()
        for hook, state in getattr(replica, "_comm_hooks", ()):
            replica.logger._set_comm_hook_name(hook.__qualname__)
            torch.distributed._register_comm_hook(replica.reducer, state, hook)
        if built_in is not None:
            replica._register_builtin_comm_hook(built_in)
        if torch.is_grad_enabled() and replica.require_backward_grad_sync:
            # The forward that is running has told the reducer before.
            replica.reducer.prepare_for_forward()
    except (AttributeError, TypeError) as e:
        raise ConfigError(
            "DistributedDataParallel of this version of torch cannot be told of the tables' gradients; build the "
            "embeddings with sparse=False, and make a fused optimizer before DistributedDataParallel"
        ) from e


def _built_in_hook(replica: Any) -> Any:
    """The communication hook of torch that is compiled, whose name alone is kept; or None."""
    name = replica._get_ddp_logging_data().get("comm_hook", "")
    kind, _, member = name.rpartition(".")
    return getattr(torch.distributed.BuiltinCommHookType, member) if kind == "BuiltinCommHookType" else None
