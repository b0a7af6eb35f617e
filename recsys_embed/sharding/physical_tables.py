"""Tables as TorchRec stores them: names that it accepts and row widths that fbgemm's kernels support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from recsys_embed.core.program import Table
from recsys_embed.errors import raise_faults
from recsys_embed.optim import SGD, Adagrad, FusedOptimizer, RowwiseAdagrad

ROW_ALIGNMENT = 4
"""fbgemm's kernels need a row width that is a multiple of this many numbers."""


def torchrec_name(key: str) -> str:
    """A table's name in TorchRec. It becomes an attribute of a module, so it must not contain a dot.

    >>> torchrec_name("C1.weight"), torchrec_name("50%.x")
    ('C1%2Eweight', '50%25%2Ex')
    """
    return key.replace("%", "%25").replace(".", "%2E")


def table_of(name: str) -> str:
    """Inverse of :func:`torchrec_name`."""
    return name.replace("%2E", ".").replace("%25", "%")


@dataclass(frozen=True)
class PhysicalTable:
    """How TorchRec stores a table ``[rows, width]``.

    Rows whose width is not a multiple of four are padded with zeros. Nothing reads the padding, so its gradients and
    optimizer state stay zero. Where the optimizer is elementwise, ``per_row`` narrow rows are packed into one instead.

    >>> PhysicalTable("C1.scale", rows=10, width=1, per_row=4).shape
    (3, 4)
    >>> PhysicalTable("C1.weight", rows=10, width=6, per_row=1).shape
    (10, 8)
    """

    key: str
    rows: int
    width: int
    per_row: int = 1

    @property
    def name(self) -> str:
        return torchrec_name(self.key)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width in TorchRec."""
        return -(-self.rows // self.per_row), -(-self.width * self.per_row // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def pack(self, weight: Tensor) -> Tensor:
        """Rows ``[n, width]`` that begin with a whole stored row, as stored: ``[ceil(n / per_row), stored width]``."""
        rows, stored = -(-len(weight) // self.per_row), self.shape[1]
        if self.per_row == 1 and stored == self.width:
            return weight
        out = weight.new_zeros(rows * self.per_row, stored // self.per_row)
        out[: len(weight), : self.width] = weight
        return out.view(rows, stored)

    def unpack(self, stored: Tensor) -> Tensor:
        """Inverse of :meth:`pack` for all rows: ``[rows, width]``."""
        return stored.reshape(-1, self.shape[1] // self.per_row)[: self.rows, : self.width]


def physical_tables_for(tables: Mapping[str, Table], optimizer: FusedOptimizer | None) -> dict[str, PhysicalTable]:
    """The physical table of every table that is read by row; packing never changes what ``optimizer`` computes."""
    few = [key for key, table in tables.items() if table.training is not None]
    raise_faults(
        [
            f"table {k!r} has low-precision rows, which TorchRec cannot train; set `quantization='ptq'`, or "
            "replicate the collection: DistributedDataParallel with recsys_embed.optim.fused_optimizer"
            for k in few
        ],
        "shard",
    )
    alone = optimizer is None or type(optimizer) in (SGD, Adagrad)
    physical_tables = {}
    for key, table in tables.items():
        if table.dense:
            continue
        # For rows of one number, row-wise Adagrad is elementwise Adagrad, so packing is exact.
        apart = alone or (type(optimizer) is RowwiseAdagrad and table.width == 1)
        fits = ROW_ALIGNMENT % table.width == 0 and apart
        physical_tables[key] = PhysicalTable(key, table.rows, table.width, ROW_ALIGNMENT // table.width if fits else 1)
    return physical_tables


def select_rows(values: Tensor, slots: Tensor, per_row: int, width: int) -> Tensor:
    """Unpack one row each: of ``values [n, stored width]``, each ``per_row`` packed rows, the one at ``slots [n]``."""
    if per_row == 1:
        return values[:, :width]
    parts = values.view(len(values), per_row, values.shape[1] // per_row)
    index = slots.view(-1, 1, 1).expand(-1, 1, parts.shape[2])
    return parts.gather(1, index).squeeze(1)[:, :width]
