"""A method described as data: which tables it stores and how an id becomes a vector.

ids -> transform indices -> gather rows -> combine per id -> project -> (pool over the bag, by whoever runs it).
The transforms are in :mod:`recsys_embed.core.transforms`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recsys_embed.core.footprint import Footprint
from recsys_embed.core.id_sets import Index
from recsys_embed.core.transforms import Hash, Member, MixedRadixDigit, Murmur, Sharing, Transform
from recsys_embed.features import MAX_ROWS, FeatureSpec

__all__ = [
    "Combine",
    "Hash",
    "Initializer",
    "LookupProgram",
    "Member",
    "MixedRadixDigit",
    "Murmur",
    "RowLookup",
    "Sharing",
    "Table",
    "Transform",
    "Weight",
]  # fmt: skip

Combine = Literal["sum", "mul"]

_PIECE = 1 << 24


@dataclass(frozen=True)
class Initializer:
    """Law of a table's initial elements: ``loc`` + U(±scale), ``loc`` + N(0, scale**2), or constant ``loc``."""

    law: Literal["uniform", "normal", "constant"]
    scale: float = 0.0
    loc: float = 0.0

    @classmethod
    def plain(cls, spec: FeatureSpec, factor: float = 1.0) -> Initializer:
        """The law a plain table of ``spec`` would start with, its spread times ``factor``."""
        law, scale = spec.init_law()
        return cls(law, scale * factor)

    def fill_(self, out: Tensor, seed: int) -> Tensor:
        """Fill ``out`` in place with bits that depend on ``seed`` and the shape alone, not on device or threads."""
        if out.is_meta:
            return out
        if self.law == "constant":
            return out.fill_(self.loc)
        flat, at = out.view(-1), 0
        for draw in self.stream(flat.numel(), seed):
            flat[at : at + len(draw)].copy_(draw)
            at += len(draw)
        return out

    def stream(self, count: int, seed: int) -> Iterator[Tensor]:
        """The ``count`` elements that :meth:`fill_` writes, in float32 pieces of bounded size."""
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, count, _PIECE):
            draw = torch.empty(min(_PIECE, count - start), dtype=torch.float32)
            if self.law == "constant":
                draw.fill_(0.0)
            elif self.law == "uniform":
                draw.uniform_(-self.scale, self.scale, generator=generator)
            else:
                draw.normal_(0.0, self.scale, generator=generator)
            yield draw.add_(self.loc) if self.loc else draw


@dataclass(frozen=True)
class Table:
    """A physical table ``[rows, width]``.

    ``shared`` names it across features: programs that name the same shared table read the same rows. A ``dense``
    table is a matrix that every lookup multiplies by (a projection) and is never read by row.
    """

    name: str
    rows: int
    width: int
    init: Initializer
    shared: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Weight:
    """A learned scalar per id: element ``transform(id)`` of a table of width 1."""

    table: str
    transform: Transform


@dataclass(frozen=True)
class RowLookup:
    """One row read per id: it joins the output columns from ``column`` on.

    The row is multiplied by ``scale``, by a sign hashed with ``sign`` and by the learned ``weight``, where given.

    Args:
        run: this many consecutive rows are read and stand side by side; after the table's last row comes its first.
            Each element of a run has a sign of its own.
        width: columns it fills, where these are more than it reads: a table of width 1 repeats over them.
    """

    table: str
    transform: Transform
    column: int = 0
    scale: float = 1.0
    sign: int | None = None
    weight: Weight | None = None
    run: int = 1
    width: int | None = None

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Those of the row and of the weight."""
        return (self.transform,) if self.weight is None else (self.transform, self.weight.transform)


@dataclass(frozen=True)
class LookupProgram:
    """How one feature's ids become vectors.

    Args:
        tables: what is stored.
        row_lookups: which row each id reads; row lookups with equal columns combine, disjoint columns concatenate.
        combine: ``"sum"`` or ``"mul"`` of the row lookups that share columns, per id and before pooling.
        projection: name of a dense table applied to the combined vector: ``[columns, out]``; or
            ``[columns - out, out]``, where the first ``out`` columns pass as they are and the projected rest is added.
        vectors: the output is this many vectors side by side (feature generation); 1 otherwise.
        padding: columns of zeros behind the combined ones, for features that are narrower than their neighbours.
    """

    tables: tuple[Table, ...]
    row_lookups: tuple[RowLookup, ...]
    combine: Combine = "sum"
    projection: str | None = None
    vectors: int = 1
    padding: int = 0

    def table(self, name: str) -> Table:
        return next(t for t in self.tables if t.name == name)

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The sets of ids that transforms look up, each once."""
        found = (t.needs for p in self.row_lookups for t in p.transforms)
        return tuple({index.name: index for index in found if index is not None}.values())

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Output column range of each row lookup."""
        widths = {t.name: t.width for t in self.tables}
        return tuple((p.column, p.column + (p.width or p.run * widths[p.table])) for p in self.row_lookups)

    @property
    def combined_width(self) -> int:
        """Width before the projection."""
        return max(stop for _, stop in self.spans) + self.padding

    @property
    def width(self) -> int:
        """Width of one id's output."""
        return self.table(self.projection).width if self.projection else self.combined_width

    def footprint(self, itemsize: int = 4) -> Footprint:
        """Bytes of the program's own tables at ``itemsize`` bytes per element, and of its index arrays."""
        weights = itemsize * sum(t.rows * t.width for t in self.tables)
        return Footprint(weights=weights, index=sum(index.nbytes for index in self.indexes))

    def faults(self) -> list[str]:
        """Everything wrong with the description itself, in words."""
        faults = []
        names = [t.name for t in self.tables]
        if len(set(names)) != len(names):
            faults.append(f"table names repeat: {names}")
        for t in self.tables:
            if not 1 <= t.rows <= MAX_ROWS or t.width < 1:
                faults.append(
                    f"table {t.name!r} must have 1 to {MAX_ROWS} rows and width >= 1; got {t.rows} x {t.width}"
                )
        used = (
            {p.table for p in self.row_lookups}
            | {p.weight.table for p in self.row_lookups if p.weight}
            | {self.projection}
        )
        faults += [f"table {n!r} is read but not declared" for n in sorted(used - {None} - set(names), key=str)]
        faults += [f"table {n!r} is declared but never read" for n in names if n not in used]
        if faults:
            return faults
        spans = sorted(set(self.spans))
        edges = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] != edges[:-1]:
            faults.append(f"row_lookup columns must tile the output without gap or partial overlap; got {spans}")
        for p in self.row_lookups:
            if p.run < 1 or p.run > self.table(p.table).rows:
                faults.append(f"`run` must be in [1, {self.table(p.table).rows}], table {p.table!r}; got {p.run}")
            if p.width is not None and (p.run, self.table(p.table).width) != (1, 1):
                faults.append(f"only single elements repeat over columns; table {p.table!r} has wider rows")
        faults += [fault for index in self.indexes for fault in index.faults()]
        if self.padding < 0 or (self.padding and self.projection):
            faults.append(f"`padding` must be >= 0, and 0 beside a projection; got {self.padding}")
        if self.projection:
            rows = self.table(self.projection).rows
            whole = self.combined_width
            if rows not in (whole, whole - self.table(self.projection).width):
                faults.append(f"projection must have {whole} rows, or {whole} less its width; got {rows}")
        if self.width % self.vectors:
            faults.append(f"width {self.width} does not divide into {self.vectors} vectors")
        return faults
