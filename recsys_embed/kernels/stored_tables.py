"""Tables as they are served: rows at a precision, without pruned rows and columns, read where they lie in a file.

A lookup needs rows as float vectors and nothing else, so the tables it gathers from may be quantised, memory-mapped
or full of gaps; only the rows that are read are ever decoded.
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
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.precision import HEAD, Layout

RowForm = Literal["all", "range", "bitmap", "sorted"]
_FORMS: tuple[RowForm, ...] = get_args(RowForm)
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Part:
    """One table of a storage, and what of it is kept.

    Args:
        rows: rows of the table; those that are not kept are zero.
        layout: of the kept columns.
        form: how the kept rows are known: all; those from ``start`` on; a bitmap with running counts; their numbers.
        start: first kept row of form ``"range"``; 0 otherwise.
        count: kept rows.
        columns: kept columns, rising; None for all.
    """

    rows: int
    layout: Layout
    form: RowForm
    start: int
    count: int
    columns: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the kept elements."""
        return self.layout.nbytes(self.count)

    @property
    def index_bytes(self) -> int:
        """Bytes of the arrays that know which rows are kept."""
        return {"all": 0, "range": 0, "bitmap": 12 * words_of(self.rows), "sorted": 4 * self.count}[self.form]


N = TypeVar("N", int, Tensor)


