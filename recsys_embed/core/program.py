"""Lookup programs: a method as data, i.e. which tables it stores and how an id becomes a vector.

ids -> transform indices -> gather rows -> combine per id -> head -> pool over the bag (done by the caller). With a head
that generates rows, all of this but the pooling runs once per distinct id of a batch.
The transforms are in :mod:`recsys_embed.core.transforms`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import InitVar, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from recsys_embed.core.codes import Codes, CodesIndex
from recsys_embed.core.footprint import Footprint
from recsys_embed.core.heads import Head, PooledCombination, Projection
from recsys_embed.core.index import Index
from recsys_embed.core.precision import matrix_bytes, table_bytes
from recsys_embed.core.row_format import STEP_RATE, Rounding, RowFormat
from recsys_embed.core.transforms import Hash, MixedRadixDigit, Murmur, RankInSet, Sharing, Transform
from recsys_embed.errors import ConfigError
from recsys_embed.features import MAX_ROWS, FeatureSpec
from recsys_embed.utils.deprecated import earlier_names, renamed_fields, warn_deprecated

__all__ = [
    "Codes",
    "CodesIndex",
    "Combine",
    "Hash",
    "Initializer",
    "LookupProgram",
    "MixedRadixDigit",
    "Murmur",
    "RankInSet",
    "RowLookup",
    "Sharing",
    "Table",
    "Transform",
    "Weight",
]  # fmt: skip

Combine = Literal["sum", "mul"]

__getattr__ = earlier_names(
    __name__,
    {
        "Digit": "core.transforms.MixedRadixDigit",
        "Init": "core.program.Initializer",
        "Member": "core.transforms.RankInSet",
        "Probe": "core.program.RowLookup",
    },
)
_PIECE = 1 << 24


@renamed_fields(law="distribution")
@dataclass(frozen=True)
class Initializer:
    """Initial distribution of a table: ``loc`` + U(±scale), ``loc`` + N(0, scale**2), or the constant ``loc``."""

    distribution: Literal["uniform", "normal", "constant"]
    scale: float = 0.0
    loc: float = 0.0

    @classmethod
    def plain(cls, spec: FeatureSpec, factor: float = 1.0) -> Initializer:
        """The initial distribution of a full table of ``spec``, its scale times ``factor``."""
        distribution, scale = spec.initial_distribution()
        return cls(distribution, scale * factor)

    @property
    def reach(self) -> float:
        """Size that nearly all weights stay within: four standard deviations."""
        return abs(self.loc) + self.scale * (4 if self.distribution == "normal" else 1)

    def fill_(self, out: Tensor, seed: int) -> Tensor:
        """Fill ``out`` in place; values only depend on ``seed`` and the shape, not on device or threads."""
        if out.is_meta:
            return out
        constant = self.distribution == "constant"
        if hasattr(out, "fill_from"):  # rows that train in few bits are written by pieces, with all that stands in them
            draws, width = _Elements(self.stream(out.numel(), seed)), out.shape[1]
            out.fill_from(
                lambda _, count: draws.next(count * width).view(count, width), seed=None if constant else seed
            )
            return out
        if constant:
            return out.fill_(self.loc)
        held, at = held_part(out)
        flat = held.view(-1)
        for draw in self.stream(out.numel(), seed):
            # Elements at .. at + len(draw) of what is held, as far as these exist.
            start, stop = max(at, 0), min(at + len(draw), flat.numel())
            if start < stop:
                flat[start:stop].copy_(draw[start - at : stop - at])
            at += len(draw)
        return out

    def stream(self, count: int, seed: int) -> Iterator[Tensor]:
        """The ``count`` elements that :meth:`fill_` writes, in pieces of bounded size: float32."""
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, count, _PIECE):
            draw = torch.empty(min(_PIECE, count - start), dtype=torch.float32)
            if self.distribution == "constant":
                draw.fill_(0.0)
            elif self.distribution == "uniform":
                draw.uniform_(-self.scale, self.scale, generator=generator)
            else:
                draw.normal_(0.0, self.scale, generator=generator)
            yield draw.add_(self.loc) if self.loc else draw


@dataclass(frozen=True)
class LeadingColumns(Initializer):
    """A projection that keeps what it projects: element i of each block's rows becomes column i, the others are zero.

    Blocks of several widths so start in one subspace.

    Args:
        blocks: rows of each block, one block after another.

    >>> LeadingColumns("constant", blocks=(2, 1)).fill_(torch.empty(3, 4), seed=0)
    tensor([[1., 0., 0., 0.],
            [0., 1., 0., 0.],
            [1., 0., 0., 0.]])
    """

    blocks: tuple[int, ...] = ()

    def fill_(self, out: Tensor, seed: int) -> Tensor:
        """Fill ``out`` in place, whatever the seed."""
        if not out.is_meta:
            columns = torch.cat([torch.arange(rows) for rows in self.blocks]).to(out.device)
            out.zero_().scatter_(1, columns.unsqueeze(1), 1.0)
        return out


class _Elements:
    """Pieces of a stream of elements, of the sizes that are asked for."""

    def __init__(self, stream: Iterator[Tensor]) -> None:
        self._stream, self._rest = stream, torch.empty(0)

    def next(self, count: int) -> Tensor:
        parts = [self._rest]
        while sum(len(p) for p in parts) < count:
            parts.append(next(self._stream))
        whole = torch.cat(parts)
        self._rest = whole[count:]
        return whole[:count]


def held_part(out: Any) -> tuple[Tensor, int]:
    """The elements of a tensor that this process holds, and where its first element lies in them, which is 0 or before.

    Raises:
        ConfigError: it is sharded by columns.
    """
    if not hasattr(out, "to_local"):
        return out, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(out.shape, out.device_mesh, out.placements)
    if tuple(shape[1:]) != out.shape[1:]:
        raise ConfigError(f"initial weights are drawn for tables sharded by rows; got {out.placements}")
    held: Tensor = out.to_local()
    return held, -offset[0] * out.shape[1:].numel()


@dataclass(frozen=True)
class Table:
    """A physical table ``[rows, width]``.

    ``shared``: programs of several features that name the same table share its rows. A ``dense`` table is a parameter
    of a head and is never read by row; its rows may be tensors of shape ``inner``. A ``frozen`` one is
    not trained: it keeps the values that it starts with or is fitted to. ``precision`` is that of its numbers once they
    are served; ``training`` how its rows are stored while they train, None: as floats.
    """

    name: str
    rows: int
    width: int
    init: Initializer
    shared: bool = False
    dense: bool = False
    frozen: bool = False
    inner: tuple[int, ...] | None = None
    precision: str = "fp32"
    training: RowFormat | None = None

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return self.rows * self.width

    def nbytes(self, itemsize: int = 4, precision: str | None = None) -> int:
        """Bytes of the table once served, where an element that is not rounded takes ``itemsize``.

        Args:
            precision: another than the table's.

        >>> Table("w", 1000, 16, Initializer("constant"), precision="int4").nbytes()
        12000
        """
        precision = precision or self.precision
        if precision == "fp32":
            return itemsize * self.elements
        if self.dense:
            return min(itemsize * self.elements, matrix_bytes(self.elements, precision))
        return table_bytes(self.rows, self.width, precision)

    def trained_bytes(self, itemsize: int = 4) -> int:
        """Bytes of the table while it trains."""
        return itemsize * self.elements if self.training is None else self.rows * self.training.row_bytes(self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its parameter."""
        return (self.rows, *((self.width,) if self.inner is None else self.inner))


