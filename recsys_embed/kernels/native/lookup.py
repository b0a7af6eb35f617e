"""The compiled CPU kernels: one call looks up, or updates, the rows of all features (ops/cpu)."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import BackendError, ConfigError
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native.handles import handle_of
from recsys_embed.kernels.native.library import Call, Library, Mask, Rule, Update, library, loaded, words_of
from recsys_embed.kernels.native.records import Slot, encode
from recsys_embed.kernels.places import Place
from recsys_embed.kernels.precision import HEAD
from recsys_embed.optim import FusedOptimizer, rule_name

_DENSE, _SPARSE = -1, -2
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INT8, _INT4 = 3, 4
_STORED = (*_KINDS, torch.uint8)
_DONE, _OUT_OF_RANGE, _TOO_LARGE = 0, 1, 2
# Lookups that a second thread is worth waking for.
_WORTH_A_THREAD = 2048
# Where a call's record has what differs from call to call; `_ASKED` are the ids and what stands behind them.
_AT, _BEHIND, _ASKED = words_of(Call), ctypes.sizeof(Call) // 8, struct.Struct("8q")
_IDS, _KEPT, _OUTPUTS = _AT["ids"], _AT["kept"], _AT["outputs"]
_KINDS_AT, _BYTES_AT, _INDEX = _AT["storage_kinds"], _AT["storage_bytes"], _AT["index"]
_THREADS, _MASK = _AT["threads"], _AT["mask"]


def knows(optimizer: FusedOptimizer | None) -> bool:
    """Whether the kernels can run and hold the optimizer's rule; a rule of one's own runs on backend ``"torch"``."""
    found = native_library.library()
    return isinstance(found, Library) and (optimizer is None or rule_name(optimizer) in found.rules)


def runs_on(ids: Tensor, tables: Sequence[Tensor], types: Collection[torch.dtype] = (torch.float32,)) -> bool:
    """Whether the kernels may read these tensors' memory: real, on the CPU, of these types, and nobody traces."""
    if torch.compiler.is_compiling():
        # As operators of their own. Exported programs hold torch's alone.
        real = not torch.compiler.is_exporting()
        return real and all(t.device.type == "cpu" and t.dtype in types for t in tables)
    if type(ids) is not Tensor or not ids.is_cpu or not isinstance(library(), Library):
        return False
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    for t in tables:
        if type(t) not in (Tensor, Parameter) or t.dtype not in types or not t.is_cpu or not t.is_contiguous():
            return False
    return torch._C._functorch.peek_interpreter_stack() is None


def reads(ids: Tensor, stored: Sequence[Tensor]) -> bool:
    """As :func:`runs_on`, for rows that are served: of any precision, and not by compiled models."""
    return not torch.compiler.is_compiling() and runs_on(ids, stored, _STORED)


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


class _Encoded(NamedTuple):
    """A rule as the kernels read it, but for its state, of which these are the tensors in order."""

    rule: Rule
    states: tuple[str, ...]
    curve: array[float]


Updates: TypeAlias = "ctypes.Array[Update]"
"""What is done to each storage."""


@lru_cache(maxsize=64)
def _encoded(optimizer: FusedOptimizer) -> _Encoded:
    number = loaded().rules.index(str(rule_name(optimizer)))
    kinds = {name: kind for name, kind in optimizer.tensors.items() if name != "last"}
    constants, curve = optimizer.constants, optimizer.curve()
    rule = Rule(number=number, elements=sum(kind == "element" for kind in kinds.values()))
    rule.constants[: len(constants)] = constants
    rule.curve, rule.curve_count = curve.buffer_info()
    return _Encoded(rule, tuple(kinds), curve)


