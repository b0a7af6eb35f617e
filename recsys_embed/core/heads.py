"""Heads: operations on a feature's columns after its rows were gathered and combined.

Like a transform, a head is a frozen value with one torch implementation, which all backends, drop-in modules, sharding
and exports call. Kernels only handle the gather, so methods with a head keep fused optimizers, native lookups and
sharding for the tables they read by row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recsys_embed.core.transforms import Transform

Shapes = Mapping[str, tuple[int, ...]]


class Head(ABC):
    """Maps the combined columns of an id, or of a bag of ids, to its vector.

    Attributes:
        pools: order of head and pooling. ``"ids"``: the head is applied per id, and bags pool its vectors. ``"bags"``:
            bags pool the columns, and the head is applied per bag. ``"either"``: the head is linear, so sums and means
            give the same in both orders.
        stacks: :meth:`apply` takes columns ``[B, features, columns]`` of several features of one form at once, and
            its table, if it has one, as ``[features, *shape]``.
        reads_ids: :meth:`apply` needs the ids, not only their columns.
        generates: the head computes rows that would otherwise be stored (a generator). Its work per id is large, so the
            ids of a batch are deduplicated before any row is read, and each distinct id is computed once. Needs
            ``pools = "ids"``.
        shares_all: ids share all that is stored, in proportion to their frequencies. The planner then takes the rows
            that the stored numbers would make for shared by all ids.
        keeps_zero: zero columns give zero vectors. If not, vectors of absent ids are set to zero after the head.
    """

    pools: ClassVar[Literal["ids", "bags", "either"]] = "ids"
    stacks: ClassVar[bool] = False
    keeps_zero: ClassVar[bool] = True
    reads_ids: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    shares_all: ClassVar[bool] = False

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the head's dense tables, in the order in which :meth:`apply` takes them."""
        return ()

    @abstractmethod
    def width(self, columns: int, shapes: Shapes) -> int:
        """Width of the output, given the number of combined columns and the shapes of the tables by name."""

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        """Faults of the head for these columns and shapes, one sentence each."""
        return []

    @abstractmethod
    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        """Vectors ``[n, width]`` of combined ``columns [n, columns]``; see ``stacks`` for several features.

        Args:
            tables: those of :attr:`tables`.
            ids: int64 ``[n]``, of the columns; -1 for absent ids; None for columns pooled over bags.
        """

    @abstractmethod
    def describe(self) -> str:
        """The operation in a few words for reports and plans, following "a row of its own, "."""

    def keys(self, ids: Tensor) -> list[Tensor]:
        """Integers ``[n]`` by which the head distinguishes ids that read the same rows."""
        return []

    def made(self, shapes: Shapes) -> tuple[int, int]:
        """Integers and floats per id that the head makes beside its columns and its output, for reports."""
        return 0, 0


