"""Encoding of a trained table, in chunks: one pass finds unused rows and columns, a second encodes the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recsys_embed.core.id_sets import ranks_of, words_of
from recsys_embed.core.precision import BITS, FP8, FP16_MAX, Layout, Search
from recsys_embed.kernels.stored_tables import Part, RowForm, too_many_columns

_ELEMENTS = 1 << 18  # of a chunk: it stays in a processor's cache while it is searched and encoded

Read = Callable[[int, int], Tensor]


@dataclass
class RoundingError:
    """Accumulates rounding errors: largest and root-mean-square error, and the elements' own root mean square.

    >>> error = RoundingError()
    >>> error.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    >>> error.close(2)
    (1.0, 0.707107, 3.53557)
    """

    largest: float = 0.0
    squares: float = 0.0
    values: float = 0.0

    def add(self, wanted: Tensor, got: Tensor) -> None:
        """Add the errors of some elements."""
        self.values += float(torch.linalg.vector_norm(wanted, dtype=torch.float64)) ** 2
        if got is not wanted and got.numel():
            work = torch.promote_types(wanted.dtype, torch.float32)
            off = got.to(work) - wanted.to(work)
            low, high = off.aminmax()
            self.largest = max(self.largest, -float(low), float(high))
            self.squares += float(torch.linalg.vector_norm(off, dtype=torch.float64)) ** 2

    def close(self, elements: int) -> tuple[float, float, float]:
        """Largest, root mean square and the values' root mean square over ``elements``, to six digits, rounded up."""
        count = max(elements, 1)
        return (
            _round_up(self.largest),
            _round_up((self.squares / count) ** 0.5),
            _round_up((self.values / count) ** 0.5),
        )


def _round_up(number: float) -> float:
    """Round up to six digits, because a stated error is an upper bound."""
    rounded = float(f"{number:.6g}")
    return rounded if rounded >= number else float(f"{number * (1 + 1e-5):.6g}")


@dataclass
class Packed:
    """A table with the rows and columns to keep and their encoding.

    Args:
        name: of the table.
        width: of the table.
        part: the one chosen of ``candidates``: everything, the used rows, the used rows and columns.
        read: rows ``[start, stop)`` of the table, on the CPU.
        used: mask of the rows that are not zero, or of one row where all are.
        steps: as ``read``, the steps ``[n, 1]`` at which its integers were trained.
    """

    name: str
    width: int
    part: Part
    read: Read
    used: Tensor
    candidates: tuple[Part, Part, Part]
    steps: Read | None = None
    error: RoundingError = field(default_factory=RoundingError)

    @property
    def kept(self) -> Tensor | None:
        """Mask of the kept rows; None for all."""
        return None if self.part.form == "all" else self.used

    def arrays(self) -> dict[str, Tensor]:
        """Index arrays of the kept rows, by the last part of their name."""
        if self.kept is None or self.part.form in ("all", "range"):
            return {}
        if self.part.form == "sorted":
            return {"values": self.kept.nonzero().squeeze(1).to(torch.int32)}
        words = pack_bits(self.kept)
        return {"words": words, "ranks": ranks_of(words)}

    def stored(self, search: Search) -> Iterator[Tensor]:
        """Encoded rows in chunks; accumulates their errors."""
        layout = self.part.layout
        columns = None if self.part.columns is None else torch.tensor(self.part.columns)
        for values in self._kept_rows(layout.block):
            step = None
            if self.steps is not None:
                values, step = values[:, :-1], values[:: layout.block, -1:]
            values = values if columns is None else values[:, columns]
            stored = layout.encode(values, search, step).contiguous()
            exact = layout.dtype == values.dtype
            self.error.add(values, values if exact else layout.decode(stored)[: len(values)])
            yield stored

    def _kept_rows(self, block: int) -> Iterator[Tensor]:
        """Kept rows, before their steps, in chunks of full blocks; only the last may end with a partial block."""
        pending: Tensor | None = None
        for start, stop in chunks(self.part.rows, self.width):
            values = self.read(start, stop)
            if self.steps is not None:
                values = torch.cat([values, self.steps(start, stop)], 1)
            if self.kept is not None:
                values = values[self.kept[start:stop]]
            pending = values if pending is None or not len(pending) else torch.cat([pending, values])
            whole = len(pending) // block * block
            if whole:
                yield pending[:whole]
                pending = pending[whole:]
        if pending is not None and len(pending):
            yield pending


def chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are processed together."""
    size = max(1, _ELEMENTS // max(width, 1))
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def pack_bits(mask: Tensor) -> Tensor:
    """Bits of a boolean mask ``[n]`` as int64 words ``[words_of(n)]``.

    >>> pack_bits(torch.tensor([True, False, True])).tolist()
    [5]
    """
    words = torch.zeros(words_of(len(mask)), dtype=torch.int64)
    places = torch.arange(64)
    for start, stop in chunks(len(words), 64):
        bits = mask[start * 64 : stop * 64].long()
        bits = torch.nn.functional.pad(bits, (0, (stop - start) * 64 - len(bits)))
        words[start:stop] = (bits.view(-1, 64) << places).sum(1)
    return words


def inspect_table(
    name: str,
    read: Read,
    rows: int,
    width: int,
    dtype: torch.dtype,
    precision: str,
    prune: bool,
    per_scale: int = 1,
) -> tuple[Packed, list[str]]:
    """Find the rows and columns of a table that are not zero, and the faults that rule out this precision.

    Rows and columns of zeros are dropped where that saves more bytes than the index of the others takes.

    Args:
        read: rows ``[start, stop)`` of the table, on the CPU.
        per_scale: rows that share a scale at least.
    """
    used = torch.zeros(rows, dtype=torch.bool)
    columns = torch.zeros(width, dtype=torch.bool)
    broken, first, largest = 0, 0, 0.0
    for start, stop in chunks(rows, width):
        values = read(start, stop)
        # NaN and infinity propagate through both maxima, so these suffice to detect them.
        sizes = values.abs()
        highest = sizes.amax(1)
        wrong = ~torch.isfinite(highest)
        if wrong.any():
            first = start + int(wrong.nonzero()[0]) if not broken else first
            broken += int(wrong.sum())
            continue
        largest = max(largest, float(highest.max()))
        used[start:stop] = highest != 0
        columns |= sizes.amax(0) != 0
    faults = []
    if broken:
        faults.append(f"table {name!r} holds NaN or infinite values in {broken} rows, the first of them row {first}")
    elif largest > FP16_MAX and (precision in BITS or precision in ("fp16", FP8)):
        what = "keeps scale and bias in fp16," if precision in BITS else "keeps"
        faults.append(
            f"table {name!r} holds values up to {largest:.3g}; {precision} {what} at most {FP16_MAX:.0f}: use bf16 or "
            "fp32"
        )
    if not used.any():
        used[0] = True
    if not columns.any():
        columns[0] = True
    layout = Layout.of(width, precision, dtype, rows, per_scale)
    candidates = (
        _candidate_parts(layout, dtype, used, columns, per_scale)
        if prune and not faults
        else (Part(rows, layout, "all", 0, rows),) * 3
    )
    return Packed(name, width, candidates[0], read, used, candidates), faults


def _candidate_parts(
    layout: Layout, dtype: torch.dtype, used: Tensor, columns: Tensor, per_scale: int
) -> tuple[Part, Part, Part]:
    """The full table, the smallest form without zero rows, and the smallest without zero rows and columns."""
    rows, count = len(used), int(used.sum())
    whole = Part(rows, layout, "all", 0, rows)
    first = int(used.nonzero()[0])
    if count < rows:
        layout = Layout.of(layout.width, layout.kind, dtype, count, per_scale)
    if used[first : first + count].all():
        forms: list[tuple[RowForm, int]] = [("range", first)]
    else:
        forms = [("bitmap", 0), ("sorted", 0)]
    fewer = [whole]
    if count < rows:
        fewer += [Part(rows, layout, form, start, count) for form, start in forms]
    narrower = fewer
    if not columns.all():
        some = tuple(int(c) for c in columns.nonzero().squeeze(1))
        kept = [Layout.of(len(some), layout.kind, dtype, p.count, per_scale) for p in fewer]
        narrower = fewer + [Part(rows, k, p.form, p.start, p.count, some) for k, p in zip(kept, fewer, strict=True)]
    return whole, min(fewer, key=_cost), min(narrower, key=_cost)


def choose_parts(tables: list[Packed]) -> None:
    """Choose one form for all tables of a storage: rows and columns are dropped if that saves 1 % of it, and 1 KiB.

    Reading full tables is faster than reading through an index, which is faster than reading scattered columns.
    """
    whole, fewer, narrower = (sum(_cost(t.candidates[i]) for t in tables) for i in range(3))
    worth = max(1024, whole // 100)
    chosen = 1 if whole - fewer >= worth else 0
    if (fewer if chosen else whole) - narrower >= worth:
        chosen = 2
    parts = [t.candidates[chosen] for t in tables]
    # Steps that rows have learned are no scales of blocks of rows.
    if too_many_columns(parts) or any(
        t.steps is not None and part.columns is not None and part.layout.block > 1
        for t, part in zip(tables, parts, strict=True)
    ):
        chosen = 1
    for table in tables:
        table.part = table.candidates[chosen]


def _cost(part: Part) -> int:
    """Bytes, including those of the list of columns."""
    return part.nbytes + part.index_bytes + (0 if part.columns is None else 8 * len(part.columns))