@dataclass(frozen=True)
class Weight:
    """A learned scalar per id: element ``transform(id)`` of a table of width 1."""

    table: str
    transform: Transform


@renamed_fields(run="num_rows")
@dataclass(frozen=True)
class RowLookup:
    """One row read per id, for the output columns from ``column`` on.

    The row is multiplied by ``scale``, by a sign hashed with salt ``sign``, and by the learned ``weight``, if given.

    Args:
        num_rows: number of consecutive rows to read and concatenate, wrapping around at the table's end. With ``sign``,
            each of them has its own sign.
        width: number of columns to fill if it is more than are read: a table of width 1 is broadcast.
    """

    table: str
    transform: Transform
    column: int = 0
    scale: float = 1.0
    sign: int | None = None
    weight: Weight | None = None
    num_rows: int = 1
    width: int | None = None

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Transforms of the row and of the weight."""
        return (self.transform,) if self.weight is None else (self.transform, self.weight.transform)


@dataclass(frozen=True)
class LookupProgram:
    """Computation of vectors from the ids of one feature.

    Args:
        tables: stored tables.
        row_lookups: rows that each id reads; those of equal columns combine, those of disjoint columns concatenate.
            None where a head computes vectors from the ids alone.
        combine: ``"sum"`` or ``"mul"`` of the row lookups that share columns, per id and before pooling.
        head: operation on the combined columns, see :class:`~recsys_embed.core.heads.Head`; None: identity.
        projection: deprecated name of ``head=Projection(...)``.
        vectors: number of vectors in the output, concatenated (feature generation); 1 otherwise.
        padding: columns of zeros after the combined ones, for features of smaller width than others.
    """

    tables: tuple[Table, ...]
    row_lookups: tuple[RowLookup, ...]
    combine: Combine = "sum"
    projection: InitVar[str | None] = None
    vectors: int = 1
    padding: int = 0
    head: Head | None = None

    def __post_init__(self, projection: str | None) -> None:
        # dataclasses.replace passes both.
        if isinstance(projection, str) and self.head is None:
            warn_deprecated(
                "LookupProgram(projection=NAME) is now LookupProgram(head=Projection(NAME)), with Projection of "
                "recsys_embed.core.heads"
            )
            object.__setattr__(self, "head", Projection(projection))

    def table(self, name: str) -> Table:
        return self._named[name]

    # Kept once computed, because kernels ask once per row lookup, of which there may be one per column.
    @cached_property
    def _named(self) -> dict[str, Table]:
        return {t.name: t for t in reversed(self.tables)}

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The indexes of all transforms, without duplicates."""
        found = (t.needs for p in self.row_lookups for t in p.transforms)
        return tuple({index.name: index for index in found if index is not None}.values())

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Output column range of each row lookup."""
        widths = {t.name: t.width for t in self.tables}
        return tuple((p.column, p.column + (p.width or p.num_rows * widths[p.table])) for p in self.row_lookups)

    @property
    def combined_width(self) -> int:
        """Width before the head."""
        return max((stop for _, stop in self.spans), default=0) + self.padding

    @property
    def width(self) -> int:
        """Width of one id's output."""
        return self.combined_width if self.head is None else self.head.width(self.combined_width, self.head_shapes)

    @property
    def generates(self) -> bool:
        """Whether rows are computed, once for each distinct id of a batch: :attr:`Head.generates`."""
        return self.head is not None and self.head.generates

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the head's tables by name."""
        return {} if self.head is None else {name: self.table(name).shape for name in self.head.tables}

    @property
    def head_form(self) -> Hashable:
        """Key of the head: heads of equal keys, on columns of equal width, can run as one operation."""
        if self.head is None:
            return None
        tables = {name: self.table(name) for name in self.head_shapes}
        return (self.head, *((shape, tables[n].precision, tables[n].frozen) for n, shape in self.head_shapes.items()))

    @property
    def of_one_id(self) -> LookupProgram:
        """The equivalent program for bags of one id: row lookups combine directly, not in a head after pooling."""
        if not isinstance(self.head, PooledCombination):
            return self
        width = self.combined_width // self.head.count
        row_lookups = tuple(replace(p, column=p.column % width) for p in self.row_lookups)
        return replace(self, row_lookups=row_lookups, combine=self.head.combine, head=None)

    def footprint(self, itemsize: int = 4) -> Footprint:
        """Bytes of the program's own tables at ``itemsize`` bytes per element, and of its index arrays."""
        weights = sum(t.nbytes(itemsize) for t in self.tables)
        held = sum(t.trained_bytes(itemsize) for t in self.tables)
        index = sum(index.nbytes for index in self.indexes)
        return Footprint(weights=weights, index=index, unrounded=held - weights)

    def at_precision(self, precision: str) -> LookupProgram:
        """The same program with all rows served at a precision, and what heads multiply by at 16 bits."""
        if precision == "fp32" and all(t.precision == precision for t in self.tables):
            return self
        of_heads = precision if precision in ("fp32", "bf16") else "fp16"
        return replace(
            self, tables=tuple(replace(t, precision=of_heads if t.dense else precision) for t in self.tables)
        )

    def trained(
        self,
        step: float | None = None,
        rounding: Rounding = "stochastic",
        quantization: str = "lpt",
        step_rate: float = STEP_RATE,
    ) -> LookupProgram:
        """The same program with rows that train at the precisions of their tables, see :class:`RowFormat`."""

        def trained(table: Table) -> Table:
            reach = table.init.reach
            format = RowFormat.of(table.precision, table.width, reach, step, rounding, quantization, step_rate)
            # Served as they train: narrow rows, too, which train as 16-bit floats.
            return replace(table, training=format, precision=format.kind)

        return replace(self, tables=tuple(t if t.dense else trained(t) for t in self.tables))

    def reach_faults(self, ids: int) -> list[str]:
        """Faults of tables with fewer rows than ids in ``[0, ids)`` can reach; if that is unknown, lookups check."""
        rows, faults = {t.name: t.rows for t in self.tables}, []
        read = [(p.table, p.transform) for p in self.row_lookups]
        read += [(p.weight.table, p.weight.transform) for p in self.row_lookups if p.weight]
        for name, transform in read:
            reach = transform.reach(ids)
            if reach is not None and reach > rows[name]:
                kind = type(transform).__name__
                faults.append(f"table {name!r} has {rows[name]} rows, and {kind} needs at least {reach}")
        return faults

    def faults(self) -> list[str]:
        """Faults of the description, one sentence each."""
        faults = []
        names = [t.name for t in self.tables]
        if len(set(names)) != len(names):
            faults.append(f"table names repeat: {names}")
        for t in self.tables:
            if not 1 <= t.rows <= MAX_ROWS or t.width < 1:
                faults.append(
                    f"table {t.name!r} must have 1 to {MAX_ROWS} rows and width >= 1; got {t.rows} x {t.width}"
                )
        read = {p.table for p in self.row_lookups} | {p.weight.table for p in self.row_lookups if p.weight}
        multiplied = set() if self.head is None else set(self.head.tables)
        used = read | multiplied
        faults += [f"table {n!r} is read but not declared" for n in sorted(used - set(names))]
        faults += [f"table {n!r} is declared but never read" for n in names if n not in used]
        for t in self.tables:
            if t.name in used and t.dense != (t.name in multiplied):
                faults.append(f"table {t.name!r} must be dense if a head multiplies by it, and only then")
            if t.inner is not None and (not t.dense or prod(t.inner) != t.width):
                faults.append(
                    f"table {t.name!r}: `inner` is for dense tables and holds {t.width} elements; got {t.inner}"
                )
        if not self.row_lookups and (self.head is None or not self.head.reads_ids):
            faults.append("a program reads at least one row, unless its head reads the ids")
        if faults:
            return faults
        spans = sorted(set(self.spans))
        edges = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] != edges[:-1]:
            faults.append(f"row_lookup columns must tile the output without gap or partial overlap; got {spans}")
        for p in self.row_lookups:
            if p.num_rows < 1 or p.num_rows > self.table(p.table).rows:
                faults.append(
                    f"`num_rows` must be in [1, {self.table(p.table).rows}], table {p.table!r}; got {p.num_rows}"
                )
            if p.width is not None and (p.num_rows, self.table(p.table).width) != (1, 1):
                faults.append(f"only single elements repeat over columns; table {p.table!r} has wider rows")
        faults += [fault for index in self.indexes for fault in index.faults()]
        if self.padding < 0 or (self.padding and self.head is not None):
            faults.append(f"`padding` must be >= 0, and 0 beside a projection or another head; got {self.padding}")
        if self.head is not None:
            unfit = self.head.faults(self.combined_width, self.head_shapes)
            if self.head.generates and self.head.pools != "ids":
                unfit.append("a head that generates rows applies to ids, `pools = 'ids'`")
            if self.head.stacks and len(self.head.tables) > 1:
                unfit.append("a head that stacks multiplies by one table at most")
            if unfit:
                return faults + unfit
        if self.width % self.vectors:
            faults.append(f"width {self.width} does not divide into {self.vectors} vectors")
        return faults


def _projection(self: LookupProgram) -> str | None:
    return self.head.table if isinstance(self.head, Projection) else None


# The deprecated attribute; the class body can only declare it as an argument.
LookupProgram.projection = property(_projection)  # type: ignore[attr-defined]
