"""The compiled CPU kernels: one call looks up, or updates, the rows of all features (ops/cpu)."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from recsys_embed.core.precision import Layout
from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import ConfigError
from recsys_embed.kernels import pointers
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.derivatives import have_tangents
from recsys_embed.kernels.indexes import ArrayVersions, IndexStore
from recsys_embed.kernels.low_precision_table import LowPrecisionTable, stored_rows
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native.handles import handle_of
from recsys_embed.kernels.native.library import Call, Library, Mask, Update, library, loaded, words_of
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.kernels.native.records import Slot, encode
from recsys_embed.kernels.native.row_steps import WORTH_A_THREAD, Updates, checked, kind_of, updates_of
from recsys_embed.kernels.places import GradientLayout, Place
from recsys_embed.kernels.pointers import checked_address
from recsys_embed.kernels.torch_lookup import TorchLookup
from recsys_embed.optim import FusedOptimizer, RowGradient, rule_name

_DENSE, _SPARSE, _NO_UPDATE = -1, -2, -3
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BY_ROW = {"int8": 3, "int4": 4, "int2": 5, "fp8": 6}
# Ids of bags from which on several threads are used: their rows are summed where they are read.
_BAGS_WORTH_A_THREAD = 16384
_STORED = (*_KINDS, torch.uint8)
# Positions in a call's record of the fields that differ between calls; `_ASKED`: the ids and the fields after them.
_AT, _BEHIND, _ASKED = words_of(Call), ctypes.sizeof(Call) // 8, struct.Struct("8q")
_IDS, _KEPT, _OUTPUTS = _AT["ids"], _AT["kept"], _AT["outputs"]
_KINDS_AT, _BYTES_AT, _STEPS_AT = _AT["storage_kinds"], _AT["storage_bytes"], _AT["storage_steps"]
_INDEX, _THREADS, _MASK = _AT["index"], _AT["threads"], _AT["mask"]


def knows(optimizer: FusedOptimizer | None) -> bool:
    """Whether the kernels can run and have the optimizer's rule; other rules run on backend ``"torch"``."""
    found = native_library.library()
    return isinstance(found, Library) and (optimizer is None or rule_name(optimizer) in found.rules)


def runs_on(ids: Tensor, tables: Sequence[Tensor], types: Collection[torch.dtype] = (torch.float32,)) -> bool:
    """Whether the kernels may read these tensors' memory: on the CPU, of these types, not traced."""
    if torch.compiler.is_compiling():
        # Compiled models use custom operators; exported programs must only contain torch's.
        real = not torch.compiler.is_exporting()
        return real and all(t.device.type == "cpu" and t.dtype in types for t in tables)
    if type(ids) is not Tensor or not ids.is_cpu or not isinstance(library(), Library):
        return False
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    for t in tables:
        if isinstance(t, LowPrecisionTable):
            # Rows that are stored unrounded are rounded by torch.
            if not t.is_cpu or not t.stored.is_contiguous() or t.format.has_master:
                return False
        elif type(t) not in (Tensor, Parameter) or t.dtype not in types or not t.is_cpu or not t.is_contiguous():
            return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return forward_ad._current_level < 0 or not have_tangents((ids, *tables))


def reads(ids: Tensor, stored: Sequence[Tensor]) -> bool:
    """As :func:`runs_on`, for serving: of any precision."""
    return runs_on(ids, stored, _STORED)


@cache
def _kind_of_rows(size: int, width: int) -> int:
    """Precision of rows with a scale, by their bytes, which differ from 8 columns on."""
    return next(number for kind, number in _BY_ROW.items() if Layout(kind, width).items == size)