def _updates(
    optimizer: FusedOptimizer,
    tables: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    step_logs: Sequence[StepLog],
) -> Updates:
    """The optimizer's step as the kernels read it, per storage; it points into the arguments."""
    updates, encoded = (Update * len(tables))(), _encoded(optimizer)
    for update, table, state, log in zip(updates, tables, states, step_logs, strict=True):
        update.rule, update.rows, update.decay = encoded.rule, table.shape[0], optimizer.weight_decay
        update.sizes, update.epsilons = log.sizes.buffer_info()[0], log.epsilons.buffer_info()[0]
        update.first, update.step = log.first, log.step
        pointers = update.rule.state
        for i, name in enumerate(encoded.states):
            pointers[i] = state[name].data_ptr()
        if "last" in state:
            update.last = state["last"].data_ptr()
    return updates


def checked(outcome: int) -> bool:
    """Whether a call's ids had rows, from the kernels' answer; raises what else went wrong."""
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


def catch_up(optimizer: FusedOptimizer, table: Tensor, state: Mapping[str, Tensor], log: StepLog) -> None:
    """Apply the steps that rows of a storage missed, in place."""
    updates = _updates(optimizer, [table], [state], [log])
    threads = torch.get_num_threads()
    checked(loaded().handle.rse_catch_up(ctypes.addressof(updates), table.data_ptr(), table.shape[1], threads))
    increment_version([table, *state.values()])


class Ids(NamedTuple):
    """Ids of many features, int32 or int64 on the CPU.

    Args:
        values: ``[B, F]`` of any strides, or ``[B]`` of a single feature; or ``[n]`` with ``offsets``, feature after
            feature.
        offsets: int64 ``[F * B + 1]``, rising from 0 to n: bag ``f * B + b`` holds the ids of feature f of sample b.
        weights: float32 ``[n]``, factors of the vectors of bags that are summed.
        batch: B.
    """

    values: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    batch: int

    @classmethod
    def matrix(cls, values: Tensor) -> Ids:
        return cls(values, None, None, values.shape[0])

    def counts(self, columns: Sequence[int]) -> list[int]:
        """Number of ids of each feature, given their columns."""
        if self.offsets is None:
            return [self.batch] * len(columns)
        starts = self.offsets[:: self.batch].tolist() if self.batch else [0] * (max(columns) + 2)
        return [starts[c + 1] - starts[c] for c in columns]


