"""Lookups of many features on a GPU: host code of the kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import IdRangeError
from recsys_embed.kernels import pointers
from recsys_embed.kernels.deferred_steps import StepLog, catch_up
from recsys_embed.kernels.derivatives import catching_up
from recsys_embed.kernels.indexes import ArrayVersions, IndexStore
from recsys_embed.kernels.low_precision_table import LowPrecisionTable, stored_rows
from recsys_embed.kernels.native.records import Slot, encode
from recsys_embed.kernels.places import GradientLayout, Place
from recsys_embed.kernels.pointers import checked_address
from recsys_embed.kernels.torch_lookup import TorchLookup
from recsys_embed.kernels.triton import forward as forward_kernel
from recsys_embed.kernels.triton import spread as spread_kernel
from recsys_embed.kernels.triton.few_bits import formats_of
from recsys_embed.kernels.triton.fields import Tables, lay_out
from recsys_embed.kernels.triton.update import Source, StorageReads, Target, reads_by_storage
from recsys_embed.optim import FusedOptimizer, RowGradient

# Elements per program, most columns of its tile, and warps.
_TILE, _COLUMNS, _WARPS = 2048, 256, 4


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


class Kept(NamedTuple):
    """Saved for backward: rows of every read, int32 ``[reads, B]``, and the values that products read."""

    found: Tensor
    kept: Tensor | None


class _Device(NamedTuple):
    """The encoded programs on one device, and the buffer in which forward reports ids out of range."""

    jobs: Tensor
    row_lookups: Tensor
    scales: Tensor
    reads: Tensor
    read_scales: Tensor
    faults: Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context in which kernels are launched on the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def state_faults(optimizer: FusedOptimizer, table: Tensor, state: Mapping[str, Tensor]) -> list[str]:
    """Why the state of a table is not what kernels take it for."""
    found = []
    for name, kind in optimizer.tensors.items():
        count, number = table.shape[0], optimizer.formats[name].dtype
        count *= table.shape[1] if kind == "element" else 1
        found += pointers.faults(state[name], (number,), count, f"state {name!r}", device=table.device)
    return found


def table_faults(
    table: Tensor, dtype: torch.dtype, rows: int, width: int, name: str, device: torch.device
) -> list[str]:
    """Why a table is not what kernels take it for."""
    if isinstance(table, LowPrecisionTable):
        format = table.format
        return pointers.faults(table.stored, (format.dtype,), rows * format.items(width), name, device=device)
    return pointers.faults(table, (dtype,), rows * width, name, device=device)


class TritonLookup:
    """A lookup of many features, on the CUDA device of the tensors of each call.

    Args:
        names: of the features, for errors.

    Other arguments are those of :class:`NativeLookup`.
    """

    def __init__(
        self,
        names: Sequence[str],
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        index: IndexStore,
        storages: Mapping[str, tuple[int, int]],
        slots: Sequence[Slot],
        widths: Sequence[int],
        columns: Sequence[int],
        limits: Sequence[int],
        optional: Sequence[bool],
    ) -> None:
        self._given = (names, programs, places, index, storages, slots, widths, columns, limits, optional)
        self.storages, self.widths, self.names, self._index = dict(storages), tuple(widths), tuple(names), index
        features, row_lookups, _ = encode(programs, places, list(storages), index, slots, columns, limits, optional)
        self.tables: Tables = lay_out(features, row_lookups, widths)
        self._limits = list(limits)
        self._options = self._structure(features)
        self._reads = reads_by_storage(self.tables, list(storages.values()))
        self.read = frozenset(number for number, _ in self._reads)
        self._devices: dict[torch.device, _Device] = {}
        self._addresses: dict[tuple[int, ...], Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TritonLookup, self._given

    @cached_property
    def by_torch(self) -> TorchLookup:
        """The same lookup by torch's operations."""
        _, programs, places, index, storages, slots, widths, columns, _, optional = self._given
        shapes = [(width,) for width in widths]
        return TorchLookup(programs, places, index, list(storages), slots, columns, optional, shapes)

    def _structure(self, features: Any) -> dict[str, Any]:
        """Compile-time constants of the kernels."""
        column = self.tables.column
        used = column("row_lookups", "weight_storage") >= 0
        kinds = {*column("row_lookups", "of_kind").tolist(), *column("row_lookups", "weight_of_kind")[used].tolist()}
        slices = (column("row_lookups", "num_rows") > 1) | (column("row_lookups", "repeat") != 0)
        counts = column("jobs", "row_lookups")
        aligned = [column("jobs", name) for name in ("out", "stride", "column", "span")]
        aligned.append(column("row_lookups", "width")[~slices])
        if not slices.any():
            aligned.append(column("row_lookups", "kept")[column("row_lookups", "kept") >= 0])
        span = int(column("jobs", "span").max())
        cols = min(_COLUMNS, power_of_two(span))
        self._blocks = -(-span // cols)
        return {
            "TILE": max(1, _TILE // cols) if cols > 4 else 512,
            "COLS": cols,
            "VECTOR": math.gcd(8, *(int(v) for values in aligned for v in values)),
            "MOST": int(counts.max()),
            "EVEN": bool((counts == counts.max()).all()),
            "KINDS": sum(1 << kind for kind in kinds),
            "PRODUCTS": bool(column("jobs", "product").any()),
            "SLICES": bool(slices.any()),
            "SIGNS": bool(column("row_lookups", "has_sign").any()),
            "WEIGHTS": bool(used.any()),
            "LIMITS": bool((column("jobs", "limit") >= 0).any()),
            "NONE": bool(column("jobs", "optional").any()),
        }

    # -- data on the device ----------------------------------------------------------------------------------

    def _device(self, device: torch.device) -> _Device:
        found = self._devices.get(device)
        if found is None:
            arrays = (
                self.tables.jobs,
                self.tables.row_lookups,
                self.tables.scales,
                self.tables.reads,
                self.tables.read_scales,
            )
            jobs, row_lookups, scales, reads, read_scales = (torch.from_numpy(a).to(device) for a in arrays)
            # Faults are written to pinned host memory, which the host reads without synchronising.
            faults = torch.zeros(len(self.names), 2, dtype=torch.int64, pin_memory=device.type == "cuda")
            found = _Device(jobs, row_lookups, scales, reads, read_scales, faults)
            self._devices[device] = found
        return found

    def _addresses_of(self, tables: Sequence[Tensor]) -> Tensor:
        """Addresses of the tables and of the index arrays, on the tables' device."""
        key = tuple(checked_address(stored_rows(t)) for t in (*tables, *self._index.arrays.held.values()))
        found = self._addresses.get(key)
        if found is None or found.device != tables[0].device:
            self._addresses.clear()
            found = self._addresses[key] = torch.tensor(key, dtype=torch.int64, device=tables[0].device)
        return found

    def raise_faults(self, device: torch.device) -> None:
        """Raise if a finished lookup met an id out of range; does not synchronise.

        Raises:
            IdRangeError: names the first feature at fault and one such id.
        """
        faults = self._device(device).faults
        bad = faults[:, 0].nonzero()
        if len(bad):
            first = int(bad[0])
            got = int(faults[first, 1])
            faults.zero_()
            raise IdRangeError(
                f"ids must be in [0, {self._limits[first]}); got {got} (feature {self.names[first]!r}). Where ids "
                "never seen may come, say what becomes of them: `unseen` 'hash', 'oov' or 'zero'"
            )

    def arrays_read(self) -> ArrayVersions:
        """Versions of the index arrays that a lookup reads now."""
        return self._index.versions()

    def check_arrays(self, versions: ArrayVersions) -> None:
        """Refuse a backward whose lookup read other index arrays, see :meth:`IndexStore.check_unchanged`."""
        if versions:
            self._index.check_unchanged(versions)

    # -- running --------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, tables: Sequence[Tensor], keep: bool) -> tuple[tuple[Tensor, ...], Kept | None]:
        """Vectors of ``ids [B, F]`` per output, ``[B, width]`` in the tables' type; and the values that backward needs.

        Ids out of range read nothing and give zeros. The error is raised once the kernel has finished: at once with
        ``CUDA_LAUNCH_BLOCKING=1``, else by the next lookup or backward.

        Raises:
            IdRangeError: an id of this lookup or an earlier one is out of range.
        """
        self.raise_faults(ids.device)
        outputs, kept = self._run(ids, tables, keep)
        if ids.is_cuda and os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
            torch.cuda.synchronize(ids.device)
        self.raise_faults(ids.device)
        return outputs, kept if keep else None

    def _run(self, ids: Tensor, tables: Sequence[Tensor], keep: bool) -> tuple[tuple[Tensor, ...], Kept]:
        device = self._device(ids.device)
        batch, like, jobs = ids.shape[0], tables[0], len(self.tables.jobs)
        whole = torch.empty(batch * sum(self.widths), dtype=like.dtype, device=ids.device)
        found = torch.empty(len(self.tables.reads) if keep else 0, batch, dtype=torch.int32, device=ids.device)
        kept = like.new_empty(self.tables.kept * batch) if keep and self.tables.kept else None
        addresses = self._addresses_of(tables)
        coded = formats_of(tables)
        formats, distances = (addresses, addresses) if coded is None else coded
        options = self._options
        tiles = -(-batch // options["TILE"])
        if tiles:
            with on_device(ids):
                forward_kernel.forward[(tiles * jobs, self._blocks)](
                    ids, *ids.stride(), batch,
                    device.jobs, device.row_lookups, device.scales, addresses, formats, distances,
                    addresses[len(tables) :],
                    whole, found, whole if kept is None else kept, device.faults, jobs,
                    **options, SAVE=keep, KEEP=kept is not None, CODED=coded is not None, num_warps=_WARPS,
                )  # fmt: skip
        return self._split(whole, batch), Kept(found, kept)

    def _split(self, whole: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Outputs that share memory but are not views of each other, which autograd would treat as one tensor."""
        if len(self.widths) == 1:
            return (whole.view(batch, -1) if batch else whole.view(0, self.widths[0]),)
        outputs, at = [], 0
        for width in self.widths:
            outputs.append(whole.new_empty(0).set_(whole.untyped_storage(), at, (batch, width), (width, 1)))
            at += batch * width
        return tuple(outputs)

    # -- backward -------------------------------------------------------------------------------------------------

    def _source(self, ids: Tensor, gradients: Sequence[Tensor], kept: Kept) -> Source:
        """Gradients of all reads; those of rows that forward multiplied by something are computed here."""
        device, batch = self._device(ids.device), ids.shape[0]
        outer = gradients[0] if len(gradients) == 1 else torch.cat([g.reshape(-1) for g in gradients])
        if kept.kept is None:
            return Source(device.reads, device.read_scales, outer, outer)
        own = torch.empty(self.tables.own * batch, device=ids.device)
        jobs, cols = len(self.tables.jobs), power_of_two(int(self.tables.column("jobs", "span").max()))
        tile = max(1, _TILE // cols)
        chosen = {name: self._options[name] for name in ("VECTOR", "PRODUCTS", "SLICES", "SIGNS", "WEIGHTS")}
        spread_kernel.spread[(-(-batch // tile) * jobs,)](
            ids, *ids.stride(), batch, device.jobs, device.row_lookups, device.scales, kept.found, kept.kept,
            outer, own, jobs, TILE=tile, COLS=cols, **chosen, num_warps=4,
        )  # fmt: skip
        return Source(device.reads, device.read_scales, outer, own)

    def _check(
        self,
        ids: Tensor,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        optimizer: FusedOptimizer | None = None,
        states: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Refuse tensors that are not what they were when the lookup began."""
        found, device, batch = [], ids.device, ids.shape[0]
        dtype = gradients[0].dtype if gradients else tables[0].dtype
        for width, gradient in zip(self.widths, gradients, strict=False):
            found += pointers.faults(gradient, (dtype,), batch * width, "a gradient", device=device)
        for (name, (rows, width)), table in zip(self.storages.items(), tables, strict=True):
            found += table_faults(table, dtype, rows, width, f"table {name!r}", device)
        if optimizer is not None:
            for table, state in zip(tables, states, strict=False):
                found += state_faults(optimizer, table, state)
        pointers.check(found)

    def update(
        self,
        ids: Tensor,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Kept,
        optimizer: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        step_logs: Sequence[StepLog],
        frozen: Collection[int] = (),
    ) -> None:
        """One step of the optimizer on the rows that ``ids`` read, in place.

        Args:
            gradients: of the outputs, contiguous.
            kept: saved by forward.
            states: per storage, the tensors of the optimizer's state by name.
            step_logs: per storage, advanced to this step.
            frozen: storages to leave as they are.
        """
        self.raise_faults(ids.device)
        if ids.shape[0] == 0:
            return
        self._check(ids, tables, gradients, optimizer, states)
        all_sorted = torch.are_deterministic_algorithms_enabled()
        with on_device(ids):
            source = self._source(ids, gradients, kept)
            for number, reads in self._reads:
                if number in frozen:
                    continue
                target = Target.step(optimizer, tables[number], states[number], step_logs[number])
                reads.run(kept.found, source, target, all_sorted)
        increment_version([*tables, *(tensor for state in states for tensor in state.values())])

    def catch_up(
        self,
        ids: Tensor,
        tables: Sequence[Tensor],
        optimizer: FusedOptimizer,
        states: Sequence[Mapping[str, Tensor]],
        step_logs: Sequence[StepLog],
    ) -> None:
        """Apply the deferred steps of rows that ``ids`` read, in place, with torch's operations."""
        _, kept = self._run(ids, tables, keep=True)
        for number, reads in self._reads:
            rows, log, table = reads.all_rows(kept.found), step_logs[number], tables[number]
            with catching_up(table):
                catch_up(optimizer, table, states[number], rows[rows >= 0].unique(), log, log.step)

    def gradients(
        self,
        ids: Tensor,
        tables: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Kept,
        layout: GradientLayout,
        wanted: Sequence[bool] | None = None,
    ) -> list[Tensor | None]:
        """Gradients of the tables: dense; or by row, which waits for the device to count the rows.

        None for storages that the lookup does not read.

        Args:
            wanted: of which storages; None for the others.
        """
        self.raise_faults(ids.device)
        self._check(ids, tables, gradients)
        with on_device(ids):
            source = self._source(ids, gradients, kept) if ids.shape[0] else None
        out: list[Tensor | None] = [None] * len(tables)
        for number, reads in self._reads:
            table = tables[number]
            if wanted is not None and not wanted[number]:
                continue
            if layout == "dense":
                with on_device(ids):
                    out[number] = (torch.zeros_like(table) if source is None else
                                   self._dense(reads, kept.found, source, table))  # fmt: skip
            else:
                with on_device(ids):
                    rows, values = self._rows(reads, kept.found, source, table)
                out[number] = _by_row(layout, rows, values, table)
        return out

    def _dense(self, reads: StorageReads, found: Tensor, source: Source, table: Tensor) -> Tensor:
        gradient = torch.zeros_like(table)
        reads.run(found, source, Target.gradient(gradient), torch.are_deterministic_algorithms_enabled())
        return gradient

    def _rows(self, reads: StorageReads, found: Tensor, source: Source | None, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that are read, distinct and ascending, and the sum of each one's gradients."""
        if source is None:
            return torch.empty(0, dtype=torch.int64, device=table.device), table.new_empty(0, table.shape[1])
        keys, order = reads.all_rows(found).sort(stable=True)
        rows, place = keys.unique_consecutive(return_inverse=True)
        if int(rows[0]) < 0:
            rows, place = rows[1:], place - 1
        values = table.new_zeros(len(rows), table.shape[1])
        reads.sum_sorted(
            place.to(torch.int32), order, found.shape[1], reads.all_sources(source), 0, Target.gradient(values)
        )
        return rows.long(), values


def _by_row(layout: GradientLayout, rows: Tensor, values: Tensor, table: Tensor) -> Tensor:
    if layout == "rows":
        return RowGradient(rows, values, table.shape[0], distinct=True, ordered=True)
    at = rows.unsqueeze(0)
    return torch.sparse_coo_tensor(at, values, table.shape, is_coalesced=True, check_invariants=False)
