"""Stored arrays of each table of a model, and the bytes that follow from them by arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from recsys_embed.core.precision import Layout, Precision, check_precision, matrix_bytes
from recsys_embed.core.program import LookupProgram
from recsys_embed.features import FeatureSpec
from recsys_embed.optim import FusedOptimizer

ArrayRole = Literal["table", "dense", "index"]
UpdateKind = Literal["dense", "sparse", "fused", "frozen"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class ArrayStorage:
    """One stored array ``[rows, width]``.

    Args:
        name: within its table.
        rows: rows.
        width: elements per row.
        itemsize: bytes per element as held now.
        role: ``"table"`` is read by row, ``"dense"`` is read whole by every lookup (projections, networks), ``"index"``
            holds integers (id sets, codes).
        reads: rows that one id reads.
        parameter: identity of the parameter that holds it; tables stacked in one storage have the same.
        trained: whether it gets gradients.
        packed: its bytes, where quantised rows take fewer than ``width * itemsize`` each.
        flat: whether it is a vector ``[width]``; some optimizers treat it unlike a matrix of one row.
        precision: that its plan wants for its rows once they are served.
    """

    name: str
    rows: int
    width: int
    itemsize: int = 4
    role: ArrayRole = "table"
    reads: int = 0
    parameter: Hashable = None
    trained: bool = True
    packed: int | None = None
    flat: bool = False
    precision: str = "fp32"

    @property
    def elements(self) -> int:
        return self.rows * self.width

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize if self.packed is None else self.packed


def stored_bytes(array: ArrayStorage, precision: Precision | None) -> int:
    """Bytes of an array in a file of that precision; None: of the plan's, and as held now without one.

    Tables are laid out as the export lays them out (:mod:`recsys_embed.core.precision`): quantised rows carry an
    fp16 scale and bias, and matrices that every lookup reads whole keep 16 bits per element.

    >>> [stored_bytes(ArrayStorage("weight", 100, 16), p) for p in (None, "fp16", "int8", "int4")]
    [6400, 3200, 2000, 1200]
    """
    if precision is None:
        precision = None if array.precision == "fp32" else check_precision(array.precision)
    if precision is None or array.role == "index":
        return array.nbytes
    if array.role == "dense":
        return min(array.nbytes, matrix_bytes(array.elements, precision))
    dtype = {2: torch.float16}.get(array.itemsize, torch.float32)
    return Layout.of(array.width, precision, dtype, array.rows).nbytes(array.rows)


@dataclass(frozen=True, eq=False)
class TableStorage:
    """What is stored for one table of a model, or one array that several tables share.

    Args:
        name: unique in the report.
        kind: of its holder: a kind of :class:`recsys_embed.discover.FoundTable`, ``"plan"``, ``"file"``, ``"shared"``.
        method: key of the method; ``"full"`` for full tables.
        ids: number of ids.
        width: elements of one id's output vector.
        arrays: stored for it alone.
        update: how gradients reach the tables.
        fused: the optimizer that updates them inside backward, where there is one.
        spec: the feature, where it is known as one.
        config: the method's configuration as JSON values.
        program: the lookup, where there is one.
        paths: dotted names of the modules that read it.
        shared: names of shared arrays that it also reads.
        read_by: for a shared array, the tables that read it.
        at_step: the fused optimizer steps at ``step()``, until when the gradients of the rows read are kept.
        row_reads: row numbers that one id's lookup computes.
        gathered: floats that one id's lookup reads before they combine; 0 where they are the output.
        pools_bags: whether the module pools bags without holding a vector per id.
        lookup_keys: maps ids to keys, equal where two ids read the same rows (see :mod:`.collisions`); None if unknown.
    """

    name: str
    kind: str
    method: str
    ids: int
    width: int
    arrays: tuple[ArrayStorage, ...]
    update: UpdateKind = "dense"
    fused: FusedOptimizer | None = None
    at_step: bool = False
    spec: FeatureSpec | None = None
    config: dict[str, Any] | None = None
    program: LookupProgram | None = None
    paths: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    read_by: tuple[str, ...] = ()
    row_reads: int = 0
    gathered: int = 0
    pools_bags: bool = False
    lookup_keys: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def arrays_of(self, role: ArrayRole) -> Iterator[ArrayStorage]:
        """The arrays with this role."""
        return (a for a in self.arrays if a.role == role)

    @property
    def itemsize(self) -> int:
        """Bytes per element of the stored tables; 4 where nothing is stored."""
        return next((a.itemsize for a in self.arrays if a.role != "index"), 4)

    def gradient(self, lookups: int) -> int:
        """Bytes of ``.grad`` after one backward in which the table is read ``lookups`` times."""
        return sum(self._gradient_of(a, lookups) for a in self.arrays if a.role != "index" and a.trained)

    def _gradient_of(self, array: ArrayStorage, lookups: int) -> int:
        if array.role == "table" and self.update == "fused":
            # Row numbers and sums, each row once.
            touched = min(array.rows, lookups * array.reads) if self.at_step else 0
            return touched * (8 + array.width * array.itemsize)
        if array.role == "table" and self.update == "sparse":
            # Torch keeps one row number and one gradient row per row read, duplicates included.
            return lookups * array.reads * (8 + array.width * array.itemsize)
        return 0 if self.update == "frozen" else array.elements * array.itemsize

    def activations(self, lookups: int, samples: int, *, training: bool) -> int:
        """Bytes of row numbers, rows read and vectors of one batch, and in training of their gradients.

        With a fused update these include the sums and new values of the touched rows, at most one per row read.
        """
        vectors = (0 if self.pools_bags else lookups) + (samples if self.pools_bags or lookups != samples else 0)
        if self.kind == "shared":
            vectors = 0
        values = self.itemsize * (lookups * self.gathered + vectors * self.width)
        total = 8 * lookups * self.row_reads + values
        if training:
            total += values
            if self.update == "fused" and self.fused is not None:
                for a in self.arrays_of("table"):
                    touched = min(a.rows, lookups * a.reads)
                    total += 2 * 4 * touched * a.width + self.fused.state_bytes(touched, a.width)
        return total


def reads_of(program: LookupProgram, table: str) -> int:
    """Rows of ``table`` that one id reads."""
    own = sum(p.num_rows for p in program.row_lookups if p.table == table)
    return own + sum(1 for p in program.row_lookups if p.weight is not None and p.weight.table == table)


def lookup_shape(program: LookupProgram) -> tuple[int, int]:
    """Row numbers computed and floats gathered per id; 0 floats where the gathered rows are the output itself."""
    numbers = sum(p.num_rows + (p.weight is not None) for p in program.row_lookups)
    floats = sum(p.num_rows * program.table(p.table).width + (p.weight is not None) for p in program.row_lookups)
    if program.head is not None:
        made = program.head.made(program.head_shapes)
        numbers, floats = numbers + made[0], floats + made[1]
    side_by_side = (
        len(set(program.spans)) == len(program.row_lookups) and len({p.table for p in program.row_lookups}) == 1
    )
    side_by_side = side_by_side and not program.padding
    changed = any(p.weight is not None or p.sign is not None for p in program.row_lookups)
    return numbers, 0 if side_by_side and not changed and program.head is None else floats


def index_arrays(program: LookupProgram) -> tuple[ArrayStorage, ...]:
    """The index buffers of a program as arrays."""
    return tuple(
        ArrayStorage(f"{index.name}.{a.name}", a.length, 1, a.dtype.itemsize, "index", trained=False)
        for index in program.indexes
        for a in index.arrays
    )
