"""Calls of a drop-in with other inputs than a plain tensor of ids: torch.fx proxies and nested tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recsys_embed.embedding.module_tables import ModuleTables
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.id_checks import jagged_parts


def call_with_other_input(
    module: ModuleTables, ids: object, offsets: Tensor | None, weights: Tensor | None
) -> Tensor | None:
    """The output for a torch.fx proxy or a nested tensor; None if ``ids`` are neither.

    While torch.fx traces, the call becomes one node, as that of ``nn.Embedding`` does. The vectors of nested ids are a
    nested tensor; a module with ``mode`` pools each component.

    Raises:
        ConfigError: the nested tensor is not jagged, or comes with offsets or weights of another form.
    """
    if type(ids).__module__ == "torch.fx.proxy":
        return _as_node(module, ids, (offsets, weights))
    if not (isinstance(ids, Tensor) and ids.is_nested):
        return None
    if offsets is not None:
        raise ConfigError("a nested tensor of ids brings its own offsets; leave `offsets` out")
    values, bounds = jagged_parts(ids, module.spec.name)
    if weights is not None:
        if not weights.is_nested:
            raise ConfigError("`per_sample_weights` of a nested tensor of ids must be a nested tensor, too")
        weights, theirs = jagged_parts(weights, module.spec.name)
        if theirs is not bounds and not theirs.equal(bounds):
            raise ConfigError("`per_sample_weights` must have the lengths of the nested tensor of ids")
    if module.mode is None:
        from torch.nested import nested_tensor_from_jagged

        return nested_tensor_from_jagged(module(values, None, weights), bounds)
    pooled: Tensor = module(values, bounds if module.include_last_offset else bounds[:-1], weights)
    return pooled


def _as_node(module: nn.Module, ids: Any, rest: tuple[object, ...]) -> Any:
    while rest and rest[-1] is None:
        rest = rest[:-1]
    return ids.tracer.create_proxy("call_module", ids.tracer.path_of_module(module), (ids, *rest), {})
