"""Heads: operations on a feature's gathered columns, after kernels or shards have read and combined its rows.

A head is data, as transforms are: frozen, with one definition in torch that every backend, the drop-in modules,
sharding and exports call. Kernels see the gather alone, so a method with a head has fused optimizers, native lookups
and sharding for the tables it reads by row.
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
        pools: what the head does to bags. ``"ids"``: it applies to the columns of each id, and bags pool its vectors.
            ``"bags"``: bags pool the columns, and it applies to what they pool. ``"either"``: it is linear, so that
            sums and means may be taken before it and give the same.
        stacks: :meth:`apply` takes columns ``[B, features, columns]`` of several features of one form at once, and
            its table, if it has one, as ``[features, *shape]``.
        reads_ids: :meth:`apply` looks at the ids of single lookups, not at their columns alone.
        keeps_zero: zeros become zeros. Where they do not, vectors of ids that are none are set to zero behind it.
    """

    pools: ClassVar[Literal["ids", "bags", "either"]] = "ids"
    stacks: ClassVar[bool] = False
    keeps_zero: ClassVar[bool] = True
    reads_ids: ClassVar[bool] = False

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the dense tables that it multiplies by, in the order in which :meth:`apply` takes them."""
        return ()

    @abstractmethod
    def width(self, columns: int, shapes: Shapes) -> int:
        """Width of its output, of so many combined columns and its tables' shapes by name."""

    def faults(self, columns: int, shapes: Shapes) -> list[str]:
        """What does not fit, in words."""
        return []

    @abstractmethod
    def apply(self, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        """Vectors ``[n, width]`` of combined ``columns [n, columns]``; see ``stacks`` for several features.

        Args:
            tables: those of :attr:`tables`.
            ids: int64 ``[n]``, whose columns they are; -1 where an id is none, None where bags have pooled them.
        """

    @abstractmethod
    def describe(self) -> str:
        """What it does, in a few words for reports and plans, after "a row of its own, "."""

    def keys(self, ids: Tensor) -> list[Tensor]:
        """Integers ``[n]`` by which it tells ids apart that read the same rows."""
        return []


def run_head(
    head: Head, columns: Tensor, tables: Sequence[Tensor], ids: Tensor | None = None, optional: bool = False
) -> Tensor:
    """As :meth:`Head.apply`; with ``optional`` an id of -1 is none, and its vector zero."""
    out = head.apply(columns, tables, ids)
    if not optional or head.keeps_zero or ids is None:
        return out
    return out.masked_fill((ids < 0).unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class Projection(Head):
    """Columns times a matrix ``table``: ``[columns, width]``.

    Where the matrix is ``[columns - width, width]`` the first ``width`` columns pass as they are, and the projected
    rest is added to them.

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
        """Of ``[n, columns]`` with one matrix or one for each of n; of ``[B, features, columns]`` with one each."""
        (matrix,) = tables
        passing = columns.shape[-1] - matrix.shape[-2]
        equation = "ni,io->no" if matrix.dim() == 2 else "ni,nio->no" if columns.dim() == 2 else "bfi,fio->bfo"
        out = torch.einsum(equation, columns[..., passing:], matrix)
        return out + columns[..., :passing] if passing else out

    def describe(self) -> str:
        return "widened by a matrix"


@dataclass(frozen=True)
class Contraction(Head):
    """Gathered rows, each reshaped to a small tensor, multiplied with each other as ``equation`` says.

    Tensor trains (Oseledets 2011; TT-Rec, Yin et al. 2021), Tucker and CP forms are contractions.

    Args:
        shapes: of the tensors that the columns hold side by side, in their order.
        equation: over the dimensions of each shape, as in ``torch.einsum``; its output is flattened to the vector.

    >>> head = Contraction(((2, 3), (3, 4)), "ar,rb->ab")
    >>> head.apply(torch.ones(5, 18), []).shape
    torch.Size([5, 8])
    """

    shapes: tuple[tuple[int, ...], ...]
    equation: str

    pools = "ids"
    stacks = True

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
    """Sums or products of pieces of one width, taken once a bag has pooled each piece, as DLRM's code has it."""

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
    """Small networks one after the other, each of one hidden ReLU layer, with weights of their own per class of ids.

    Args:
        classes: of each network, from an id to its class.
        networks: names of each network's hidden weights ``[classes, columns, hidden]``, hidden biases, output weights
            ``[classes, hidden, out]`` and output biases.
    """

    classes: tuple[Transform, ...]
    networks: tuple[tuple[str, str, str, str], ...]

    pools = "ids"
    keeps_zero = False
    reads_ids = True

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
            # Ids that are none, and those that a GPU refuses later, must not read beyond the networks.
            classes = transform.rows(ids).clamp(0, mine[0].shape[0] - 1)
            out = per_class_mlp(out, classes, *mine)
        return out

    def describe(self) -> str:
        return "passed through a network per class"

    def keys(self, ids: Tensor) -> list[Tensor]:
        return [transform.rows(ids) for transform in self.classes]


def per_class_mlp(x: Tensor, classes: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """A network with one hidden ReLU layer per class, each row through that of its class.

    Rows are sorted by class into tiles of one class each, so that two batched products run them all; neither the
    shapes nor the work depend on how rows spread over classes.

    Args:
        x: ``[n, d]``.
        classes: int64 ``[n]`` in [0, m).
        w1, b1, w2, b2: ``[m, d, h]``, ``[m, h]``, ``[m, h, o]``, ``[m, o]``.

    Returns:
        ``[n, o]``.
    """
    n, m = x.shape[0], w1.shape[0]
    # A traced program keeps n symbolic, and then neither the tile nor the number of owners may branch on it.
    traced = torch.compiler.is_compiling()
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
