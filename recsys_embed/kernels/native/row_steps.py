"""Optimizer steps as the native kernels read them, and steps of rows whose gradients are known."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from recsys_embed.core.row_format import RowFormat
from recsys_embed.errors import BackendError, IdRangeError
from recsys_embed.kernels import pointers
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.low_precision_table import LowPrecisionTable, stored_rows
from recsys_embed.kernels.native.library import Rule, Stored, Update, loaded
from recsys_embed.kernels.pointers import address
from recsys_embed.optim import FusedOptimizer, rule_name

# Lookups from which on several threads are used.
WORTH_A_THREAD = 2048
_DONE, _OUT_OF_RANGE, _TOO_LARGE = 0, 1, 2


class _Encoded(NamedTuple):
    """A rule as the kernels read it, and name, kind and type of its state's tensors in order."""

    rule: Rule
    states: tuple[tuple[str, str, torch.dtype], ...]
    curve: array[float]


Updates: TypeAlias = "ctypes.Array[Update]"
"""The step of each storage."""


@lru_cache(maxsize=64)
def _encoded(optimizer: FusedOptimizer) -> _Encoded:
    number = loaded().rules.index(str(rule_name(optimizer)))
    kinds = {name: kind for name, kind in optimizer.tensors.items() if name != "last"}
    constants, curve = optimizer.constants, optimizer.curve()
    rule = Rule(number=number, elements=sum(kind == "element" for kind in kinds.values()))
    rule.constants[: len(constants)] = constants
    rule.curve, rule.curve_count = pointers.of_array(curve), len(curve)
    formats = {name: optimizer.formats[name] for name in kinds}
    for encoded, form in zip(rule.forms, formats.values(), strict=False):
        if not form.exact:
            encoded.bits, encoded.has_sign, encoded.least = 8 * form.dtype.itemsize, form.signed, form.least
            rule.rounded = 1
    states = tuple((name, kind, formats[name].dtype) for name, kind in kinds.items())
    return _Encoded(rule, states, curve)


def updates_of(
    optimizer: FusedOptimizer,
    tables: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    step_logs: Sequence[StepLog],
) -> Updates:
    """The optimizer step of each storage as the kernels read it; it holds pointers to the arguments."""
    updates, encoded = (Update * len(tables))(), _encoded(optimizer)
    for update, table, state, log in zip(updates, tables, states, step_logs, strict=True):
        update.rule, update.rows, update.decay = encoded.rule, table.shape[0], optimizer.weight_decay
        update.sizes, update.epsilons = pointers.of_array(log.sizes), pointers.of_array(log.epsilons)
        update.first, update.step = log.first, log.step
        if isinstance(table, LowPrecisionTable):
            update.stored = stored_record(table)
        (rows, width), held = table.shape, update.rule.state
        update.rule.seed = log.seed
        for i, (name, kind, dtype) in enumerate(encoded.states):
            held[i] = address(state[name], dtype, rows * width if kind == "element" else rows, f"state {name!r}")
        if "last" in state:
            update.last = address(state["last"], torch.int32, rows, "state 'last'")
    return updates


_NUMBERS = {"fp16": 1, "bf16": 2, "int8": 7, "int4": 8}
_WITH_STEPS = {"int8": 3, "int4": 4}
"""Rows that have steps stand as served ones do."""


def kind_of(format: RowFormat) -> int:
    """Number of a format among the kernels' precisions."""
    return (_WITH_STEPS if format.learns else _NUMBERS)[format.kind]


def stored_record(table: LowPrecisionTable) -> Stored:
    """How the rows of a table are stored, as the kernels read it."""
    stored, format = table.stored, table.format
    row_bytes = stored.shape[1] * stored.element_size()
    rate = format.rate_of(table.shape[1]) if format.learns else 0.0
    return Stored(kind_of(format), row_bytes, table.seed, int(format.stochastic), format.step, rate)


def _address_of(table: Tensor) -> int:
    held = stored_rows(table)
    dtype = held.dtype if isinstance(table, LowPrecisionTable) else torch.float32
    return address(held, dtype, held.numel(), "the table")


def checked(outcome: int) -> bool:
    """Whether all ids of a call had rows; raises for other errors of the kernels."""
    if outcome == _DONE:
        return True
    if outcome == _OUT_OF_RANGE:
        return False
    if outcome == _TOO_LARGE:
        raise BackendError(
            "the outputs of one step have more elements than the kernels can number (2**31, fewer with many widths); "
            "use smaller batches, or backend 'torch'"
        )
    raise MemoryError("no memory for the gradients of a step")


def update_rows(
    optimizer: FusedOptimizer, table: Tensor, state: Mapping[str, Tensor], rows: Tensor, values: Tensor, log: StepLog
) -> None:
    """One step of distinct rows of a storage, in place.

    Args:
        rows: int64 ``[n]``.
        values: float32 ``[n, width]``, their gradients.
        log: advanced to this step.

    Raises:
        IdRangeError: a row lies beyond the storage; nothing has changed.
    """
    rows, values, updates = rows.contiguous(), values.contiguous(), updates_of(optimizer, [table], [state], [log])
    count, width = rows.numel(), table.shape[1]
    threads = torch.get_num_threads() if rows.numel() >= WORTH_A_THREAD else 1
    if not checked(
        loaded().handle.rse_update_rows(
            pointers.of_record(updates),
            _address_of(table),
            width,
            address(rows, torch.int64, count, "rows of a gradient"),
            address(values, torch.float32, count * width, "a gradient"),
            count,
            threads,
        )
    ):
        raise IdRangeError(f"a gradient's rows must be in [0, {table.shape[0]}), the rows of its table")
    increment_version([table, *state.values()])


def catch_up(
    optimizer: FusedOptimizer, table: Tensor, state: Mapping[str, Tensor], log: StepLog, rows: Tensor | None = None
) -> None:
    """Apply the deferred steps of distinct rows of a storage, int64 ``[n]``, in place; by default of all rows.

    Raises:
        IdRangeError: a row lies beyond the storage; nothing has changed.
    """
    updates = updates_of(optimizer, [table], [state], [log])
    count = table.shape[0] if rows is None else rows.numel()
    threads = torch.get_num_threads() if count >= WORTH_A_THREAD else 1
    listed = None if rows is None else address(rows, torch.int64, count, "rows to read")
    at, width = _address_of(table), table.shape[1]
    if not checked(loaded().handle.rse_catch_up(pointers.of_record(updates), at, width, threads, listed, count)):
        raise IdRangeError(f"rows to read must be in [0, {table.shape[0]}), the rows of their table")
    increment_version([table, *state.values()])
