"""Lookups by FBGEMM's batched tables: every feature a table, every vector a sum of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.errors import BackendError, raise_faults
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.bag_step import BagCall, BagReader
from recsys_embed.kernels.fbgemm import LANES, TableBatch
from recsys_embed.kernels.vectorised import Gather, Place, VectorisedLookup
from recsys_embed.optim import FusedOptimizer
from recsys_embed.program import LookupProgram


def refuse(programs: Mapping[str, LookupProgram], optimizer: FusedOptimizer | None, like: Tensor, sparse: bool) -> None:
    """Raise unless FBGEMM does all of this on the CPU.

    Args:
        programs: by feature name.
        like: of the tables' type and device.

    Raises:
        BackendError: every reason.
    """
    faults = []
    if optimizer is not None and type(optimizer) not in fbgemm.RULES:
        faults.append(f"it has no CPU kernel for {type(optimizer).__name__}, but for SGD, Adagrad and RowwiseAdagrad")
    elif optimizer is not None and (optimizer.rows != "touched" or optimizer.weight_decay):
        faults.append(f"its rules move touched rows and know no weight decay; got {optimizer!r}")
    if like.dtype != torch.float32 or like.device.type not in ("cpu", "meta"):
        faults.append(f"it reads float32 tables on the CPU; got {like.dtype} on {like.device.type}")
    if sparse:
        faults.append("it has no sparse gradients")
    faults += [f"feature {name!r}: {why}" for name, p in programs.items() if (why := _unfit(p))]
    raise_faults(faults, "backend 'fbgemm'; 'native' and 'torch' do all of this", BackendError)


def _unfit(program: LookupProgram) -> str:
    """Why a program's vectors are no sums of rows; empty where they are."""
    if program.combine != "sum" and len(set(program.spans)) < len(program.spans):
        return "its rows are multiplied, and FBGEMM adds"
    if any(p.weight is not None for p in program.probes):
        return "its rows are multiplied by learned weights, and FBGEMM adds"
    if any(p.run > 1 or p.width is not None for p in program.probes):
        return "its vectors are made of runs and single elements, and FBGEMM adds whole rows"
    return ""


class _Block(NamedTuple):
    """Columns of a group's vectors: the sum of some of its reads.

    Args:
        group, span: which columns.
        reads: place among the group's reads, and of the probes in it.
        features: of the group.
    """

    group: int
    span: tuple[int, int]
    reads: list[tuple[int, list[int]]]
    features: int


