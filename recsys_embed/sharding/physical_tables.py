"""Physical tables as TorchRec stores them: names it accepts, and widths its kernels can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from recsys_embed.core.program import Table
from recsys_embed.optim import SGD, Adagrad, FusedOptimizer, RowwiseAdagrad

LANES = 4
"""fbgemm's kernels read rows of a multiple of so many numbers."""


def torchrec_name(key: str) -> str:
    """A table's name in TorchRec, where names become attributes of modules and so hold no dot.

    >>> torchrec_name("C1.weight"), torchrec_name("50%.x")
    ('C1%2Eweight', '50%25%2Ex')
    """
    return key.replace("%", "%25").replace(".", "%2E")


def table_of(name: str) -> str:
    """Inverse of :func:`torchrec_name`."""
    return name.replace("%2E", ".").replace("%25", "%")


@dataclass(frozen=True)
class Slab:
    """How a table ``[rows, width]`` lies in one of TorchRec's.

    Rows whose width is no multiple of four are padded with zeros that nothing reads, so that their gradients and
    state stay zero; or ``per_row`` of them share a row, where the optimizer treats every number by itself.

    >>> Slab("C1.scale", rows=10, width=1, per_row=4).shape, Slab("C1.weight", rows=10, width=6, per_row=1).shape
    ((3, 4), (10, 8))
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
        return -(-self.rows // self.per_row), -(-self.width * self.per_row // LANES) * LANES

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


def slabs_for(tables: Mapping[str, Table], optimizer: FusedOptimizer | None) -> dict[str, Slab]:
    """A layout per table that is read by row, in which training by ``optimizer`` does what it does unpacked."""
    alone = optimizer is None or type(optimizer) in (SGD, Adagrad)
    slabs = {}
    for key, table in tables.items():
        if table.dense:
            continue
        # A row of one number has the row-wise rule's state to itself, which then is that of Adagrad.
        apart = alone or (type(optimizer) is RowwiseAdagrad and table.width == 1)
        fits = LANES % table.width == 0 and apart
        slabs[key] = Slab(key, table.rows, table.width, LANES // table.width if fits else 1)
    return slabs


def pick(values: Tensor, slots: Tensor, per_row: int, width: int) -> Tensor:
    """Of stored rows ``values [n, stored width]`` the one of ``per_row`` tables' rows that ``slots [n]`` names."""
    if per_row == 1:
        return values[:, :width]
    parts = values.view(len(values), per_row, values.shape[1] // per_row)
    index = slots.view(-1, 1, 1).expand(-1, 1, parts.shape[2])
    return parts.gather(1, index).squeeze(1)[:, :width]
