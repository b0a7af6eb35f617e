"""Derivatives that kernels do not compute: which calls need them, and how torch's own operations give them.

Kernels compute first derivatives in backward. Second derivatives (``create_graph=True``), batched gradients
(``is_grads_batched=True``, ``vmap``) and tangents of forward mode come from torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from recsys_embed.errors import ConfigError


def transformed() -> bool:
    """Whether ``torch.func`` transforms what runs now, or the gradients of this backward are batched."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def needs_torch_gradients(grads: Sequence[Tensor]) -> bool:
    """In a backward, given the gradients of its outputs: whether these are batched, or to be differentiated again."""
    return torch.is_grad_enabled() or are_batched(grads)


def are_batched(grads: Sequence[Tensor]) -> bool:
    """In a backward, whether the gradients of its outputs are batched."""
    return transformed() or any(map(torch._C._functorch.is_legacy_batchedtensor, grads))


def have_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward mode differentiates one of the tensors."""
    level = forward_ad._current_level
    if level < 0 or torch.compiler.is_compiling():
        return False
    return any(t is not None and torch._VF._unpack_dual(t, level)[1] is not None for t in tensors)


def outside_transforms() -> AbstractContextManager[object]:
    """Context in which ``torch.func`` transforms nothing, for values that are unmapped."""
    if not transformed():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


# Of the writes that a table's version counts, those of deferred steps, by id of the table. Rows that a lookup has read
# have no deferred steps left, so that these writes change none of them. Differences alone matter: ids may come again.
_CATCH_UPS: dict[int, int] = {}


@contextmanager
def catching_up(table: Tensor) -> Iterator[None]:
    """What is written here are deferred steps of rows of a table."""
    before = _version(table)
    try:
        yield
    finally:
        written = _version(table) - before
        if written:
            _CATCH_UPS[id(table)] = _CATCH_UPS.get(id(table), 0) + written


def _version(table: Tensor) -> int:
    return 0 if table.is_inference() else table._version


class ReadTables:
    """Versions of the tables that a lookup read, which its backward reads again for further derivatives."""

    __slots__ = ("_versions",)

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self._versions = self._now(tables)

    @staticmethod
    def _now(tables: Sequence[Tensor]) -> list[int]:
        return [_version(t) - _CATCH_UPS.get(id(t), 0) for t in tables]

    def check(self, tables: Sequence[Tensor]) -> None:
        """Raise if a table has changed.

        Raises:
            ConfigError: says so.
        """
        if self._versions != self._now(tables):
            raise ConfigError(
                "a table changed in place between a lookup and a backward with create_graph=True (or with batched "
                "gradients), which reads it again; take these derivatives before the optimizer steps"
            )


def differentiable_gradients(
    run: Callable[[list[Tensor]], Sequence[Tensor]],
    tables: Sequence[Tensor],
    grads: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the wanted tables, which can be differentiated again, in the tables and in ``grads``.

    Args:
        run: computes the outputs from tables by torch's operations.
        grads: of the outputs.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [t.view_as(t) for t in tables]
        # A table that was frozen since it was read still has the gradient that was asked for.
        given = [
            t.detach().requires_grad_() if want and not t.requires_grad else t
            for t, want in zip(given, wanted, strict=True)
        ]
        outputs = run(given)
        sought = [t for t, want in zip(given, wanted, strict=True) if want]
        learned = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        outs, of_outs = [o for o, _ in learned], [g for _, g in learned]
        found = iter(torch.autograd.grad(outs, sought, of_outs, create_graph=again, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def refuse_further_derivatives() -> None:
    """Refuse a backward that is :func:`needs_torch_gradients`, where it would step an optimizer.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "these tables step in backward, so that a backward through them has no second derivatives "
        "(create_graph=True) and no batched gradients; make the update at step() instead: optimizer = "
        "recsys_embed.optim.fused_optimizer(model, dense_optimizer)"
    )