class Ids(NamedTuple):
    """Ids of many features, int32 or int64 on the CPU.

    Args:
        values: ``[B, F]`` of any strides, or ``[B]`` of a single feature; or ``[n]`` with ``offsets``, feature by
            feature.
        offsets: int64 ``[F * B + 1]``, ascending from 0 to n: bag ``f * B + b`` holds the ids of feature f of sample b.
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

    def copy(self) -> Ids:
        """The same ids in memory of their own."""
        values, offsets, weights = (None if t is None else t.clone() for t in self[:3])
        return Ids(cast("Tensor", values), offsets, weights, self.batch)

    def counts(self, columns: Sequence[int]) -> list[int]:
        """Number of ids of each feature, given their columns."""
        if self.offsets is None:
            return [self.batch] * len(columns)
        starts = self.offsets[:: self.batch].tolist() if self.batch else [0] * (max(columns) + 2)
        return [starts[c + 1] - starts[c] for c in columns]


class NativeLookup:
    """A lookup of many features, encoded for the kernels.

    Args:
        programs, places, index: as :class:`VectorisedLookup` has them.
        storages: shape of each storage by name.
        slots: destination of each feature's vectors.
        widths: columns of each output.
        columns: column of each feature in the matrix of ids.
        limits: bound of each feature's ids, -1 for any id.
        optional: per feature, whether an id of -1 means no id.
        shapes: of a sample in each output, if it is not one row.
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
            features=pointers.of_numpy(self._features),
            row_lookups=pointers.of_numpy(self._row_lookups),
            feature_count=len(self._features),
            row_lookup_count=len(self._row_lookups),
            storage_widths=pointers.of_array(self._storage_widths),
            storage_count=count,
            output_count=len(widths),
            threads=1,
        )
        # After the record: pointers to storages and index arrays, a Matrix per output; kinds, row bytes and steps of
        # storages.
        self._array_count = len(index.arrays.held)
        behind = [0] * (count + self._array_count) + [n for width in widths for n in (0, width)] + [0] * (3 * count)
        # An array of integers: copying and setting it is several times as fast as setting fields of a ctypes structure.
        self._record = array("q", bytes(call)) + array("q", behind)
        self._row_lookup_count = len(self._row_lookups)
        self.handle = handle_of(self, (self.widths, self.kept_width, self._array_count))
        # Copies encode again, because records hold addresses.
        self._given = (programs, places, index, storages, slots, widths, columns, limits, optional, shapes)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeLookup, self._given

    @cached_property
    def by_torch(self) -> TorchLookup:
        """The same lookup by torch's operations."""
        programs, places, index, storages, slots, _, columns, _, optional, _ = self._given
        return TorchLookup(programs, places, index, list(storages), slots, columns, optional, self.shapes)

    def _per_feature(self) -> list[int]:
        """Floats per id saved for backward."""
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
        """Shape of the values that forward saves for backward."""
        if ids.offsets is None:
            return ids.batch, self.kept_width
        counts = ids.counts(self._columns) if self.kept_width else []
        return sum(n * w for n, w in zip(counts, self._kept_widths, strict=False)), 1

    def check(self, ids: Ids, tables: Sequence[Tensor], outputs: Sequence[Tensor], kept: Tensor | None) -> None:
        """Refuse tensors that are not what they were when the lookup began.

        Args:
            outputs: of forward, or gradients of these.
        """
        values, batch, widest = ids.values, ids.batch, max(self._columns)
        found = pointers.faults(values, (torch.int64, torch.int32), 0, "ids", strided=ids.offsets is None)
        if ids.offsets is None:
            fits = values.dim() == 1 if widest == 0 else values.dim() == 2 and values.shape[1] > widest
            if values.shape[:1] != (batch,) or not (fits or values.dim() == 2):
                found.append(f"ids must be [{batch}, {widest + 1} or more], got {list(values.shape)}")
        else:
            found += pointers.faults(ids.offsets, (torch.int64,), (widest + 1) * batch + 1, "offsets")
            if not found and int(ids.offsets[-1]) > values.numel():
                found.append(f"ids must be as many as offsets say, got {values.numel()}")
            if ids.weights is not None:
                found += pointers.faults(ids.weights, (torch.float32,), values.numel(), "weights of ids")
        for (name, (_, width)), size, table in zip(self.storages.items(), self._sizes, tables, strict=True):
            if isinstance(table, LowPrecisionTable):
                items, format = table.stored.shape[1], table.format
                found += pointers.faults(table.stored, (format.dtype,), size // width * items, f"table {name!r}")
            else:
                found += pointers.faults(table, (torch.float32,), size, f"table {name!r}")
            if table.dim() != 2 or table.shape[1] != width:
                found.append(f"table {name!r} must be [rows, {width}], got {list(table.shape)}")
        for width, output in zip(self.widths, outputs, strict=False):
            found += pointers.faults(output, (torch.float32,), batch * width, "a gradient")
        if kept is not None and not found:
            found += pointers.faults(kept, (torch.float32,), prod(self.kept_shape(ids)), "kept values")
        pointers.check(found)

    def arrays_read(self) -> ArrayVersions:
        """Versions of the index arrays that a lookup reads now."""
        return self._index.versions() if self._array_count else ()

    def check_arrays(self, versions: ArrayVersions) -> None:
        """Refuse a backward whose lookup read other index arrays, see :meth:`IndexStore.check_unchanged`."""
        if versions:
            self._index.check_unchanged(versions)

    def arrays_as_numbers(self) -> list[Tensor]:
        """As :meth:`arrays_read`, for compiled programs: no tensor where there are no arrays."""
        return [self._index.version_numbers()] if self._array_count else []

    def check_numbers(self, numbers: Sequence[Tensor]) -> None:
        """As :meth:`check_arrays`."""
        for given in numbers:
            self._index.check_version_numbers(given)

    def _call(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        outputs: Sequence[Tensor],
        kept: Tensor | None,
        known: bool = False,
    ) -> array[int]:
        """One call's record; the tensors have to outlive it.

        Args:
            known: :func:`runs_on` has just held.
        """
        if not known:
            self.check(ids, tables, outputs, kept)
        call, values, batch, at = self._record[:], ids.values, ids.batch, _BEHIND
        start, lookups = pointers.of_array(call), batch * self._row_lookup_count
        if ids.offsets is None:
            strides, offsets, weights = values.stride(), 0, 0
        else:
            strides, offsets, lookups = (0,), checked_address(ids.offsets), values.numel()
            weights = 0 if ids.weights is None else checked_address(ids.weights)
        _ASKED.pack_into(
            call, 8 * _IDS, checked_address(values), batch, strides[0], strides[-1], values.dtype is torch.int32,
            offsets, weights, start + 8 * at,
        )  # fmt: skip
        number, decodes, sizes, widths = 0, False, self._sizes, self._storage_widths
        for table in tables:
            if type(table) is LowPrecisionTable:
                rows, columns = len(table.stored), table.shape[1]
                if rows * columns < sizes[number] or columns != widths[number]:
                    self._refuse(table, number)
                call[at + number] = checked_address(table.stored)
                decodes, number = True, number + 1
                continue
            call[at + number] = checked_address(table)
            decodes |= table.dtype is not torch.float32
            # Quantised storages come from an export, whose reader has checked their shapes.
            if (table.numel() < sizes[number] or table.shape[1] != widths[number]) and table.dtype is not torch.uint8:
                self._refuse(table, number)
            number += 1
        at += number
        if self._array_count:
            call[_INDEX] = start + 8 * at
            for pointer in self._index.pointers():
                call[at] = pointer
                at += 1
        call[_OUTPUTS] = start + 8 * at
        for output in outputs:
            call[at] = checked_address(output)
            at += 2
        if decodes:
            call[_KINDS_AT], call[_BYTES_AT] = start + 8 * at, start + 8 * (at + len(tables))
            held = [stored_rows(t) for t in tables]
            bytes_of_rows = [t.stride(0) * t.element_size() for t in held]
            call[at : at + 2 * len(tables)] = array("q", self._kinds(tables) + bytes_of_rows)
            steps = [t.format.step if isinstance(t, LowPrecisionTable) else 0.0 for t in tables]
            if any(steps):
                call[_STEPS_AT], at = start + 8 * (at + 2 * len(tables)), at + 2 * len(tables)
                call[at : at + len(tables)] = array("q", array("d", steps).tobytes())
        if kept is not None:
            call[_KEPT], call[_KEPT + 1] = checked_address(kept), self.kept_width
        if lookups >= (WORTH_A_THREAD if ids.offsets is None else _BAGS_WORTH_A_THREAD):
            call[_THREADS] = torch.get_num_threads()
        return call

    def _refuse(self, table: Tensor, at: int) -> None:
        """Raise for a storage that was replaced by a tensor of fewer rows or another width."""
        name, wanted = list(self.storages.items())[at]
        raise ConfigError(
            f"{name!r} must be {list(wanted)}, or of more rows; got {list(table.shape)}. Replace a table by one that "
            "fits, or build a new module for fewer ids"
        )

    def _kinds(self, tables: Sequence[Tensor]) -> list[int]:
        """Precision of each storage."""
        return [
            kind_of(t.format)
            if isinstance(t, LowPrecisionTable)
            else _KINDS[t.dtype]
            if t.dtype in _KINDS
            else _kind_of_rows(t.shape[1], width)
            for t, width in zip(tables, self._storage_widths, strict=True)
        ]

    def forward(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        outputs: Sequence[Tensor],
        kept: Tensor | None = None,
        mask: Mask | None = None,
        known: bool = False,
    ) -> bool:
        """Fill ``outputs [B, width]`` with the vectors of ids, or of bags; False where an id is out of range.

        Args:
            tables: ``[rows, width]`` per storage, contiguous: float32, float16, bfloat16; or uint8 ``[rows, items]``,
                the integers of :class:`recsys_embed.core.precision.Layout`.
            outputs: float32, contiguous; the width may be several dimensions.
            kept: float32 of ``kept_shape``, filled with the values that backward needs.
            mask: of the first output; it says where the masked vectors go.
            known: :func:`runs_on`, or :func:`reads`, has just held.
        """
        call = self._call(ids, tables, outputs, kept, known)
        if mask is not None:
            call[_MASK] = pointers.of_record(mask)
        return checked(loaded().handle.rse_forward(pointers.of_array(call)))

    def update(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Tensor | None,
        optimizer: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        step_logs: Sequence[StepLog],
        frozen: Collection[int] = (),
    ) -> None:
        """One step of the optimizer on the rows that ``ids`` read, in place.

        Args:
            gradients: of the outputs.
            kept: saved by forward; None if ``kept_width`` is 0.
            states: per storage, the tensors of the optimizer's state by name.
            step_logs: per storage, advanced to this step.
            frozen: storages to leave as they are.
        """
        self.check(ids, tables, gradients, kept)
        updates = updates_of(optimizer, tables, states, step_logs)
        for number in frozen:
            updates[number].rule.number = _NO_UPDATE
        self._backward(ids, tables, gradients, kept, updates, known=True)
        increment_version([*tables, *(tensor for state in states for tensor in state.values())])

    def catch_up(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        optimizer: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        step_logs: Sequence[StepLog],
    ) -> None:
        """Apply the deferred steps of rows that ``ids`` read, in place; forward checks the range of ids."""
        call = self._call(ids, tables, (), None)
        updates = updates_of(optimizer, tables, states, step_logs)
        checked(loaded().handle.rse_backward(pointers.of_array(call), pointers.of_record(updates), 1))

    def gradients(
        self,
        ids: Ids,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Tensor | None,
        layout: GradientLayout,
        wanted: Sequence[bool] | None = None,
        pool: OutputPool | None = None,
    ) -> list[Tensor | None]:
        """Gradients of the tables: dense; sparse and coalesced; or a :class:`RowGradient` each.

        Args:
            wanted: of which storages; None for the others.
            pool: where the values of rows lie.
        """
        self.check(ids, tables, gradients, kept)
        updates = (Update * len(tables))()
        found: list[tuple[Tensor, Tensor, Tensor] | None] = []
        counts, by_row = ids.counts(self._columns), layout != "dense"
        wanted = (True,) * len(tables) if wanted is None else wanted
        for update, table, reads, want in zip(updates, tables, self._reads, wanted, strict=True):
            update.rule.number, update.rows = _NO_UPDATE, table.shape[0]
            if not want:
                found.append(None)
                continue
            update.rule.number = _SPARSE if by_row else _DENSE
            number = min(table.shape[0], sum(n * r for n, r in zip(counts, reads, strict=True)))
            shape = (number, table.shape[1])
            if by_row:
                values = table.new_empty(shape) if pool is None else pool.take(shape)
            else:
                values = torch.zeros_like(table)
            rows = torch.empty(number if by_row else 0, dtype=torch.int64)
            count = torch.zeros(1, dtype=torch.int64)
            update.gradient, update.touched, update.touched_count = (
                checked_address(values),
                checked_address(rows),
                checked_address(count),
            )
            found.append((values, rows, count))
        self._backward(ids, tables, gradients, kept, updates, known=True)
        out: list[Tensor | None] = []
        for table, parts in zip(tables, found, strict=True):
            if parts is None or not by_row:
                out.append(None if parts is None else parts[0])
                continue
            values, rows, count = parts
            rows, values = rows[: int(count)], values[: int(count)]
            if layout == "rows":
                out.append(RowGradient(rows, values, table.shape[0], distinct=True))
                continue
            ordered, order = rows.sort()
            chosen = values.index_select(0, order)
            out.append(
                torch.sparse_coo_tensor(
                    ordered.unsqueeze(0), chosen, table.shape, is_coalesced=True, check_invariants=False
                )
            )
        return out

    def _rows_read(self) -> list[list[int]]:
        """Largest number of rows of each storage that an id of each feature reads."""
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
        known: bool = False,
    ) -> None:
        call = self._call(ids, tables, gradients, kept, known)
        if not checked(loaded().handle.rse_backward(pointers.of_array(call), pointers.of_record(updates), 0)):
            raise RuntimeError("ids changed between forward and backward")