def run_head(
    head: Head, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None, optional: bool = False
) -> Tensor:
    """As :meth:`Head.apply`; with ``optional``, an id of -1 means no id, and its vector is zero."""
    kind = columns.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        # As lookups of nn.Embedding, whose type is that of the table: autocast would round the products.
        with torch.autocast(kind, enabled=False):
            out = head.apply(columns, tables, ids)
    else:
        out = head.apply(columns, tables, ids)
    if not optional or head.keeps_zero or ids is None:
        return out
    return out.masked_fill((ids == -1).unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class Projection(Head):
    """Columns times a matrix ``table``: ``[columns, width]``.

    If the matrix is ``[columns - width, width]``, the first ``width`` columns are not projected, and the projection of
    the others is added to them.

    >>> Projection("matrix").apply(torch.ones(1, 3), [torch.full((2, 1), 2.0)])
    tensor([[5.]])
    """

    table: str

    pools = "either"
    stacks = True

    @property
    def tables(self) -> tuple[str, ...]:
        return (self.table,)

    def width(self, columns: int, shapes: Shapes) -> int:
        return shapes[self.table][-1]

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        rows, width = shapes[self.table][0], shapes[self.table][-1]
        if rows in (columns, columns - width):
            return []
        return [f"projection must have {columns} rows, or {columns} less its width; got {rows}"]

    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        """``[n, columns]`` times one matrix, or one for each of n; ``[B, features, columns]`` times one per feature."""
        (matrix,) = tables
        passing = columns.shape[-1] - matrix.shape[-2]
        equation = "ni,io->no" if matrix.dim() == 2 else "ni,nio->no" if columns.dim() == 2 else "bfi,fio->bfo"
        out = torch.einsum(equation, columns[..., passing:], matrix)
        return out + columns[..., :passing] if passing else out

    def describe(self) -> str:
        return "widened by a matrix"


@dataclass(frozen=True)
class Contraction(Head):
    """Reshapes each gathered row to a small tensor and contracts them with each other by an einsum ``equation``.

    Tensor trains (Oseledets 2011; TT-Rec, Yin et al. 2021), Tucker and CP forms are contractions.

    Args:
        shapes: of the tensors, whose elements are consecutive columns.
        equation: over the dimensions of each shape, as in ``torch.einsum``; its output is flattened to the vector.

    >>> head = Contraction(((2, 3), (3, 4)), "ar,rb->ab")
    >>> head.apply(torch.ones(5, 18), []).shape
    torch.Size([5, 8])
    """

    shapes: tuple[tuple[int, ...], ...]
    equation: str

    pools = "ids"
    stacks = True
    generates = True
    shares_all = True

    def _sizes(self) -> dict[str, int]:
        inputs = self.equation.partition("->")[0].split(",")
        return {
            letter: size
            for letters, shape in zip(inputs, self.shapes, strict=False)
            for letter, size in zip(letters, shape, strict=False)
        }

    def width(self, columns: int, shapes: Shapes) -> int:
        sizes = self._sizes()
        return prod(sizes.get(letter, 1) for letter in self.equation.partition("->")[2])

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        left, arrow, right = self.equation.partition("->")
        inputs, sizes = left.split(","), self._sizes()
        if not arrow or len(inputs) != len(self.shapes) or not (left + right).replace(",", "").isalpha():
            return [f"a contraction of {len(self.shapes)} tensors needs an equation such as 'ar,rb->ab'; got {self!r}"]
        faults = []
        if [tuple(sizes[letter] for letter in letters) for letters in inputs] != list(self.shapes):
            faults.append(f"`equation` must name every dimension of `shapes`, equal sizes alike; got {self!r}")
        if not right or len(set(right)) != len(right) or not set(right) <= sizes.keys():
            faults.append(f"the output of `equation` must name dimensions of its inputs, each once; got {right!r}")
        held = sum(prod(shape) for shape in self.shapes)
        if held != columns:
            faults.append(f"the tensors of a contraction must hold the {columns} columns gathered; they hold {held}")
        return faults

    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        parts = columns.split([prod(shape) for shape in self.shapes], -1)
        tensors = [p.unflatten(-1, shape) for p, shape in zip(parts, self.shapes, strict=True)]
        left, _, right = self.equation.partition("->")
        equation = ",".join(f"...{letters}" for letters in left.split(",")) + f"->...{right}"
        return torch.einsum(equation, *tensors).flatten(columns.dim() - 1)

    def describe(self) -> str:
        return "multiplied out as tensors"


@dataclass(frozen=True)
class PooledCombination(Head):
    """Sum or product of pieces of one width after each piece was pooled over the bag, as in DLRM's code."""

    count: int
    combine: Literal["sum", "mul"]

    pools = "bags"
    stacks = True

    def width(self, columns: int, shapes: Shapes) -> int:
        return columns // self.count

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        if self.count >= 1 and columns % self.count == 0:
            return []
        return [f"{columns} columns do not divide into the {self.count} pieces that combine"]

    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        pieces = columns.split(columns.shape[-1] // self.count, -1)
        return reduce(torch.mul if self.combine == "mul" else torch.add, pieces)

    def describe(self) -> str:
        return "combined after pooling"


@dataclass(frozen=True)
class PerClassNetwork(Head):
    """Consecutive networks of one hidden ReLU layer each, with separate weights per class of ids.

    Args:
        classes: per network, the transform of an id to its class.
        networks: names of each network's hidden weights ``[classes, columns, hidden]``, hidden biases, output weights
            ``[classes, hidden, out]`` and output biases.
    """

    classes: tuple[Transform, ...]
    networks: tuple[tuple[str, str, str, str], ...]

    pools = "ids"
    keeps_zero = False
    reads_ids = True
    generates = True

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(name for names in self.networks for name in names)

    def width(self, columns: int, shapes: Shapes) -> int:
        return shapes[self.networks[-1][2]][-1] if self.networks else columns

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        if len(self.classes) != len(self.networks) or not self.networks:
            return [f"a head needs a network per map to classes; got {len(self.networks)}, {len(self.classes)} maps"]
        if any(t.reads for t in self.classes):
            return ["classes of ids must follow from arithmetic; these are read from an index"]
        faults, given = [], columns
        for names in self.networks:
            wide, bias, out, last = (shapes[n] for n in names)
            good = len(wide) == len(out) == 3 and wide[1] == given and out[1] == wide[2]
            if not good or bias != (wide[0], wide[2]) or last != (out[0], out[2]) or wide[0] != out[0]:
                faults.append(
                    f"networks of {given} columns must have shapes [m, {given}, h], [m, h], [m, h, o], [m, o]"
                )
            given = out[-1]
        return faults

    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        if ids is None:
            raise ValueError("networks per class need the ids")
        out = columns
        for i, transform in enumerate(self.classes):
            mine = tables[4 * i : 4 * i + 4]
            # Absent ids, and invalid ids that a GPU reports later, must not read beyond the weights.
            classes = transform.rows(ids).clamp(0, mine[0].shape[0] - 1)
            out = per_class_mlp(out, classes, *mine)
        return out

    def describe(self) -> str:
        return "passed through a network per class"

    def keys(self, ids: Tensor) -> list[Tensor]:
        return [transform.rows(ids) for transform in self.classes]


def per_class_mlp(x: Tensor, classes: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """One network with a hidden ReLU layer per class; each row uses that of its class.

    Rows are sorted by class into tiles of one class, so that two batched products suffice; neither shapes nor work
    depend on the distribution of rows over classes.

    Args:
        x: ``[n, d]``.
        classes: int64 ``[n]`` in [0, m).
        w1, b1, w2, b2: ``[m, d, h]``, ``[m, h]``, ``[m, h, o]``, ``[m, o]``.

    Returns:
        ``[n, o]``.
    """
    n, m = x.shape[0], w1.shape[0]
    # While tracing, n is symbolic, so neither the tile nor the number of tiles may branch on it.
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    tile = 32 if traced else max(1, min(128, n // m))
    order = classes.argsort(stable=True)
    ordered = classes[order]
    counts = torch.zeros(m, dtype=torch.int64, device=x.device).scatter_add(0, classes, torch.ones_like(classes))
    tiles = (counts + tile - 1) // tile
    ends = tiles.cumsum(0)
    rank = torch.arange(n, device=x.device) - (counts.cumsum(0) - counts)[ordered]
    slot = (ends - tiles)[ordered] * tile + rank
    place = torch.empty_like(slot).scatter(0, order, slot)
    total = n // tile + (m if traced else min(m, n))
    owner = torch.searchsorted(ends, torch.arange(total, device=x.device), right=True).clamp_max(m - 1)
    where = (place // tile, place % tile)
    grouped = x.new_zeros(total, tile, x.shape[1]).index_put(where, x)
    hidden = torch.baddbmm(b1.index_select(0, owner).unsqueeze(1), grouped, w1.index_select(0, owner)).relu()
    out = torch.baddbmm(b2.index_select(0, owner).unsqueeze(1), hidden, w2.index_select(0, owner))
    return out[where]