class _Integers(NamedTuple, Generic[N]):
    """What a lookup needs to know of each row's part."""

    start: N
    count: N  # type: ignore[assignment]
    size: N  # rows of the table where they have a bitmap, else 0
    word: N  # where its bitmap begins
    value: N  # where its sorted rows begin
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
        # A part without such an array must not point past the last one.
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
        width: of the vectors; columns that are not kept are zero.
        data: stored rows of all parts, end to end; flat, of the layouts' dtype.
        arrays: words, ranks and values of all row sets, end to end, each in the order of the parts.
        dtype: of the vectors.
        backend: what decodes whole rows on the CPU: FBGEMM (for tables with rows that are not kept it takes 4 bytes
            more per row, that say where each is); torch; or by itself the native kernels where all rows are kept, else
            FBGEMM for integers where it can be imported.

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
        # Rows of one size, each of one table row, are read whole; others element by element.
        self._uniform = self._kind if self._whole and len(layouts) == 1 and self._kind.block == 1 else None
        self._reader = None if self._uniform is None else fbgemm.reader(self._uniform, backend)
        self._pruned = any(p.form != "all" for p in self.parts)
        self._auto = backend == "auto"
        device = data.device
        if arrays is None:
            none = torch.zeros(0, dtype=torch.int32, device=device)
            arrays = IndexArrays({"words": none.long(), "ranks": none, "values": none})
        self._longest = arrays.longest
        self.register_buffer("data", data if self._uniform is None else data.view(-1, self._kind.items))
        for name in ("words", "ranks", "values"):
            self.register_buffer(name, arrays.held[name])
        # Follows .to(dtype) and .to(device), so that vectors go where the rest of the model goes.
        self.register_buffer("like", torch.zeros(0, dtype=dtype, device=device), persistent=False)
        self._widest = max(p.layout.width for p in self.parts)
        self.add_constant("starts", [0, *accumulate(p.rows for p in self.parts)], device)
        self.add_constant("integers", list(map(list, _integers(self.parts))), device)
        self.add_constant("lane", list(range(max(self._widest, HEAD))), device)
        if not self._whole:
            # A column past the last takes what a narrower part does not have.
            columns = [p.columns if p.columns is not None else tuple(range(width)) for p in self.parts]
            self.add_constant("columns", [[*c, *[width] * (self._widest - len(c))] for c in columns], device)
        places = self._all_places() if backend == "fbgemm" and self._reader is not None and self._pruned else None
        self.register_buffer("places", places, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def direct(self) -> Tensor | None:
        """Stored rows ``[rows, items]`` where these are what the native kernels read, else None."""
        if not self._auto or self._uniform is None or self._pruned or self._kind.kind == "fp64":
            return None
        # As attributes torch finds them last of all, ten times slower.
        buffers: dict[str, Tensor] = self._buffers  # type: ignore[assignment]
        return buffers["data"] if buffers["like"].dtype is torch.float32 else None

    @property
    def nbytes(self) -> int:
        """Bytes of stored rows and of the arrays that know which rows are kept."""
        held = (self.data, self.words, self.ranks, self.values, self.places)
        return sum(b.nbytes for b in held if b is not None)

    def forward(self, rows: Tensor, partial: bool = False) -> Tensor:
        """Vectors of int64 ``rows [n]``: ``[n, width]``; with ``partial`` rows may be -1, and read anything."""
        if partial:
            rows = rows.clamp_min(0)
        if self._uniform is not None and not self._pruned:
            return self._whole_rows(rows).to(self.dtype)
        reader = self._reader_of(rows)
        if self.places is not None and reader is not None:
            return reader.remapped(self.data, rows, self.places).to(self.dtype)
        place, n = self._place(rows)
        pos = place.clamp_min(0)
        out = self._scattered(pos, n) if self._uniform is None else self._whole_rows(pos + n.stored)
        if self._pruned:
            out = out.masked_fill((place < 0).unsqueeze(1), 0.0)
        return out.to(self.dtype)

    def _reader_of(self, rows: Tensor) -> fbgemm.RowReader | None:
        """What of FBGEMM's reads these rows, if anything."""
        return self._reader if rows.device.type == "cpu" and not torch.compiler.is_compiling() else None

    def _all_places(self) -> Tensor:
        """Stored row of every row, -1 where it is not kept: int32 ``[rows]``."""
        out = torch.empty(self.rows, dtype=torch.int32)
        for first in range(0, self.rows, _CHUNK):
            rows = torch.arange(first, min(first + _CHUNK, self.rows))
            place, n = self._place(rows)
            out[first : first + len(rows)] = torch.where(place < 0, -1, place + n.stored)
        return out

    def _whole_rows(self, rows: Tensor) -> Tensor:
        """Decoded stored rows of one layout."""
        layout = cast("Layout", self._uniform)
        reader = self._reader_of(rows)
        if reader is not None:
            return reader(self.data, rows)
        return layout.decode(self.data.index_select(0, rows))

    def _place(self, rows: Tensor) -> tuple[Tensor, _Integers[Tensor]]:
        """Place of each row among the kept rows of its part, -1 where it is not kept; and the part's integers."""
        integers, local = self.constant("integers"), rows
        if len(self.parts) == 1:
            n = _Integers(*integers[0].unbind(-1))
        else:
            starts = self.constant("starts")
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

    def _scattered(self, pos: Tensor, n: _Integers[Tensor]) -> Tensor:
        """Vectors of kept rows ``pos [n]`` where parts differ in width or several rows share a stored one."""
        lane = self.constant("lane")
        last = len(self.data) - 1  # a narrower part's lanes may point beyond its row; what they read is dropped
        row = (n.base + torch.div(pos, n.block, rounding_mode="floor") * n.items).unsqueeze(1)
        element = ((pos % n.block) * n.width).unsqueeze(1) + lane[: self._widest]
        if self._kind.bits is None:
            read = self.data[(row + element).clamp_max(last)]
            values = read.to(torch.promote_types(read.dtype, torch.float32))
        else:
            head = self.data[row + lane[:HEAD]].view(torch.float16).float()
            per = 8 // self._kind.bits
            codes = self.data[(row + HEAD + element // per).clamp_max(last)]
            if per > 1:
                codes = (codes >> ((element % per) * self._kind.bits).to(torch.uint8)) & 15
            values = codes.float() * head[:, :1] + head[:, 1:]
        if self._whole:
            return values
        where = self.constant("columns")[n.number].expand(pos.shape[0], -1)
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
    """The storages of a module that serves, by the name under which its lookups read them."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        super().__init__()
        for name, table in stored.items():
            self.add_module(f"table_{name}", table)

    def __contains__(self, name: str) -> bool:
        return f"table_{name}" in self._modules

    def __getitem__(self, name: str) -> Stored:
        return cast("Stored", self._modules[f"table_{name}"])

    def direct(self, names: Sequence[str]) -> list[Tensor] | None:
        """Stored rows of the named storages where the native kernels read all of them, else None."""
        found = [self[name].direct if name in self else None for name in names]
        return None if any(f is None for f in found) else cast("list[Tensor]", found)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the type and on the device of the vectors."""
        return cast("Stored", next(iter(self._modules.values()))).like

    def footprint(self) -> Footprint:
        """Bytes of stored rows, and of the arrays that know which rows are kept."""
        stored = [cast("Stored", m) for m in self._modules.values()]
        weights = sum(s.data.nbytes for s in stored)
        return Footprint(weights=weights, index=sum(s.nbytes for s in stored) - weights)
