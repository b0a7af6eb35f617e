"""Host code of backward: chooses which rows are sorted, and launches the kernels that sum and update them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_embed.errors import BackendError
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.low_precision_table import stored_rows
from recsys_embed.kernels.triton import rules, segments, small
from recsys_embed.kernels.triton.few_bits import Coding
from recsys_embed.kernels.triton.fields import READ, SMALL, Tables
from recsys_embed.optim import FusedOptimizer, rule_name

# Most sorted reads of a piece, sorted reads per cutting program, and elements per summing program.
_CHUNK, _CUT, _TILE = 64, 1024, 512
# Fewest rows of all copies of a buffer together, and most copies.
_SPREAD, _COPIES = 16384, 32


class Target(NamedTuple):
    """The use of a storage's summed gradients: arguments and constants of ``rules.apply``."""

    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @classmethod
    def step(cls, optimizer: FusedOptimizer, weights: Tensor, state: Mapping[str, Tensor], log: StepLog) -> Target:
        """An optimizer step."""
        kinds = {name: kind for name, kind in optimizer.tensors.items() if name != "last"}
        kept = tuple(state[name] for name in kinds)
        size, eps, decay = float(log.sizes[-1]), float(log.epsilons[-1]), float(optimizer.weight_decay)
        coding, held = Coding.of(weights), stored_rows(weights)
        tensors = rules.Tensors(held, kept, state.get("last", held), held, coding.numbers)
        numbers = rules.Numbers(size, eps, decay, optimizer.constants, coding.distance)
        constants = {"COUNTS": "step" in kinds.values(), "LAST": "last" in state, "DECAY": decay != 0}
        rule = rules.RULES.index(str(rule_name(optimizer)))
        given = {"RULE": rule, "WIDTH": weights.shape[1], "CODE": coding.code, **constants}
        return cls((tensors, numbers, log.seed, log.step), given)

    @classmethod
    def gradient(cls, gradient: Tensor) -> Target:
        """Writes the sums to rows of ``gradient``."""
        constants = {"RULE": rules.GRADIENT.value, "WIDTH": gradient.shape[1]}
        constants |= {"COUNTS": False, "LAST": False, "DECAY": False, "CODE": 0}
        tensors = rules.Tensors(gradient, (), gradient, gradient, gradient)
        return cls((tensors, rules.Numbers(0.0, 0.0, 0.0, ()), 0, 0), constants)


class Source(NamedTuple):
    """Gradients of lookups: those of the outputs, those computed apart, and how reads find theirs."""

    reads: Tensor
    scales: Tensor
    outer: Tensor
    own: Tensor


def _columns(width: int) -> int:
    return 1 << (width - 1).bit_length()


