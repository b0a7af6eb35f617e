"""Reference implementation of a lookup, one feature and row lookup at a time; all backends are tested against it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recsys_embed.core import hashing
from recsys_embed.core.index import IndexArrays
from recsys_embed.core.program import LookupProgram, RowLookup, Transform
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.places import Gather, Place, check_rows


class Indexes(NamedTuple):
    """A program's index arrays, and the offset of each of its indexes in them."""

    places: Mapping[str, int]
    arrays: IndexArrays | None

    def rows(self, transform: Transform, ids: Tensor) -> Tensor:
        return transform.rows(ids, self.places.get(transform.reads or "", 0), self.arrays)


NO_INDEXES = Indexes({}, None)


def _read(gather: Gather, place: Place, rows: Tensor) -> Tensor:
    return gather(place.storage, torch.where(rows < 0, rows, rows + place.offset), True)


def _row_lookup(
    program: LookupProgram,
    row_lookup: RowLookup,
    places: Mapping[str, Place],
    ids: Tensor,
    gather: Gather,
    indexes: Indexes,
) -> Tensor:
    table = program.table(row_lookup.table)
    first = indexes.rows(row_lookup.transform, ids)
    check_rows(first, table.rows, type(row_lookup.transform).__name__)
    pieces = []
    for step in range(row_lookup.num_rows):
        rows = torch.where(first < 0, first, (first + step) % table.rows)
        piece = _read(gather, places[row_lookup.table], rows) * row_lookup.scale
        if row_lookup.sign is not None:
            salt = hashing.sequence(row_lookup.sign, torch.tensor(step, device=ids.device))
            piece = piece * hashing.hash_signs(ids, salt).to(piece.dtype).unsqueeze(-1)
        pieces.append(piece)
    value = torch.cat(pieces, -1)
    if row_lookup.weight is not None:
        factors = indexes.rows(row_lookup.weight.transform, ids)
        check_rows(factors, program.table(row_lookup.weight.table).rows, type(row_lookup.weight.transform).__name__)
        value = value * _read(gather, places[row_lookup.weight.table], factors)
    if row_lookup.width is not None:
        value = value.repeat(1, row_lookup.width)
    empty = 0.0 if program.combine == "sum" else 1.0
    return torch.where((first < 0).unsqueeze(-1), torch.full_like(value, empty), value)


def combine(
    program: LookupProgram,
    places: Mapping[str, Place],
    ids: Tensor,
    gather: Gather,
    indexes: Indexes = NO_INDEXES,
) -> Tensor:
    """Combined vectors of ``ids [n]`` before the head: ``[n, program.combined_width]``."""
    columns = []
    for span in sorted(set(program.spans)):
        values = [
            _row_lookup(program, p, places, ids, gather, indexes)
            for p, s in zip(program.row_lookups, program.spans, strict=True)
            if s == span
        ]
        combined = values[0]
        for value in values[1:]:
            combined = combined + value if program.combine == "sum" else combined * value
        columns.append(combined)
    if program.padding:
        columns.append(combined.new_zeros(len(ids), program.padding))
    return torch.cat(columns, dim=-1)


def lookup(
    program: LookupProgram, tables: Mapping[str, Tensor], ids: Tensor, indexes: IndexStore | None = None
) -> Tensor:
    """Vectors of ``ids`` under a lookup program.

    Args:
        program: the lookup program.
        tables: each of the program's tables by name, ``[rows, width]``.
        ids: int64 ``[n]``.
        indexes: arrays of the program's indexes; by default, ids are frequency ranks.

    Returns:
        ``[n, program.width]`` in the tables' dtype, differentiable in the tables.
    """
    places = {name: Place(name, 0) for name in tables}
    store = IndexStore([program.indexes]) if indexes is None else indexes
    found = Indexes(store.places(0), store.arrays)
    if program.row_lookups:
        out = combine(program, places, ids, lambda table, rows, _: tables[table][rows.clamp_min(0)], found)
    else:
        out = next(iter(tables.values())).new_empty(len(ids), 0)
    return out if program.head is None else program.head.apply(out, [tables[n] for n in program.head.tables], ids)


class Single(NamedTuple):
    """A group of one feature."""

    features: tuple[int, ...]


class ReferenceLookup(nn.Module):
    """Same interface as :class:`VectorisedLookup`; runs one feature and one row lookup at a time."""

    index: IndexStore

    def __init__(
        self,
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        keys: Sequence[Hashable] | None = None,
        optional: Sequence[bool] | None = None,
        index: IndexStore | None = None,
        owners: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.programs, self.places = list(programs), list(places)
        self.optional = tuple(optional or [False] * len(programs))
        if index is None:
            self.index = IndexStore([p.indexes for p in programs], owners)
        else:
            self.__dict__["index"] = index  # not as a part of this module

    @property
    def groups(self) -> list[Single]:
        """One group per feature."""
        return [Single((i,)) for i in range(len(self.programs))]

    def forward(
        self, ids: Sequence[Tensor], local: Sequence[Tensor] | None, gather: Gather, chosen: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Combined vectors per feature: ``[B, 1, columns]`` of ``ids [B, 1]``; ``[n, columns]`` of ``[n]``.

        Args:
            local: given if the ids of a feature are ``[n]``.
            gather: called once per row lookup.
            chosen: the features to run, whose ids are given; all by default.
        """
        features = range(len(self.programs)) if chosen is None else chosen
        out = [self._one(f, x.reshape(-1), gather) for f, x in zip(features, ids, strict=True)]
        return [v.unsqueeze(1) for v in out] if local is None else out

    def _one(self, feature: int, ids: Tensor, gather: Gather) -> Tensor:
        indexes = Indexes(self.index.places(feature), self.index.arrays)
        program, places = self.programs[feature], self.places[feature]
        if not self.optional[feature]:
            return combine(program, places, ids, gather, indexes)
        # Absent ids read no row, so sparse gradients do not contain one.
        present = (ids != -1).nonzero().squeeze(1)
        vectors = combine(program, places, ids[present], gather, indexes)
        return vectors.new_zeros(len(ids), vectors.shape[1]).index_copy(0, present, vectors)
