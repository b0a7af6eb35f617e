"""What is called of FBGEMM: its kernels for sums of rows with fused updates, and its reader of quantised rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from recsys_embed.errors import BackendError, MissingDependencyError
from recsys_embed.kernels.precision import Layout
from recsys_embed.optim import SGD, Adagrad, FusedOptimizer, RowwiseAdagrad
from recsys_embed.utils.optional import require

# FBGEMM's numbers of its types (SparseType), a table on the host (EmbeddingLocation) and no pooling (PoolingMode).
_TYPES = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3}
_HOST, _SUM, _NO_POOLING, _FP32 = 3, 0, 2, 0
LANES = 4
"""Rows of its training kernels are a multiple of so many elements wide."""
RULES = (SGD, Adagrad, RowwiseAdagrad)
# The kernel loads whole vector registers and so reads some bytes past a row; past the last there may be no memory.
_BEYOND = 256


def usable(layout: Layout) -> bool:
    """Whether FBGEMM knows rows of this layout: whole bytes, one table row each."""
    return layout.kind in _TYPES and layout.block == 1 and (layout.kind != "int4" or layout.width % 2 == 0)


def require_fbgemm() -> None:
    """Import FBGEMM, or say why that is impossible.

    Raises:
        MissingDependencyError: not installed, of a version that does not go with torch's, or broken.
    """
    require("fbgemm_gpu", extra="torchrec", purpose="reading tables with backend 'fbgemm'")


def _check(rows: Tensor, size: int) -> None:
    if rows.numel():
        low, high = (int(x) for x in rows.aminmax())
        if low < 0 or high >= size:
            raise IndexError(f"rows must be in [0, {size}); got values from {low} to {high}")


@cache
def why_not() -> str | None:
    """In words why FBGEMM cannot be used here; None where it can."""
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
            IndexError: a row is outside the table; the kernel itself would read foreign memory.
        """
        _check(rows, data.shape[0])
        return self._whole(data, rows)

    def remapped(self, data: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """As a call, of rows that stand at ``places`` in ``data``: int32 ``[rows]``, -1 for rows of zeros."""
        _check(rows, len(places))
        ends = torch.tensor([0, len(rows)]), torch.tensor([0, len(places)])
        return self._whole(data, torch.ops.fbgemm.pruned_array_lookup(rows, ends[0], places, ends[1]))

    def _whole(self, data: Tensor, rows: Tensor) -> Tensor:
        """Of stored rows; -1 gives zeros."""
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
            1,  # rows follow each other without gaps
        )
        return out


def reader(layout: Layout, backend: Literal["auto", "torch", "fbgemm"]) -> RowReader | None:
    """A :class:`RowReader` where the backend asks for one and the layout allows it, else None."""
    # Floats need no decoding: for them it is worth the import where it is asked for only.
    if backend == "torch" or not usable(layout) or (backend == "auto" and layout.bits is None):
        return None
    try:
        return RowReader(layout)
    except MissingDependencyError:
        if backend == "fbgemm":
            raise
        return None


class TableBatch:
    """Tables of one width, side by side in one tensor, as FBGEMM's training kernels have them.

    Rows are checked by who calls: the repair of rows out of range that FBGEMM's modules do is no part of this.

    Args:
        width: a multiple of ``LANES``.
        first: per feature, the first row of its table in the tensor.
        rows: per feature, the rows of its table; features of one table are neighbours.
    """

    def __init__(self, width: int, first: Sequence[int], rows: Sequence[int]) -> None:
        self.width, self.features = width, len(first)
        starts: list[int] = []
        total = 0
        for i, (at, size) in enumerate(zip(first, rows, strict=True)):
            if i and at == first[i - 1]:
                starts.append(starts[-1])
                continue
            starts.append(total)
            total += size
        cpu: dict[str, Any] = {"device": "cpu"}
        self.first = torch.tensor(first, dtype=torch.int64, **cpu)
        self._elements = self.first * width
        self._columns = torch.arange(0, (self.features + 1) * width, width, dtype=torch.int32, **cpu)
        self._tables = (torch.tensor([*starts, total], dtype=torch.int64, **cpu), total.bit_length())
        self._where = torch.full((self.features,), _HOST, dtype=torch.int32, **cpu)

    def forward(self, weight: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
        """Sums of rows: float32 ``[bags, features * width]``.

        Args:
            weight: float32 ``[rows, width]``, contiguous.
            rows: int64 ``[n]``, counted within the tables; those of all bags of a feature, then the next feature's.
            offsets: int64 ``[features * bags + 1]``.
            factors: float32 ``[n]``.
        """
        columns = self.features * self.width
        if offsets.numel() == 1:
            return weight.new_empty(0, columns)
        read = (self._tables[0], rows, offsets, _SUM, factors, _FP32)
        out: Tensor = torch.ops.fbgemm.split_embedding_codegen_forward_cpu(
            weight.detach().view(-1), self._elements, self._columns, columns, *read
        )
        return out

    def update(
        self,
        optimizer: FusedOptimizer,
        lr: float,
        grad: Tensor,
        weight: Tensor,
        state: Mapping[str, Tensor],
        rows: Tensor,
        offsets: Tensor,
        factors: Tensor | None,
    ) -> None:
        """One exact step of the optimizer on the rows read, in place; arguments as :meth:`forward` has them.

        Args:
            grad: of the sums.
            state: of the optimizer, by name; contiguous.
        """
        if rows.numel() == 0:
            return
        ops, rate = torch.ops.fbgemm, torch.tensor(lr, dtype=torch.float32)
        flat = weight.detach().view(-1)
        read = (self.width, *self._tables, rows, offsets, _SUM, factors, False)
        given = (grad.contiguous(), flat, self._where, self._elements, self._columns, *read)
        if isinstance(optimizer, SGD):
            ops.split_embedding_backward_codegen_sgd_cpu(*given, rate)
        elif isinstance(optimizer, RowwiseAdagrad):
            sums = (state["sum"].view(-1), self._where, self.first)
            ops.split_embedding_backward_codegen_rowwise_adagrad_cpu(*given, *sums, rate, optimizer.eps)
        elif isinstance(optimizer, Adagrad):
            sums = (state["sum"].view(-1), self._where, self._elements)
            ops.split_embedding_backward_codegen_adagrad_cpu(*given, *sums, rate, optimizer.eps)
        else:
            raise BackendError(f"backend 'fbgemm' has no rule for {optimizer!r}")

    def gradient(self, grad: Tensor, weight: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
        """Dense gradient ``[rows, width]`` of ``weight``; arguments as :meth:`update` has them."""
        if rows.numel() == 0:
            return torch.zeros_like(weight)
        read = (self.width, *self._tables, rows, offsets, _SUM, factors)
        out: Tensor = torch.ops.fbgemm.split_embedding_backward_codegen_dense_cpu(
            grad.contiguous(), weight.detach().view(-1), self._elements, self._columns, *read
        )
        return out.view_as(weight)
