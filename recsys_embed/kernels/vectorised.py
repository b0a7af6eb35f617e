"""The torch backend: all features of a collection in a fixed number of tensor operations.

Features whose programs have the same structure form a group; within a group every integer of every transform is a
tensor over (feature, row lookup), so no loop runs over features. All groups read a storage through one gather.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.core import hashing
from recsys_embed.core.index import IndexArrays
from recsys_embed.core.program import LookupProgram, RowLookup, Transform
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.places import Gather, Place, absent_ids, check_rows
from recsys_embed.utils.types import Signature


@dataclass(frozen=True)
class _Read:
    """Row lookups of a group that read one storage with one kind of transform.

    ``params`` names a constant ``[features, row lookups, n]``: the transform's integers, the offset of its index, the
    rows of the table, and the table's offset in the storage.
    """

    storage: str
    kind: Signature
    params: str
    may_be_absent: bool
    num_rows: int = 1
    reach_is_known: bool = True


@dataclass(frozen=True)
class _RowLookupSet:
    """Row lookups of a group that run as one operation; ``slots`` are their positions in the program."""

    slots: tuple[int, ...]
    read: _Read
    weight: _Read | None
    signs: str | None
    scale: float
    width: int | None


def _signature(program: LookupProgram, places: Mapping[str, Place], key: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    rest = (program.spans, program.combine, program.head_form, program.vectors, program.padding, key)
    return (tuple(_kinds(program, places)), *rest)


def _kinds(program: LookupProgram, places: Mapping[str, Place]) -> list[Signature]:
    """Signatures of the row lookups; those of equal signature run as one operation."""
    return [
        (
            places[p.table].storage,
            p.transform.signature(),
            p.transform.may_be_absent,
            p.scale,
            p.sign is None,
            p.num_rows,
            p.width,
            p.weight and (places[p.weight.table].storage, p.weight.transform.signature()),
        )
        for p in program.row_lookups
    ]


class Group(Constants):
    """Features of equal structure, which run as one.

    Args:
        features: their positions among the collection's features.
        programs: one program per position.
        places: of each table of the programs.
        index: arrays of all features.
        optional: an id of -1 means no id: it reads no row and gives zeros.
    """

    def __init__(
        self,
        features: Sequence[int],
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        index: IndexStore,
        optional: bool = False,
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self.template = programs[0]
        self.optional = optional
        by_kind: dict[Signature, list[int]] = {}
        for slot, signature in enumerate(_kinds(programs[0], places[0])):
            by_kind.setdefault(signature, []).append(slot)
        self.sets = [self._row_lookup_set(tuple(slots), programs, places, index) for slots in by_kind.values()]
        counts = {s.read.num_rows for s in self.sets}
        for count in counts - {1}:
            self.add_constant(f"slice{count}", list(range(count)))

    def _read(
        self,
        name: str,
        chosen: Sequence[Sequence[tuple[str, Transform]]],
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        index: IndexStore,
        num_rows: int = 1,
    ) -> _Read:
        """Register the integers of ``chosen[feature][row lookup] = (table, transform)``."""

        def integers(f: int, table: str, transform: Transform) -> list[int]:
            at = index.at(self.features[f], transform.reads)
            return [*transform.parameters(), at, programs[f].table(table).rows, places[f][table].offset]

        self.add_constant(name, [[integers(f, table, t) for table, t in row] for f, row in enumerate(chosen)])
        table, transform = chosen[0][0]
        known = all(t.reach(1) is not None for row in chosen for _, t in row)
        return _Read(places[0][table].storage, transform.signature(), name, transform.may_be_absent, num_rows, known)

    def _row_lookup_set(
        self,
        slots: tuple[int, ...],
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        index: IndexStore,
    ) -> _RowLookupSet:
        chosen: list[list[RowLookup]] = [[p.row_lookups[s] for s in slots] for p in programs]
        first, tag = chosen[0][0], f"{slots[0]}"
        picks = [[(p.table, p.transform) for p in row] for row in chosen]
        read = self._read(f"rows{tag}", picks, programs, places, index, first.num_rows)
        weight, signs = None, None
        if first.weight is not None:
            picks = [[(p.weight.table, p.weight.transform) for p in row if p.weight] for row in chosen]
            weight = self._read(f"weight{tag}", picks, programs, places, index)
        if first.sign is not None:
            signs = f"sign{tag}"
            self.add_constant(signs, [[p.sign or 0 for p in row] for row in chosen])
        return _RowLookupSet(slots, read, weight, signs, first.scale, first.width)

    @property
    def reads(self) -> list[_Read]:
        """The reads that :meth:`rows` returns rows for, in order."""
        return [read for s in self.sets for read in (s.read, s.weight) if read is not None]

    def rows(
        self, ids: Tensor, local: Tensor | None, arrays: IndexArrays, absent: Tensor | None = None
    ) -> list[tuple[str, Tensor]]:
        """Rows to gather, per set and its weights: (storage, int64 ``[..., lookups]`` or ``[..., lookups, num_rows]``).

        -1 stays -1.

        Args:
            ids: ``[B, len(features)]``, or ``[n]`` with ``local``.
            local: ``[n]``, which of the group's features each id belongs to.
            arrays: of all indexes.
            absent: bool of the shape of ``ids``, ids that read no row; None if all read one.
        """
        x = ids.unsqueeze(-1)
        out = []
        for read in self.reads:
            stacked = self.constant(read.params, ids)
            *params, at, size, offset = (stacked if local is None else stacked[local]).unbind(-1)
            rows = read.kind[0].map(read.kind, x, params, at, arrays)
            if not read.reach_is_known:
                check_rows(rows, size, read.kind[0].__name__)
            if absent is not None:
                rows = torch.where(absent.unsqueeze(-1), -1, rows)
            partial = read.may_be_absent or absent is not None
            if read.num_rows > 1:
                size, offset, rows = size.unsqueeze(-1), offset.unsqueeze(-1), rows.unsqueeze(-1)
                ahead = (rows + self.constant(f"slice{read.num_rows}", ids)) % size
                rows = torch.where(rows < 0, rows, ahead) if partial else ahead
            out.append((read.storage, torch.where(rows < 0, rows, rows + offset) if partial else rows + offset))
        return out

    def _signs(self, s: _RowLookupSet, ids: Tensor, local: Tensor | None) -> Tensor:
        """-1 or +1 per element read."""
        salts = self.constant(s.signs or "", ids)
        salts, x = salts if local is None else salts[local], ids.unsqueeze(-1)
        if s.read.num_rows > 1:
            steps = self.constant(f"slice{s.read.num_rows}", ids)
            salts, x = hashing.sequence(salts.unsqueeze(-1), steps), x.unsqueeze(-1)
        return hashing.hash_signs(x, salts).unsqueeze(-1)

    def combine(self, ids: Tensor, local: Tensor | None, rows: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Combine gathered ``values[i] = [*rows[i].shape, width]`` into ``[..., combined_width]``."""
        columns = self._columns(ids, local, rows, values)
        return F.pad(columns, (0, self.template.padding)) if self.template.padding else columns

    def _columns(self, ids: Tensor, local: Tensor | None, rows: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """As :meth:`combine`, without the padding."""
        program, index = self.template, 0
        parts: dict[tuple[int, int], list[Tensor]] = {}
        for s in self.sets:
            value, row = values[index], rows[index]
            index += 1
            if s.scale != 1.0:
                value = value * s.scale
            if s.signs is not None:
                value = value * self._signs(s, ids, local).to(value.dtype)
            if s.read.num_rows > 1:
                value, row = value.flatten(-2), row[..., 0]
            if s.weight is not None:
                value = value * values[index]
                index += 1
            if s.read.may_be_absent:
                empty = 0.0 if program.combine == "sum" else 1.0
                value = value.masked_fill((row < 0).unsqueeze(-1), empty)
            if s.width is not None:
                value = value.expand(*value.shape[:-1], s.width)
            spans = [program.spans[slot] for slot in s.slots]
            if len(self.sets) == 1 and len(set(spans)) == len(spans) and sorted(spans) == spans:
                return value.flatten(-2)
            for span, piece in zip(spans, value.unbind(-2), strict=True):
                parts.setdefault(span, []).append(piece)
        columns = []
        for span in sorted(parts):
            join = torch.add if program.combine == "sum" else torch.mul
            columns.append(reduce(join, parts[span]))
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


class VectorisedLookup(nn.Module):
    """Runs the programs of many features at once.

    Args:
        programs: one per feature.
        places: per feature, the place of each of its tables; ``dense`` tables need none.
        keys: per feature, anything hashable that keeps features apart in groups (e.g. the pooling).
        optional: per feature, whether an id of -1 means no id: it reads no row and gives zeros.
        index: arrays of the programs, of another module; by default the lookup's own.
        owners: of these, see :class:`IndexStore`.
    """

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
        self.optional = tuple(optional or [False] * len(programs))
        members: dict[tuple[Hashable, ...], list[int]] = {}
        for i, program in enumerate(programs):
            key = (keys[i] if keys else None, self.optional[i])
            members.setdefault(_signature(program, places[i], key), []).append(i)
        if index is None:
            self.index = IndexStore([p.indexes for p in programs], owners)
        else:
            self.__dict__["index"] = index  # not as a part of this module
        self._groups = nn.ModuleList(
            Group(m, [programs[i] for i in m], [places[i] for i in m], self.index, self.optional[m[0]])
            for m in members.values()
        )
        self._partial = {read.storage for g in self.groups for read in g.reads if read.may_be_absent}

    @property
    def groups(self) -> list[Group]:
        """Features of one structure, in the order of the arguments and results of :meth:`forward`."""
        return cast("list[Group]", list(self._groups))

    def _requests(
        self, ids: Sequence[Tensor], local: Sequence[Tensor] | None, chosen: Sequence[int] | None = None
    ) -> tuple[Sequence[Tensor | None], list[Tensor | None], list[list[tuple[str, Tensor]]]]:
        """Per group: the feature of each id, the ids that read no row, and the rows to gather."""
        groups = self._chosen(chosen)
        where: Sequence[Tensor | None] = local if local is not None else [None] * len(ids)
        arrays = self.index.arrays
        absent = [absent_ids(x) if g.optional else None for g, x in zip(groups, ids, strict=True)]
        requests = [g.rows(x, w, arrays, a) for g, x, w, a in zip(groups, ids, where, absent, strict=True)]
        return where, absent, requests

    def _chosen(self, chosen: Sequence[int] | None) -> list[Group]:
        return self.groups if chosen is None else [self.groups[i] for i in chosen]

    def forward(
        self, ids: Sequence[Tensor], local: Sequence[Tensor] | None, gather: Gather, chosen: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Per group, the combined vectors ``[*ids[g].shape, combined_width]`` of its ids.

        Args:
            ids: per group int64 ``[B, features of the group]``, or ``[n]`` with ``local``.
            local: per group ``[n]``, which of its features each id belongs to.
            gather: reads rows of a storage: (storage, int64 ``[n]``, whether some rows may be -1) -> ``[n, width]``;
                called once per storage. What it returns for -1 is ignored.
            chosen: indices of the groups to run; ``ids`` are theirs. All by default.
        """
        where, absent, requests = self._requests(ids, local, chosen)
        groups = self._chosen(chosen)
        missing = {r.storage for g, a in zip(groups, absent, strict=True) if a is not None for r in g.reads}
        wanted: dict[str, list[Tensor]] = {}
        for request in requests:
            for storage, rows in request:
                wanted.setdefault(storage, []).append(rows)
        gathered: dict[str, list[Tensor]] = {}
        for storage, asked in wanted.items():
            flat = [r.reshape(-1) for r in asked]
            read = gather(storage, flat[0] if len(flat) == 1 else torch.cat(flat), storage in self._partial | missing)
            split = read.split([r.numel() for r in asked])
            gathered[storage] = [v.view(*r.shape, v.shape[-1]) for v, r in zip(split, asked, strict=True)]
        out = []
        for g, x, w, a, request in zip(groups, ids, where, absent, requests, strict=True):
            pieces = [gathered[storage].pop(0) for storage, _ in request]
            value = g.combine(x, w, [rows for _, rows in request], pieces)
            out.append(value if a is None else value.masked_fill(a.unsqueeze(-1), 0.0))
        return out
