"""Tables for serving: quantised, without pruned rows and columns, and read in place from a memory-mapped file.

A lookup only needs float vectors of rows, so rows are decoded when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from recsys_embed.core.footprint import Footprint
from recsys_embed.core.id_sets import positions, words_of
from recsys_embed.core.index import IndexArrays
from recsys_embed.core.precision import HEAD, NARROW, Layout, fp8_values
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.constants import Constants

RowForm = Literal["all", "range", "bitmap", "sorted"]
_FORMS: tuple[RowForm, ...] = get_args(RowForm)
_CHUNK = 1 << 16
_COLUMNS = 1 << 20


@dataclass(frozen=True)
class Part:
    """One table of a storage, and which of its rows and columns are stored.

    Args:
        rows: rows of the table; those that are not stored are zero.
        layout: of the stored columns.
        form: which rows are stored: all; a range from ``start`` on; those in a bitmap; those in a sorted list.
        start: first stored row of form ``"range"``; 0 otherwise.
        count: number of stored rows.
        columns: stored columns, ascending; None for all.
    """

    rows: int
    layout: Layout
    form: RowForm
    start: int
    count: int
    columns: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored elements."""
        return self.layout.nbytes(self.count)

    @property
    def index_bytes(self) -> int:
        """Bytes of the arrays that say which rows are stored."""
        return {"all": 0, "range": 0, "bitmap": 12 * words_of(self.rows), "sorted": 4 * self.count}[self.form]


def too_many_columns(parts: Sequence[Part]) -> bool:
    """Whether lists of kept columns, as long as the longest for every part, outweigh the rows that are stored."""
    if all(p.columns is None for p in parts):
        return False
    return len(parts) * max(p.layout.width for p in parts) > _COLUMNS + 8 * sum(p.nbytes for p in parts)


N = TypeVar("N", int, Tensor)
_STORED = 7
"""Place of :attr:`_Integers.stored`."""


class _Integers(NamedTuple, Generic[N]):
    """Integers by which a lookup finds a row in its part."""

    start: N
    count: N  # type: ignore[assignment]
    size: N  # rows of the table if it has a bitmap, else 0
    word: N  # offset of its bitmap
    value: N  # offset of its sorted rows
    form: N
    base: N  # first element
    stored: N  # first stored row
    width: N
    block: N
    items: N
    number: N


def _integers(parts: Sequence[Part]) -> Iterator[_Integers[int]]:
    base = stored = word = value = 0
    for i, p in enumerate(parts):
        size = p.rows if p.form == "bitmap" else 0
        rest = (p.layout.width, p.layout.block, p.layout.items, i)
        # A part without such an array must still have an offset within it.
        at = (word if p.form == "bitmap" else 0, value if p.form == "sorted" else 0)
        yield _Integers(p.start, p.count, size, *at, _FORMS.index(p.form), base, stored, *rest)
        stored += p.layout.stored_rows(p.count)
        base += p.layout.stored_rows(p.count) * p.layout.items
        word += words_of(size)
        value += p.count if p.form == "sorted" else 0


