"""Lookups by FBGEMM's batched tables: every feature a table, every vector a sum of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import BackendError, raise_faults
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.bag_rows import Block, Rows, call, divide, picked
from recsys_embed.kernels.bag_step import BagReader
from recsys_embed.kernels.fbgemm import LANES, TableBatch
from recsys_embed.kernels.vectorised import Gather, Place, VectorisedLookup
from recsys_embed.optim import FusedOptimizer


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
    elif optimizer is not None and (optimizer.lazy or optimizer.weight_decay):
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
        self._blocks: dict[str, list[Block]] = {}
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
                storage, *others = {group.sets[r].read.storage for r, _ in reads}
                if others:
                    raise BackendError(
                        f"backend 'fbgemm' adds rows of one storage; these lie in {storage} and {others}"
                    )
                self._blocks.setdefault(storage, []).append(Block(g, span, reads, len(group.features)))
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
                self._starts[storage] = [*self._tables[storage].first.split(sizes)]

    def forward(
        self, ids: Sequence[Tensor], local: Sequence[Tensor] | None, gather: Gather | BagReader
    ) -> list[Tensor]:
        """As the parent's; a reader is asked once per storage, for all sums of its rows."""
        if not isinstance(gather, BagReader):
            return super().forward(ids, local, gather)
        return self._sums(ids, local, gather, None if local is None else ())

    def pooled(
        self,
        ids: Sequence[Tensor],
        local: Sequence[Tensor],
        reader: BagReader,
        offsets: Sequence[Tensor],
        factors: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Per group, the sums over bags of combined vectors: ``[B, features of the group, combined_width]``.

        Args:
            ids, local: as :meth:`forward` has them with ``local``, feature after feature.
            offsets: per group ``[features of the group * B + 1]``.
            factors: per group ``[n]``, what the vector of each id is multiplied by; None for 1.
        """
        return self._sums(ids, local, reader, list(zip(offsets, factors, strict=True)))

    def _sums(
        self,
        ids: Sequence[Tensor],
        local: Sequence[Tensor] | None,
        reader: BagReader,
        bags: Sequence[tuple[Tensor, Tensor | None]] | None,
    ) -> list[Tensor]:
        """Of single ids where ``bags`` is None; of bags; or, where it is empty, a vector for each id of ``local``."""
        where, absent, requests = self._requests(ids, local)
        columns: list[dict[tuple[int, int], Tensor]] = [{} for _ in requests]
        for storage, blocks in self._blocks.items():
            divided = storage in self._tables and (bags is None or len(bags) > 0)
            tables = self._tables[storage] if divided else self._one(storage, reader.tables[storage])
            found = []
            for i, b in enumerate(blocks):
                rows = picked(b.reads, [r for _, r in requests[b.group]])
                factors = self._factors(b, ids[b.group], where[b.group])
                offsets, start = None, self._starts[storage][i] if divided else None
                if bags is None:
                    rows, factors = rows.transpose(0, 1), None if factors is None else factors.transpose(0, 1)
                    start = None if start is None else start.view(-1, 1, 1)
                elif bags:
                    (offsets, each), of = bags[b.group], where[b.group]
                    start = None if start is None or of is None else start[of].unsqueeze(1)
                    if each is not None:
                        each = each.unsqueeze(1).expand(rows.shape)
                        factors = each if factors is None else factors * each
                found.append(Rows(rows, start, factors, offsets))
            partial = any(
                absent[b.group] is not None or any(s.read.may_be_absent for s in self.groups[b.group].sets)
                for b in blocks
            )
            sums = reader(storage, call(tables, found, partial))
            width = blocks[0].span[1] - blocks[0].span[0]
            if bags is not None and not bags:
                pieces = sums.split([r.rows.shape[0] for r in found])
            elif divided:
                flat = sums.split([b.features * width for b in blocks], 1)
                pieces = [f.view(len(sums), b.features, width) for b, f in zip(blocks, flat, strict=True)]
            else:
                batch = len(sums) // sum(b.features for b in blocks)
                flat = sums.split([b.features * batch for b in blocks])
                pieces = [f.view(b.features, batch, width).transpose(0, 1) for b, f in zip(blocks, flat, strict=True)]
            for b, piece in zip(blocks, pieces, strict=True):
                columns[b.group][b.span] = piece
        return [self._joined(g, found) for g, found in enumerate(columns)]

    def _one(self, storage: str, weight: Tensor) -> TableBatch | None:
        """The storage as one table; None where the kernels do not take its width."""
        if weight.shape[1] % LANES:
            return None
        if storage not in self._whole:
            self._whole[storage] = TableBatch(weight.shape[1], [0], [weight.shape[0]])
        return self._whole[storage]

    def _factors(self, block: Block, ids: Tensor, local: Tensor | None) -> Tensor | None:
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
        return picked(block.reads, found)

    def _joined(self, g: int, columns: Mapping[tuple[int, int], Tensor]) -> Tensor:
        parts = [columns[span] for span in sorted(columns)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        padding = self.groups[g].template.padding
        return F.pad(out, (0, padding)) if padding else out