class StorageReads:
    """The reads of one storage: those of large tables, which are sorted, and those of small tables and of slices.

    Args:
        tables: of the programs.
        first, last: range of its reads.
        width: of its rows.
    """

    def __init__(self, tables: Tables, first: int, last: int, width: int) -> None:
        self.first, self.last, self.width = first, last, width
        self._reads = tables.reads[first:last]
        self._scales = tables.read_scales[first:last]
        column = {name: self._reads[:, i] for i, name in enumerate(READ)}
        self.small = first + int((column["path"] != SMALL).sum())
        self._runs = column["num_rows"]
        # Slices start at any column of their outputs.
        vector = math.gcd(8, width, *(int(v) for n in ("at", "stride", "column") for v in column[n]))
        self._constants = {"COLS": _columns(width), "VECTOR": vector}
        self._own = column["own"] != 0
        self._tiles: list[list[int]] = []
        self.buffer_rows = 0
        chosen = {int(r[READ.index("buffer")]): r for r in self._reads[self.small - first :]}
        per_tile = max(1, _TILE // _columns(width))
        for start, read in sorted(chosen.items()):
            base, rows = int(read[READ.index("base")]), int(read[READ.index("rows")])
            self._tiles += [[start + i, base + i, min(per_tile, rows - i)] for i in range(0, rows, per_tile)]
            self.buffer_rows = start + rows
        self._elements = int(self._runs[self.small - first :].sum())
        self._lying: dict[tuple[str, torch.device], tuple[Tensor, ...]] = {}

    def _on(self, name: str, device: torch.device, *arrays: Any) -> tuple[Tensor, ...]:
        """Arrays on a device, copied once."""
        found = self._lying.get((name, device))
        if found is None:
            found = tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)
            self._lying[name, device] = found
        return found

    def run(self, found: Tensor, source: Source, target: Target, all_sorted: bool) -> None:
        """Sum the gradients of rows ``found [reads, B]`` and pass the sums to ``target``."""
        batch = found.shape[1]
        # An array that is read in slices may be far larger than the part that a batch reads.
        all_sorted |= self.buffer_rows > max(_SPREAD, 4 * batch * self._elements)
        if all_sorted:
            self.sort_and_sum(self.all_rows(found), batch, self.all_sources(source), 0, target)
            return
        if self.small > self.first:
            keys = found[self.first : self.small].view(-1)
            self.sort_and_sum(keys, batch, source, self.first, target)
        if self.last > self.small:
            self._accumulate(found, source, target)

    def _all(self, device: torch.device) -> tuple[Tensor, ...]:
        """For every row of every read: the read, the row's number in its slice, and its table's first row and size.

        Then reads that describe the gradients of each such row, and their scales.
        """
        at = np.repeat(np.arange(len(self._runs)), self._runs)
        ahead = np.arange(len(at)) - np.repeat(np.cumsum(self._runs) - self._runs, self._runs)
        reads = self._reads[at]
        reads[:, READ.index("column")] += ahead * self.width
        base, rows = (reads[:, READ.index(n)].astype(np.int32)[:, None] for n in ("base", "rows"))
        return self._on("all", device, at, ahead.astype(np.int32)[:, None], base, rows, reads, self._scales[at])

    def all_rows(self, found: Tensor) -> Tensor:
        """Rows of all reads, those of slices one by one, read by read: int32, -1 for no row."""
        keys = found[self.first : self.last]
        if self._runs.max() > 1:
            which, step, first, size, _, _ = self._all(found.device)
            keys = keys[which]
            keys = torch.where(keys < 0, keys, (keys - first + step) % size + first)
        return keys.reshape(-1)

    def all_sources(self, source: Source) -> Source:
        """Source of the gradients of :meth:`all_rows`."""
        *_, reads, scales = self._all(source.outer.device)
        return source._replace(reads=reads, scales=scales)

    def sort_and_sum(self, keys: Tensor, batch: int, source: Source, first_read: int, target: Target) -> None:
        """Sort rows and pass each distinct row with its sum to ``target``; see :mod:`segments`.

        Args:
            keys: int32 ``[n * batch]``, rows of n reads from ``first_read`` on; -1 for no row.
        """
        keys, order = keys.sort(stable=True)
        self.sum_sorted(keys, order, batch, source, first_read, target)

    def sum_sorted(
        self, keys: Tensor, order: Tensor, batch: int, source: Source, first_read: int, target: Target
    ) -> None:
        """As :meth:`sort_and_sum`, for sorted keys; ``order`` is the permutation that sorted them."""
        count = len(keys)
        if count + _CUT >= 1 << 31:
            raise BackendError("one step reads 2**31 rows of tables of one width; use smaller batches")
        starts, ends = torch.empty_like(keys), torch.empty_like(keys)
        pieces = torch.zeros(1, dtype=torch.int32, device=keys.device)
        segments.cut[(-(-count // _CUT),)](keys, starts, ends, pieces, count, TILE=_CUT, CHUNK=_CHUNK, num_warps=4)
        chunks = -(-count // _CHUNK)
        heads, tails = (torch.empty(chunks, self.width, device=keys.device) for _ in range(2))
        cols, vector = self._constants["COLS"], self._constants["VECTOR"]
        tile = max(1, _TILE // cols)
        segments.sum_pieces[(-(-count // tile),)](
            starts, ends, pieces, keys, order, count, heads, tails, *source, batch, first_read, *target.arguments,
            TILE=tile, COLS=cols, VECTOR=vector, CHUNK=_CHUNK,
            OUTER=bool((~self._own).any()), INNER=bool(self._own.any()), **target.constants, num_warps=2,
        )  # fmt: skip
        segments.join_pieces[(chunks,)](
            keys, count, heads, tails, *target.arguments, TILE=16, COLS=cols, CHUNK=_CHUNK, **target.constants,
            num_warps=1,
        )  # fmt: skip

    def _accumulate(self, found: Tensor, source: Source, target: Target) -> None:
        """Sum in a buffer of the size of the small tables; see :mod:`small`."""
        batch, reads, device = found.shape[1], self.last - self.small, found.device
        copies = max(1, min(_COPIES, _SPREAD // self.buffer_rows))
        buffer = torch.zeros(copies, self.buffer_rows, self.width, device=device)
        touched = torch.zeros(self.buffer_rows, dtype=torch.int8, device=device)
        cols = _columns(self.width * int(self._runs[self.small - self.first :].max()))
        tile = max(1, 2 * _TILE // cols)
        small.accumulate[(-(-batch // tile) * reads,)](
            found, *source, batch, self.small, reads, buffer, touched, self.buffer_rows, copies,
            TILE=tile, COLS=cols, WIDTH=self.width, VECTOR=self._constants["VECTOR"], num_warps=4,
        )  # fmt: skip
        (tiles,) = self._on("tiles", device, np.array(self._tiles, np.int32))
        cols = self._constants["COLS"]
        small.update_touched[(len(tiles),)](
            tiles, buffer, touched, self.buffer_rows, copies, *target.arguments,
            TILE=max(1, _TILE // cols), COLS=cols, **target.constants, num_warps=2,
        )  # fmt: skip


def reads_by_storage(tables: Tables, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, StorageReads]]:
    """Number and reads of each storage."""
    owner = tables.column("reads", "storage")
    spans = [(number, (owner == number).nonzero()[0], width) for number, (_, width) in enumerate(shapes)]
    return [(n, StorageReads(tables, int(at[0]), int(at[-1]) + 1, width)) for n, at, width in spans if len(at)]