class Stored(Constants):
    """Tables of one width that a lookup reads as one storage: ``rows`` int64 ``[n]`` to vectors ``[n, width]``.

    Args:
        parts: the tables, in the order of their rows.
        width: of the vectors; columns that are not stored are zero.
        data: stored rows of all parts, concatenated; flat, of the layouts' dtype.
        arrays: words, ranks and values of all row sets, each concatenated in the order of the parts.
        dtype: of the vectors.
        backend: what decodes rows on the CPU: ``"fbgemm"`` (tables with pruned rows then take 4 bytes more per row, for
            its remapping), ``"torch"``, or ``"auto"``: the native kernels if all rows are stored, else FBGEMM for
            quantised rows if it can be imported.

    >>> table = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    >>> part = Part(3, Layout("fp16", 2), "sorted", 0, 2)
    >>> none = torch.zeros(0, dtype=torch.int32)
    >>> kept = IndexArrays({"words": none.long(), "ranks": none, "values": torch.tensor([0, 2]).int()}, 2)
    >>> stored = Stored([part], 2, table[[0, 2]].half().flatten(), kept)
    >>> stored(torch.tensor([2, 1, -1]), partial=True).tolist()[:2], stored.nbytes
    ([[3.0, 4.0], [0.0, 0.0]], 16)
    """

    data: Tensor
    words: Tensor
    ranks: Tensor
    values: Tensor
    like: Tensor
    places: Tensor | None

    def __init__(
        self,
        parts: Sequence[Part],
        width: int,
        data: Tensor,
        arrays: IndexArrays | None = None,
        dtype: torch.dtype = torch.float32,
        backend: Literal["auto", "torch", "fbgemm"] = "torch",
    ) -> None:
        super().__init__()
        self.parts, self.width = tuple(parts), width
        self.rows = sum(p.rows for p in self.parts)
        layouts = {p.layout for p in self.parts}
        self._kind = self.parts[0].layout
        self._whole = all(p.columns is None for p in self.parts)
        # Stored rows of one size that hold one table row each are read whole, others element by element.
        self._uniform = self._kind if self._whole and len(layouts) == 1 and self._kind.block == 1 else None
        # Rows that share a scale, of whole bytes or of one number.
        grouped = self._whole and len(layouts) == 1 and self._kind.block > 1
        simple = self._kind.width == 1 or self._kind.width * (self._kind.bits or 8) % 8 == 0
        self._grouped = self._kind if grouped and simple else None
        # Where tables end with full groups, rows of all are grouped as those of one.
        self._aligned = all(p.rows % self._kind.block == 0 for p in self.parts[:-1])
        self._reader = None if self._uniform is None else fbgemm.reader(self._uniform, backend)
        self._pruned = any(p.form != "all" for p in self.parts)
        # The native kernels tell kinds by the bytes of a row, which several kinds of narrow rows with scales share.
        told = self._kind.width >= NARROW or not self._kind.scaled
        whole = self._uniform is not None and not self._pruned
        self._direct = backend == "auto" and whole and told and self._kind.kind != "fp64"
        device = data.device
        if arrays is None:
            none = torch.zeros(0, dtype=torch.int32, device=device)
            arrays = IndexArrays({"words": none.long(), "ranks": none, "values": none})
        self._longest = arrays.longest
        self.register_buffer("data", data if self._uniform is None else data.view(-1, self._kind.items))
        for name in ("words", "ranks", "values"):
            self.register_buffer(name, arrays.held[name])
        # Follows .to(dtype) and .to(device), so that vectors have the dtype and device of the model.
        self.register_buffer("like", torch.zeros(0, dtype=dtype, device=device), persistent=False)
        self._widest = max(p.layout.width for p in self.parts)
        self.add_constant("starts", [0, *accumulate(p.rows for p in self.parts)], device)
        self.add_constant("integers", list(map(list, _integers(self.parts))), device)
        self.add_constant("lane", list(range(max(self._widest, HEAD))), device)
        if not self._whole:
            # An extra last column takes the elements that a narrower part does not have.
            columns = [p.columns if p.columns is not None else tuple(range(width)) for p in self.parts]
            self.add_constant("columns", [[*c, *[width] * (self._widest - len(c))] for c in columns], device)
        places = self._all_places() if backend == "fbgemm" and self._reader is not None and self._pruned else None
        self.register_buffer("places", places, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def read_by_fbgemm(self) -> bool:
        """Whether FBGEMM decodes rows on the CPU."""
        return self._reader is not None

    @property
    def direct(self) -> Tensor | None:
        """Stored rows ``[rows, items]`` if the native kernels can read them, else None."""
        if not self._direct:
            return None
        # Attribute access to buffers is ten times slower.
        buffers: dict[str, Tensor] = self._buffers  # type: ignore[assignment]
        return buffers["data"] if buffers["like"].dtype is torch.float32 else None

    @property
    def nbytes(self) -> int:
        """Bytes of stored rows and of the arrays that say which rows are stored."""
        held = (self.data, self.words, self.ranks, self.values, self.places)
        return sum(b.nbytes for b in held if b is not None)

    def forward(self, rows: Tensor, partial: bool = False) -> Tensor:
        """Vectors of int64 ``rows [n]``: ``[n, width]``; with ``partial``, rows may be -1."""
        if partial:
            rows = rows.clamp_min(0)
        if self._uniform is not None and not self._pruned:
            return self._whole_rows(rows).to(self.dtype)
        if self._grouped is not None and not self._pruned:
            return self._grouped_rows(self._grouped, *self._groups(self._grouped.block, rows)).to(self.dtype)
        reader = self._reader_of(rows)
        if self.places is not None and reader is not None:
            return reader.remapped(self.data, rows, self.places).to(self.dtype)
        place, n = self._place(rows)
        pos = place.clamp_min(0)
        if self._uniform is not None:
            out = self._whole_rows(pos + n.stored)
        else:
            out = self._scattered(pos, n)
        if self._pruned:
            out = out.masked_fill((place < 0).unsqueeze(1), 0.0)
        return out.to(self.dtype)

    def _reader_of(self, rows: Tensor) -> fbgemm.RowReader | None:
        """FBGEMM's reader for these rows; None if it is not used."""
        return self._reader if rows.device.type == "cpu" and not torch.compiler.is_compiling() else None

    def _all_places(self) -> Tensor:
        """Stored row of every row, -1 if it is not stored: int32 ``[rows]``."""
        out = torch.empty(self.rows, dtype=torch.int32)
        for first in range(0, self.rows, _CHUNK):
            rows = torch.arange(first, min(first + _CHUNK, self.rows))
            place, n = self._place(rows)
            out[first : first + len(rows)] = torch.where(place < 0, -1, place + n.stored)
        return out

    def _whole_rows(self, rows: Tensor) -> Tensor:
        """Vectors of rows whose parts have one layout."""
        layout = cast("Layout", self._uniform)
        reader = self._reader_of(rows)
        if reader is not None:
            return reader(self.data, rows)
        return layout.decode(self.data.index_select(0, rows))

    def _place(self, rows: Tensor) -> tuple[Tensor, _Integers[Tensor]]:
        """Place of each row among the stored rows of its part, -1 if it is not stored; and the part's integers."""
        integers, local = self.constant("integers", rows), rows
        if len(self.parts) == 1:
            n = _Integers(*integers[0].unbind(-1))
        else:
            starts = self.constant("starts", rows)
            part = torch.bucketize(rows, starts[1:-1], right=True)
            n, local = _Integers(*integers[part].unbind(-1)), rows - starts[part]
        if not self._pruned:
            return local, n
        place = positions("range", local, (n.start, n.count, n.size), 0, None)
        arrays = IndexArrays({"words": self.words, "ranks": self.ranks, "values": self.values}, self._longest)
        for form, at in (("bitmap", n.word), ("sorted", n.value)):
            code = _FORMS.index(form)
            if any(p.form == form for p in self.parts):
                count = n.count * (n.form == code)
                found = positions(form, local, (n.start, count, n.size), at, arrays)  # type: ignore[arg-type]
                place = torch.where(n.form == code, found, place)
        return place, n

    def _groups(self, block: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The stored row of each row, and its number among those that share it."""
        local, first = rows, None
        if not self._aligned:
            starts = self.constant("starts", rows)
            part = torch.bucketize(rows, starts[1:-1], right=True)
            local, first = rows - starts[part], self.constant("integers", rows)[:, _STORED][part]
        if block & (block - 1):
            group = torch.div(local, block, rounding_mode="floor")
            number = local - group * block
        else:
            group, number = local >> (block.bit_length() - 1), local & (block - 1)
        return group if first is None else group + first, number

    def _grouped_rows(self, layout: Layout, group: Tensor, number: Tensor) -> Tensor:
        """Vectors of rows that share a scale, by their stored row and their number in it."""
        stored, bits, flat = self.data.view(-1, layout.items), layout.bits or 8, self.data.view(-1)
        whole = layout.head == HEAD and layout.items % HEAD == 0
        wide = whole and not torch.compiler.is_compiling() and self.data.storage_offset() % HEAD == 0
        # Fewer elements are copied in less time.
        parts, size = (stored.view(torch.int32), HEAD) if wide else (stored, 1)
        if wide:
            head = parts[:, 0].contiguous().index_select(0, group).unsqueeze(1)
        else:
            head = stored[:, : layout.head].contiguous().index_select(0, group)
        if layout.width == 1:
            per = 8 // bits
            at = group * layout.items + layout.head
            if per == 1:
                code = flat.index_select(0, at + number)
            else:
                code = flat.index_select(0, at + (number >> (per.bit_length() - 1)))
                code = (code >> ((number & (per - 1)) * bits).to(torch.uint8)) & ((1 << bits) - 1)
            if wide:
                line = head.view(torch.float16).float()
                return torch.addcmul(line[:, 1], code.float(), line[:, 0]).unsqueeze(1)
            kind = layout.kind if layout.bits is None else "int8"  # one code to a byte now
            return Layout(kind, 1).decode(torch.cat([head, code.unsqueeze(1)], 1))
        if wide and layout.width * bits // 8 % HEAD:
            parts, size, head = stored, 1, head.view(torch.uint8)
        codes = parts[:, layout.head // size :].unflatten(1, (layout.block, -1))
        found = torch.cat([head, codes[group, number]], 1)
        return Layout(layout.kind, layout.width).decode(found.view(torch.uint8))

    def _scattered(self, pos: Tensor, n: _Integers[Tensor]) -> Tensor:
        """Vectors of stored rows ``pos [n]`` if parts differ in width or several table rows share a stored row."""
        lane = self.constant("lane", pos)
        last = len(self.data) - 1  # columns of a narrower part may point beyond its row; their values are dropped
        row = (n.base + torch.div(pos, n.block, rounding_mode="floor") * n.items).unsqueeze(1)
        element = ((pos % n.block) * n.width).unsqueeze(1) + lane[: self._widest]
        kind = self._kind
        per = 8 // (kind.bits or 8)
        read = self.data[(row + kind.head + element // per).clamp_max(last)]
        if not kind.scaled:
            values = read.to(torch.promote_types(read.dtype, torch.float32))
        else:
            head = self.data[row + lane[: kind.head]].view(torch.float16).float()
            if kind.bits is None:
                values = fp8_values(read) * head
            else:
                if per > 1:
                    read = (read >> ((element % per) * kind.bits).to(torch.uint8)) & ((1 << kind.bits) - 1)
                values = read.float() * head[:, :1] + head[:, 1:]
        if self._whole:
            return values
        where = self.constant("columns", pos)[n.number].expand(pos.shape[0], -1)
        return values.new_zeros(pos.shape[0], self.width + 1).scatter(1, where, values)[:, : self.width]

    def dense(self, start: int = 0, count: int | None = None) -> Tensor:
        """Decoded rows ``[start, start + count)``, all by default: ``[count, width]``, a copy."""
        stop = self.rows if count is None else start + count
        out = torch.empty(stop - start, self.width, dtype=self.dtype, device=self.device)
        for first in range(start, stop, _CHUNK):
            rows = torch.arange(first, min(first + _CHUNK, stop), device=self.device)
            out[first - start : first - start + len(rows)] = self(rows)
        return out

    def extra_repr(self) -> str:
        kinds = sorted({p.layout.kind for p in self.parts})
        return f"{self.rows} x {self.width}, {', '.join(kinds)}, {self.nbytes} bytes"


class StoredTables(nn.Module):
    """The storages of a serving module, by the name under which lookups read them."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        super().__init__()
        for name, table in stored.items():
            self.add_module(f"table_{name}", table)

    def __contains__(self, name: str) -> bool:
        return f"table_{name}" in self._modules

    def __getitem__(self, name: str) -> Stored:
        return cast("Stored", self._modules[f"table_{name}"])

    def direct(self, names: Sequence[str]) -> list[Tensor] | None:
        """Stored rows of the named storages if the native kernels can read all of them, else None."""
        found = [self[name].direct if name in self else None for name in names]
        return None if any(f is None for f in found) else cast("list[Tensor]", found)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the type and on the device of the vectors."""
        return cast("Stored", next(iter(self._modules.values()))).like

    def footprint(self) -> Footprint:
        """Bytes of stored rows, and of the arrays that say which rows are stored."""
        stored = [cast("Stored", m) for m in self._modules.values()]
        weights = sum(s.data.nbytes for s in stored)
        return Footprint(weights=weights, index=sum(s.nbytes for s in stored) - weights)
