"""Rows of integer tables read by FBGEMM: the very numbers of :mod:`recsys_embed.kernels.precision`, and faster."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from recsys_embed._optional import require
from recsys_embed.errors import MissingDependencyError
from recsys_embed.kernels.precision import Layout

# FBGEMM's numbers of its types (SparseType), a table on the host (EmbeddingLocation) and no pooling (PoolingMode).
_TYPES = {"int8": 2, "int4": 3}
_HOST, _NO_POOLING, _FP32 = 3, 2, 0
# The kernel loads whole vector registers and so reads some bytes past a row; past the last there may be no memory.
_BEYOND = 256


def usable(layout: Layout) -> bool:
    """Whether FBGEMM knows rows of this layout: whole bytes, one table row each."""
    return layout.kind in _TYPES and layout.block == 1 and (layout.kind == "int8" or layout.width % 2 == 0)


def require_fbgemm() -> None:
    """Import FBGEMM, or say why that is impossible.

    Raises:
        MissingDependencyError: not installed, of a version that does not go with torch's, or broken.
    """
    try:
        require("fbgemm_gpu", extra="torchrec", purpose="reading tables with backend 'fbgemm'")
    except (OSError, ImportError) as e:
        if isinstance(e, MissingDependencyError):
            raise
        raise MissingDependencyError(f"fbgemm_gpu is installed but cannot be imported: {e}") from e


class RowReader:
    """Decodes rows of one layout with FBGEMM's inference kernel, on the CPU.

    Raises:
        MissingDependencyError: FBGEMM cannot be imported.

    Attributes:
        layout: of the rows.
    """

    def __init__(self, layout: Layout) -> None:
        require_fbgemm()
        self.layout = layout
        width = layout.width
        largest = {kind: width if kind == layout.kind else 0 for kind in ("int2", "int4", "int8")}
        self._head = (
            torch.zeros(0, dtype=torch.uint8),
            torch.tensor([_HOST], dtype=torch.int32),
            torch.tensor([0]),
            torch.tensor([_TYPES[layout.kind]], dtype=torch.uint8),
            torch.tensor([0, width], dtype=torch.int32),
            width,
            *largest.values(),
            0,
            0,
        )
        self._none = torch.zeros(0, 0, dtype=torch.uint8)

    def __call__(self, data: Tensor, rows: Tensor) -> Tensor:
        """Rows of uint8 ``data [stored rows, items]``: float32 ``[n, width]`` of int64 ``rows [n]``.

        Raises:
            IndexError: a row is outside the table; the kernel itself would read foreign memory.
        """
        if rows.numel() == 0:
            return torch.empty(0, self.layout.width)
        low, high = (int(x) for x in rows.aminmax())
        if low < 0 or high >= data.shape[0]:
            raise IndexError(f"rows must be in [0, {data.shape[0]}); got values from {low} to {high}")
        safe = data.shape[0] - -(-_BEYOND // self.layout.row_bytes)
        if safe <= 0:
            return self.layout.decode(data.index_select(0, rows))
        if high < safe:
            return self._read(data, rows)
        out = self._read(data, rows.clamp_max(safe - 1))
        last = (rows >= safe).nonzero().squeeze(1)
        return out.index_copy_(0, last, self.layout.decode(data.index_select(0, rows[last])))

    def _read(self, data: Tensor, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            data.view(-1),
            *self._head,
            rows,
            torch.tensor([0, len(rows)]),
            _NO_POOLING,
            None,
            _FP32,
            self._none,
            None,
            1,  # rows follow each other without gaps
        )
        return out


def reader(layout: Layout, backend: Literal["auto", "torch", "fbgemm"]) -> Any:
    """A :class:`RowReader` where the backend asks for one and the layout allows it, else None."""
    if backend == "torch" or not usable(layout):
        return None
    try:
        return RowReader(layout)
    except MissingDependencyError:
        if backend == "fbgemm":
            raise
        return None
