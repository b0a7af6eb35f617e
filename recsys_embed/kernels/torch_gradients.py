"""The backward of a lookup by kernels where these have no gradients: by torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from recsys_embed.kernels.derivatives import (
    ReadTables,
    are_batched,
    differentiable_gradients,
    refuse_further_derivatives,
)
from recsys_embed.kernels.indexes import ArrayVersions
from recsys_embed.kernels.places import GradientLayout


class ChecksArrays(Protocol):
    """A lookup by kernels, whose ids may read their rows from index arrays."""

    def check_arrays(self, versions: ArrayVersions) -> None: ...


class LookupContext(Protocol):
    """What a lookup by kernels keeps for its backward.

    Args:
        lookup: checks that the index arrays are still those that it read.
        updater: steps the optimizer in backward, or None.
        layout: of the gradients.
        tables: that it read.
        read: their versions, where derivatives need their values.
        arrays: versions of the index arrays.
    """

    @property
    def lookup(self) -> ChecksArrays: ...
    @property
    def updater(self) -> object: ...

    layout: GradientLayout
    tables: tuple[Tensor, ...]
    read: ReadTables | None
    arrays: ArrayVersions


def gradients_by_torch(
    ctx: LookupContext,
    run: Callable[[list[Tensor], bool], Sequence[Tensor]],
    grads: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients in a backward that :func:`needs_torch_gradients`, of which there are further derivatives.

    Args:
        run: computes the outputs from tables by torch's operations; the tables' gradients may be sparse.
        grads: of the outputs.
    """
    if ctx.updater is not None:
        refuse_further_derivatives()
    ctx.lookup.check_arrays(ctx.arrays)
    if ctx.read is not None:
        ctx.read.check(ctx.tables)
    # Torch has neither batched sparse gradients nor products of sparse gradients.
    sparse = ctx.layout == "sparse" and ctx.read is None and not are_batched(grads)
    return differentiable_gradients(lambda tables: run(tables, sparse), ctx.tables, grads, wanted)
