"""Gradients of tables that no optimizer would step, or that another rule would step: they are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from recsys_embed.collection.optimizer_watch import WAY_OUT
from recsys_embed.errors import ConfigError


class LooksUpAlone(Protocol):
    """Tables that get no gradients while :attr:`takes_no_gradient` holds: lookups step them in backward."""

    @property
    def takes_no_gradient(self) -> bool: ...

    def refuse_stale(self, table: Tensor) -> None: ...


def refuse_outside_lookups(tables: LooksUpAlone, parameters: Sequence[nn.Parameter | None]) -> None:
    """From now on a gradient is refused that reaches a table outside a lookup, for nothing would step it."""
    # Not the tables themselves: their parameters would keep them alive.
    hook = _hook(ref(tables))
    for parameter in parameters:
        if parameter is not None and parameter.is_leaf and not parameter.is_inference():
            wanted = parameter.requires_grad
            # Torch takes hooks of tensors that require grad, which a frozen table may come to do.
            parameter.requires_grad_().register_post_accumulate_grad_hook(hook)
            parameter.requires_grad_(wanted)


def _hook(tables: ref[LooksUpAlone]) -> Callable[[Tensor], None]:
    def refuse(parameter: Tensor) -> None:
        if parameter.grad is None:  # of a lookup, which has stepped the table
            return
        owner = tables()
        if owner is None:
            return
        if not owner.takes_no_gradient:
            owner.refuse_stale(parameter)
            return
        lost, parameter.grad = parameter.grad, None
        if not lost.any():  # 0 * parameter.sum() keeps a parameter in the graph
            return
        raise ConfigError(
            "a gradient reaches a table outside a lookup (a penalty on the table, or a product with the whole of it), "
            f"and these tables step in backward, by their lookups alone; {WAY_OUT}; or give the rule weight_decay="
        )

    return refuse


def refuse_hooks(tables: Sequence[Tensor], in_backward: bool) -> None:
    """Refuse a lookup of tables with hooks on their gradients (``Tensor.register_hook``) which would get None.

    Args:
        in_backward: the tables step in backward; else they are looked up by compiled code.
    """
    for table in tables:
        if table._backward_hooks:
            raise ConfigError(
                "a hook on the gradient of a table (register_hook) would get None, for "
                + (
                    f"these tables step in backward; remove it, or {WAY_OUT}"
                    if in_backward
                    else "compiled lookups leave gradients in .grad alone; take register_post_accumulate_grad_hook, or "
                    "leave the collection out of what is compiled (torch.compiler.disable)"
                )
            )


def refuse_given(tables: Sequence[Tensor], optimizer: Optimizer) -> None:
    """Refuse a step of an optimizer that holds tables which step in backward and yet have a gradient."""
    if _holds(optimizer, tables):
        raise ConfigError(
            f"{type(optimizer).__name__} holds tables that step in backward, and would step them by another rule and "
            f"the gradient in their .grad; set that to None, or {WAY_OUT}"
        )


def tell_of_given(tables: Sequence[Tensor]) -> bool:
    """Warn of gradients that were put into ``.grad`` of tables that step in backward; whether there were any."""
    if not any(t.grad is not None and bool(t.grad.any()) for t in tables):
        return False
    warnings.warn(
        "a gradient was put into .grad of tables that step in backward, by the gradients of their lookups alone, and "
        f"nothing steps them by it; set it to None, or {WAY_OUT}",
        stacklevel=7,
    )
    return True


def _holds(optimizer: Optimizer, tables: Sequence[Tensor]) -> bool:
    waiting = {id(t) for t in tables if t.grad is not None}
    return bool(waiting) and any(id(p) in waiting for group in optimizer.param_groups for p in group["params"])


def refuse_foreign(tables: Sequence[Tensor], optimizer: Optimizer) -> None:
    """Refuse a step of an optimizer that holds tables which another optimizer steps."""
    if _holds(optimizer, tables):
        raise ConfigError(
            f"{type(optimizer).__name__} holds tables that recsys_embed.optim.fused_optimizer steps, and would "
            "step them a second time; give it recsys_embed.optim.unfused_parameters(model)"
        )


def refuse_lost(tables: Sequence[Tensor], instead_of: str) -> None:
    """Refuse to go on while gradients wait for an optimizer that no longer exists.

    Args:
        instead_of: what was called, where its ``step()`` should be.
    """
    if any(t.grad is not None for t in tables):
        raise ConfigError(
            "gradients of tables wait for the optimizer that recsys_embed.optim.fused_optimizer made of them, which no "
            f"longer exists; keep what it returns and call its step(), here in place of {instead_of}; a model that was "
            "copied without it needs one of its own"
        )