def divide(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The table of each feature, as a range of rows: it holds what the feature reads, overlaps no other table, and
    features of one table are neighbours. Rows of two tables would be updated twice.

    >>> divide([(0, 5), (5, 9), (7, 12)])
    [(0, 5), (5, 12), (5, 12)]
    """
    table = list(range(len(ranges)))
    spans = {t: (*r, i, i) for i, (t, r) in enumerate(zip(table, ranges, strict=True))}
    while True:
        count = len(spans)
        # By rows, then by the order of the features: what overlaps becomes one.
        for low, high in ((0, 1), (2, 3)):
            merged: dict[int, tuple[int, int, int, int]] = {}
            names: dict[int, int] = {}
            last = -1
            for t, s in sorted(spans.items(), key=lambda item: item[1][low]):
                touching = merged and s[low] < merged[last][high] + (low == 2)
                if touching:
                    m = merged[last]
                    merged[last] = (min(m[0], s[0]), max(m[1], s[1]), min(m[2], s[2]), max(m[3], s[3]))
                else:
                    merged[t], last = s, t
                names[t] = last
            spans, table = merged, [names[t] for t in table]
        if len(spans) == count:
            return [spans[t][:2] for t in table]


class BagLookup(VectorisedLookup):
    """Runs programs whose vectors are sums of rows; given a gather in place of a reader, as its parent does."""

    def __init__(
        self,
        programs: Sequence[LookupProgram],
        places: Sequence[Mapping[str, Place]],
        keys: Sequence[Any] | None = None,
        optional: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(programs, places, keys, optional)
        self._blocks: dict[str, list[_Block]] = {}
        ranges: dict[str, list[tuple[int, int]]] = {}
        for g, group in enumerate(self.groups):
            spans: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
            for r, s in enumerate(group.sets):
                for position, slot in enumerate(s.slots):
                    found = spans.setdefault(group.template.spans[slot], [])
                    if not found or found[-1][0] != r:
                        found.append((r, []))
                    found[-1][1].append(position)
            for span, reads in sorted(spans.items()):
                storage = group.sets[reads[0][0]].read.storage
                self._blocks.setdefault(storage, []).append(_Block(g, span, reads, len(group.features)))
                for f in group.features:
                    tables = {
                        p.table for p, own in zip(programs[f].probes, programs[f].spans, strict=True) if own == span
                    }
                    starts = [(places[f][t].offset, places[f][t].offset + programs[f].table(t).rows) for t in tables]
                    found_range = (min(a for a, _ in starts), max(b for _, b in starts))
                    ranges.setdefault(storage, []).append(found_range)
        self._tables: dict[str, TableBatch] = {}
        self._whole: dict[str, TableBatch] = {}
        self._starts: dict[str, list[Tensor]] = {}
        for storage, blocks in self._blocks.items():
            start, stop = blocks[0].span
            if (stop - start) % LANES == 0:
                divided = divide(ranges[storage])
                first, rows = [low for low, _ in divided], [high - low for low, high in divided]
                self._tables[storage] = TableBatch(stop - start, first, rows)
                sizes = [b.features for b in blocks]
                self._starts[storage] = [x.view(-1, 1, 1) for x in self._tables[storage].first.split(sizes)]

    def forward(
        self, ids: Sequence[Tensor], local: Sequence[Tensor] | None, gather: Gather | BagReader
    ) -> list[Tensor]:
        """As the parent's; a reader is asked once per storage, for all sums of its rows."""
        if not isinstance(gather, BagReader):
            return super().forward(ids, local, gather)
        where, absent, requests = self._requests(ids, local)
        columns: list[dict[tuple[int, int], Tensor]] = [{} for _ in requests]
        for storage, blocks in self._blocks.items():
            rows = [_picked(b.reads, [r for _, r in requests[b.group]]) for b in blocks]
            factors = [self._factors(b, ids[b.group], where[b.group]) for b in blocks]
            partial = any(
                absent[b.group] is not None or any(s.read.may_be_absent for s in self.groups[b.group].sets)
                for b in blocks
            )
            divided = local is None and storage in self._tables
            tables = self._tables[storage] if divided else self._one(storage, gather.tables[storage])
            starts = self._starts[storage] if divided else None
            sums = gather(storage, _call(tables, rows, factors, starts, partial, local is None))
            sizes = [b.features * (sums.shape[1] // tables.features) for b in blocks] if divided and tables else []
            pieces = sums.split(sizes or [r.numel() // r.shape[-1] for r in rows], 1 if divided else 0)
            for b, r, piece in zip(blocks, rows, pieces, strict=True):
                width = b.span[1] - b.span[0]
                if divided:
                    piece = piece.view(r.shape[0], b.features, width)
                elif local is None:
                    piece = piece.view(b.features, r.shape[0], width).transpose(0, 1)
                columns[b.group][b.span] = piece
        return [self._joined(g, found) for g, found in enumerate(columns)]

    def _one(self, storage: str, weight: Tensor) -> TableBatch | None:
        """The storage as one table; None where the kernels do not take its width."""
        if weight.shape[1] % LANES:
            return None
        if storage not in self._whole:
            self._whole[storage] = TableBatch(weight.shape[1], [0], [weight.shape[0]])
        return self._whole[storage]

    def _factors(self, block: _Block, ids: Tensor, local: Tensor | None) -> Tensor | None:
        """What a block's rows are multiplied by, of their shape; None where that is 1."""
        group = self.groups[block.group]
        sets = [group.sets[r] for r, _ in block.reads]
        if all(s.scale == 1.0 and s.signs is None for s in sets):
            return None
        found = []
        for s in group.sets:
            signs = None if s.signs is None else group._signs(s, ids, local).squeeze(-1).float()
            shape = (*ids.shape, len(s.slots))
            found.append(torch.full(shape, s.scale) if signs is None else signs * s.scale)
        return _picked(block.reads, found)

    def _joined(self, g: int, columns: Mapping[tuple[int, int], Tensor]) -> Tensor:
        parts = [columns[span] for span in sorted(columns)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        padding = self.groups[g].template.padding
        return F.pad(out, (0, padding)) if padding else out


def _picked(reads: Sequence[tuple[int, list[int]]], values: Sequence[Tensor]) -> Tensor:
    """Of values per read ``[..., probes]``, those of a block: ``[..., its rows]``."""
    parts = [values[r] if len(at) == values[r].shape[-1] else values[r][..., at] for r, at in reads]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _call(
    tables: TableBatch | None,
    rows: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    starts: Sequence[Tensor] | None,
    partial: bool,
    single: bool,
) -> BagCall:
    """What to read of a storage, feature after feature where rows are ``[B, features, n]``."""
    ordered = [r.transpose(0, 1) for r in rows] if single else list(rows)
    own = ordered if starts is None else [r - s for r, s in zip(ordered, starts, strict=True)]
    flat = torch.cat([r.reshape(-1) for r in own])
    weights = None
    if any(f is not None for f in factors):
        full = [torch.ones(r.shape) if f is None else f for r, f in zip(rows, factors, strict=True)]
        weights = torch.cat([(f.transpose(0, 1) if single else f).reshape(-1) for f in full])
    if partial:
        present = [r >= 0 for r in ordered]
        lengths = torch.cat([p.sum(-1).reshape(-1) for p in present])
        kept = torch.cat([p.reshape(-1) for p in present])
        flat, weights = flat[kept], None if weights is None else weights[kept]
    else:
        lengths = torch.cat([torch.full((r.numel() // r.shape[-1],), r.shape[-1]) for r in ordered])
    return BagCall(tables, flat, F.pad(lengths.cumsum(0), (1, 0)), weights)