class NativeLookup:
    """Programs of many features, ready to run.

    Args:
        programs, places, index: as :class:`VectorisedLookup` has them.
        storages: shape of each storage by name.
        slots: where each feature's vectors go.
        widths: columns of each output.
        columns: column of each feature in the matrix of ids.
        limits: bound of each feature's ids, -1 for any id.
        optional: whether a feature's id -1 is none.
        shapes: of a sample's vectors in each output, where they are not all in one row of it.
    """

    def __init__(
        self,
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        index: IndexStore,
        storages: Mapping[str, tuple[int, int]],
        slots: Sequence[Slot],
        widths: Sequence[int],
        columns: Sequence[int],
        limits: Sequence[int],
        optional: Sequence[bool],
        shapes: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        self.storages, self.widths, self._index = dict(storages), tuple(widths), index
        self.shapes = tuple(shapes or ((width,) for width in widths))
        self._features, self._row_lookups, self.kept_width = encode(
            programs, places, list(storages), index, slots, columns, limits, optional
        )
        self._columns, self._kept_widths, self._reads = tuple(columns), self._per_feature(), self._rows_read()
        count = len(storages)
        self._storage_widths = array("q", [width for _, width in storages.values()])
        self._sizes = [rows * width for rows, width in storages.values()]
        call = Call(
            features=self._features.ctypes.data,
            row_lookups=self._row_lookups.ctypes.data,
            feature_count=len(self._features),
            row_lookup_count=len(self._row_lookups),
            storage_widths=self._storage_widths.buffer_info()[0],
            storage_count=count,
            output_count=len(widths),
            threads=1,
        )
        # Behind it: pointers to storages and index arrays, a Matrix per output; kinds of storages, bytes of their rows.
        self._array_count = len(list(index.buffers()))
        behind = [0] * (count + self._array_count) + [n for width in widths for n in (0, width)] + [0] * (2 * count)
        # As numbers, which are copied and set several times as fast as a structure's fields.
        self._record = array("q", bytes(call)) + array("q", behind)
        self._row_lookup_count = len(self._row_lookups)
        self.handle = handle_of(self)
        # Copies encode anew: records hold addresses.
        self._given = (programs, places, index, storages, slots, widths, columns, limits, optional, shapes)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeLookup, self._given

    def _per_feature(self) -> list[int]:
        """Numbers per id that are kept for backward."""
        starts = [f["first"] for f in self._features]
        kept = [
            0 if f["plain"] else self._row_lookups[first]["kept"]
            for f, first in zip(self._features, starts, strict=True)
        ]
        ends, end = [0] * len(kept), self.kept_width
        for i in range(len(kept) - 1, -1, -1):
            ends[i] = 0 if self._features[i]["plain"] else end - kept[i]
            end = end if self._features[i]["plain"] else kept[i]
        return [int(n) for n in ends]

    def kept_shape(self, ids: Ids) -> tuple[int, int]:
        """Of what forward keeps for backward."""
        if ids.offsets is None:
            return ids.batch, self.kept_width
        counts = ids.counts(self._columns) if self.kept_width else []
        return sum(n * w for n, w in zip(counts, self._kept_widths, strict=False)), 1

    def _call(self, ids: Ids, tables: Sequence[Tensor], outputs: Sequence[Tensor], kept: Tensor | None) -> array[int]:
        """One call's record, which tensors have to outlive."""
        call, values, batch, at = self._record[:], ids.values, ids.batch, _BEHIND
        start, lookups = call.buffer_info()[0], batch * self._row_lookup_count
        if ids.offsets is None:
            strides, offsets, weights = values.stride(), 0, 0
        else:
            strides, offsets, lookups = (0,), ids.offsets.data_ptr(), values.numel()
            weights = 0 if ids.weights is None else ids.weights.data_ptr()
        _ASKED.pack_into(
            call, 8 * _IDS, values.data_ptr(), batch, strides[0], strides[-1], values.dtype is torch.int32,
            offsets, weights, start + 8 * at,
        )  # fmt: skip
        number, decodes, sizes, widths = 0, False, self._sizes, self._storage_widths
        for table in tables:
            call[at + number] = table.data_ptr()
            decodes |= table.dtype is not torch.float32
            # Sizes of integers are what the export that holds them says.
            if (table.numel() < sizes[number] or table.size(1) != widths[number]) and table.dtype is not torch.uint8:
                self._refuse(table, number)
            number += 1
        at += number
        if self._array_count:
            call[_INDEX] = start + 8 * at
            for held in self._index.arrays.held.values():
                call[at] = _pointer(held)
                at += 1
        call[_OUTPUTS] = start + 8 * at
        for output in outputs:
            call[at] = output.data_ptr()
            at += 2
        if decodes:
            call[_KINDS_AT], call[_BYTES_AT] = start + 8 * at, start + 8 * (at + len(tables))
            bytes_of_rows = [t.stride(0) * t.element_size() for t in tables]
            call[at:] = array("q", self._kinds(tables) + bytes_of_rows)
        if kept is not None:
            call[_KEPT], call[_KEPT + 1] = kept.data_ptr(), self.kept_width
        if lookups >= _WORTH_A_THREAD:
            call[_THREADS] = torch.get_num_threads()
        return call

    def _refuse(self, table: Tensor, at: int) -> None:
        """What a user has put in a storage's place; rows are read by the number that was there."""
        name, wanted = list(self.storages.items())[at]
        raise ConfigError(
            f"{name!r} must be {list(wanted)}, or of more rows; got {list(table.shape)}. Replace a table by one that "
            "fits, or build a new module for fewer ids"
        )

    def _kinds(self, tables: Sequence[Tensor]) -> list[int]:
        """Precision of each storage."""
        return [
            _KINDS.get(t.dtype, _INT8 if t.shape[1] == HEAD + width else _INT4)
            for t, width in zip(tables, self._storage_widths, strict=True)
        ]

    def forward(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        outputs: Sequence[Tensor],
        kept: Tensor | None = None,
        mask: Mask | None = None,
    ) -> bool:
        """Fill ``outputs [B, width]`` with the vectors of ids, or of bags; False where an id is out of range.

        Args:
            tables: ``[rows, width]`` per storage, contiguous: float32, float16, bfloat16; or uint8 ``[rows, items]``,
                the integers of :class:`recsys_embed.kernels.precision.Layout`.
            outputs: float32, contiguous; more dimensions of the width are as good.
            kept: float32 of ``kept_shape``, filled with what a backward will need.
            mask: of the first output, by sample: what it makes of it goes where it says.
        """
        call = self._call(ids, tables, outputs, kept)
        if mask is not None:
            call[_MASK] = ctypes.addressof(mask)
        return checked(loaded().handle.rse_forward(call.buffer_info()[0]))

    def update(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Tensor | None,
        optimizer: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        step_logs: Sequence[StepLog],
    ) -> None:
        """One step of the optimizer on the rows that ``ids`` read, in place.

        Args:
            gradients: of the outputs.
            kept: by forward, None where ``kept_width`` is 0.
            states: per storage, the tensors of the optimizer's state by name.
            step_logs: per storage, advanced to this step.
        """
        updates = _updates(optimizer, tables, states, step_logs)
        self._backward(ids, tables, gradients, kept, updates)
        increment_version([*tables, *(tensor for state in states for tensor in state.values())])

    def catch_up(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        optimizer: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        step_logs: Sequence[StepLog],
    ) -> None:
        """Apply the steps missed by rows that ``ids`` read, in place; forward refuses ids out of range."""
        call = self._call(ids, tables, (), None)
        updates = _updates(optimizer, tables, states, step_logs)
        checked(loaded().handle.rse_backward(call.buffer_info()[0], ctypes.addressof(updates), 1))

    def gradients(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Tensor | None,
        sparse: bool,
    ) -> list[Tensor]:
        """Gradients of the tables: dense, or sparse and coalesced."""
        updates = (Update * len(tables))()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        counts = ids.counts(self._columns)
        for update, table, reads in zip(updates, tables, self._reads, strict=True):
            update.rule.number, update.rows = _SPARSE if sparse else _DENSE, table.shape[0]
            number = min(table.shape[0], sum(n * r for n, r in zip(counts, reads, strict=True)))
            values = table.new_empty(number, table.shape[1]) if sparse else torch.zeros_like(table)
            rows = table.new_empty(number if sparse else 0, dtype=torch.int64)
            count = table.new_zeros(1, dtype=torch.int64)
            update.gradient, update.touched, update.touched_count = values.data_ptr(), _pointer(rows), count.data_ptr()
            found.append((values, rows, count))
        self._backward(ids, tables, gradients, kept, updates)
        if not sparse:
            return [values for values, _, _ in found]
        out = []
        for table, (values, rows, count) in zip(tables, found, strict=True):
            ordered, order = rows[: int(count)].sort()
            parts = (ordered.unsqueeze(0), values.index_select(0, order))
            out.append(torch.sparse_coo_tensor(*parts, table.shape, is_coalesced=True, check_invariants=False))
        return out

    def _rows_read(self) -> list[list[int]]:
        """Most rows of each storage that an id of each feature reads."""
        out = [[0] * len(self._features) for _ in self.storages]
        for i, feature in enumerate(self._features):
            for row_lookup in self._row_lookups[feature["first"] : feature["first"] + feature["row_lookups"]]:
                out[row_lookup["storage"]][i] += int(row_lookup["num_rows"])
                if row_lookup["weight_storage"] >= 0:
                    out[row_lookup["weight_storage"]][i] += 1
        return out

    def _backward(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Tensor | None,
        updates: Updates,
    ) -> None:
        call = self._call(ids, tables, gradients, kept)
        if not checked(loaded().handle.rse_backward(call.buffer_info()[0], ctypes.addressof(updates), 0)):
            raise RuntimeError("ids changed between forward and backward")
