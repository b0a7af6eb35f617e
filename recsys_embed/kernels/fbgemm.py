"""FBGEMM's reader of quantised rows, for serving exports."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from recsys_embed.core.precision import Layout
from recsys_embed.errors import MissingDependencyError
from recsys_embed.utils.optional import require

# FBGEMM's numbers of its types (SparseType), a table on the host (EmbeddingLocation) and no pooling (PoolingMode).
_TYPES = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3, "int2": 4}
_HOST, _NO_POOLING, _FP32 = 3, 2, 0
# The kernel loads whole vector registers, so it reads a few bytes past a row: the last row needs padding.
_BEYOND = 256


def usable(layout: Layout) -> bool:
    """Whether FBGEMM reads this layout: one table row per stored row, of whole bytes."""
    return layout.kind in _TYPES and layout.block == 1 and layout.width * (layout.bits or 8) % 8 == 0


def require_fbgemm() -> None:
    """Import FBGEMM, or raise with the reason.

    Raises:
        MissingDependencyError: not installed, of a version that does not match torch's, or broken.
    """
    require("fbgemm_gpu", extra="torchrec", purpose="reading tables with backend 'fbgemm'")


def _check(rows: Tensor, size: int) -> None:
    if rows.numel():
        low, high = (int(x) for x in rows.aminmax())
        if low < 0 or high >= size:
            raise IndexError(f"rows must be in [0, {size}); got values from {low} to {high}")


@cache
def why_not() -> str | None:
    """The reason why FBGEMM cannot be used here; None if it can."""
    try:
        require_fbgemm()
    except MissingDependencyError as e:
        return str(e)
    return None


class RowReader:
    """Decodes rows of one layout with FBGEMM's inference kernel (``IntNBit...``), on the CPU.

    Raises:
        MissingDependencyError: FBGEMM cannot be imported.

    Attributes:
        layout: of the rows.
    """

    def __init__(self, layout: Layout) -> None:
        require_fbgemm()
        self.layout = layout
        width = layout.width
        largest = {kind: width if kind == layout.kind else 0 for kind in ("int2", "int4", "int8", "fp16", "fp32")}
        self._head = (
            torch.zeros(0, dtype=torch.uint8),
            torch.tensor([_HOST], dtype=torch.int32),
            torch.tensor([0]),
            torch.tensor([_TYPES[layout.kind]], dtype=torch.uint8),
            torch.tensor([0, width], dtype=torch.int32),
            width,
            *largest.values(),
        )
        self._none = torch.zeros(0, 0, dtype=torch.uint8)

    def __call__(self, data: Tensor, rows: Tensor) -> Tensor:
        """Rows of ``data [stored rows, items]``: float32 ``[n, width]`` of int64 ``rows [n]``.

        Raises:
            IndexError: a row is outside the table; the kernel does not check this itself.
        """
        _check(rows, data.shape[0])
        return self._whole(data, rows)

    def remapped(self, data: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """As a call, with row r of the table at ``places[r]`` of ``data``: int32 ``[rows]``, -1 for rows of zeros."""
        _check(rows, len(places))
        ends = torch.tensor([0, len(rows)]), torch.tensor([0, len(places)])
        return self._whole(data, torch.ops.fbgemm.pruned_array_lookup(rows, ends[0], places, ends[1]))

    def _whole(self, data: Tensor, rows: Tensor) -> Tensor:
        """Vectors of stored rows; -1 gives zeros."""
        if rows.numel() == 0:
            return torch.empty(0, self.layout.width)
        high = int(rows.max())
        safe = data.shape[0] - -(-_BEYOND // self.layout.row_bytes)
        if safe <= 0:
            read = self.layout.decode(data.index_select(0, rows.clamp_min(0))).float()
            return read.masked_fill_((rows < 0).unsqueeze(1), 0.0)
        if high < safe:
            return self._read(data, rows)
        out = self._read(data, rows.clamp_max(safe - 1))
        last = (rows >= safe).nonzero().squeeze(1)
        return out.index_copy_(0, last, self.layout.decode(data.index_select(0, rows[last])).float())

    def _read(self, data: Tensor, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            data.view(-1).view(torch.uint8),
            *self._head,
            rows,
            torch.tensor([0, len(rows)]),
            _NO_POOLING,
            None,
            _FP32,
            self._none,
            None,
            1,  # rows are contiguous
        )
        return out


def reader(layout: Layout, backend: Literal["auto", "torch", "fbgemm"]) -> RowReader | None:
    """A :class:`RowReader` if the backend asks for one and the layout allows it, else None."""
    # Floats need no decoding, so FBGEMM is imported for them only on request.
    if backend == "torch" or not usable(layout) or (backend == "auto" and layout.bits is None):
        return None
    try:
        return RowReader(layout)
    except MissingDependencyError:
        if backend == "fbgemm":
            raise
        return None
