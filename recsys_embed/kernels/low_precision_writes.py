"""How a low-precision table stores what an operation of torch has made of it, by what the operation is for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_GIVEN = {
    "copy_", "fill_", "zero_", "normal_", "uniform_", "trunc_normal_", "random_", "index_fill_", "masked_fill_",
    "masked_scatter_", "scatter_", "index_put_", "_index_put_impl_", "index_copy_", "put_", "fill_diagonal_",
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_",
}  # fmt: skip
"""Operations that say what a table holds, rather than move it."""
_AVERAGES = {"lerp_", "_foreach_lerp_"}
_SCALES = {"mul_", "div_", "_foreach_mul_", "_foreach_div_"}
_DECAY = 0.1
"""Largest part by which weight decay, a part of an optimizer's step, scales an element."""


def store_result(table: Any, values: Tensor, func: Any, moves: bool) -> None:
    """Store what an operation has made of a decoded table.

    Args:
        table: a ``LowPrecisionTable``, whose file imports this one.
        values: ``[rows, width]``.
        func: the operation.
        moves: it added to what was there.
    """
    name = func._schema.name.removeprefix("aten::")
    if name in _GIVEN and not moves:
        table.write_all(values)
    elif table.format.learns and (name in _AVERAGES or (name in _SCALES and not _decays(table, values))):
        table.rescale_all(values)
    else:
        table.step_all(values)


def _decays(table: Any, values: Tensor) -> bool:
    """Whether ``values`` are the table's, scaled by no more than weight decay does."""
    for start, stored in table.pieces():
        before, after = table.format.unrounded(stored, table.shape[1]), values[start : start + len(stored)]
        if not bool(((after - before).abs() <= before.abs() * _DECAY).all()):
            return False
    return True
