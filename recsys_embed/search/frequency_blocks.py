"""Ids of a data set by how often they occur, and blocks of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys_embed.data.batch import as_batch
from recsys_embed.data.data_source import BatchSource, DataSource
from recsys_embed.features import Schema

_RANKED = 0.98
"""Ids count as numbered by falling frequency if this fraction of the ideal coverage is reached, see `is_ranked`."""


def id_counts(data: DataSource, schema: Schema) -> list[Tensor]:
    """How often each id of each table occurs in training: int64 ``[num_ids]`` per table; of all features that read it.

    As the data set knows it; one that does not is read once. Data folders tell for each feature the counts of its whole
    vocabulary, other data sets those of the feature.
    """
    known = getattr(data, "counts", None)
    found: list[Tensor] = []
    for spec in schema.first_readers:
        counts = None if known is None else _of_table([known(s.name) for s in schema.by_table[spec.table_name]])
        if counts is None:
            return count_ids(data, schema)
        found.append(pad(counts, (0, spec.num_ids - len(counts))))
    return found


def _of_table(counts: Sequence[Tensor | None]) -> Tensor | None:
    """Counts of a table from those of its features; None where some are not known."""
    known = [c for c in counts if c is not None]
    if len(known) < len(counts):
        return None
    if all(torch.equal(c, known[0]) for c in known):
        return known[0]
    total = torch.zeros(max(map(len, known)), dtype=torch.int64)
    for c in known:
        total[: len(c)] += c
    return total


def count_ids(data: BatchSource, schema: Schema, split: str = "train", batch_size: int = 1 << 16) -> list[Tensor]:
    """How often each id of each table occurs in a split: int64 ``[num_ids]`` per table; one pass."""
    counts = {table: torch.zeros(readers[0].num_ids, dtype=torch.int64) for table, readers in schema.by_table.items()}
    for batch in data.batches(split, batch_size, shuffle=False):
        parts = as_batch(batch)
        for number, spec in enumerate(schema):
            counts[spec.table_name] += torch.bincount(parts.feature(number), minlength=spec.num_ids)
    return list(counts.values())


def is_ranked(counts: Tensor) -> bool:
    """Whether ids are numbered by falling frequency, near enough that their number may stand for their rank.

    >>> is_ranked(torch.tensor([50, 60, 40, 20, 10])), is_ranked(torch.tensor([1, 2, 3, 9]))
    (True, False)
    """
    if len(counts) < 2:
        return True
    best = counts.sort(descending=True).values.cumsum(0).double()
    # Areas under the two curves of coverage, so that no single head decides.
    return bool(counts.cumsum(0).double().sum() >= _RANKED * best.sum())


def order_of(counts: Tensor) -> Tensor | None:
    """Ids by falling count, ties by number; None where the numbers are that order already."""
    return None if is_ranked(counts) else counts.argsort(descending=True, stable=True)


def cut(counts: Tensor, blocks: int, balance: str) -> list[int]:
    """Ids of each of at most ``blocks`` blocks of ``counts``, which fall; no block is empty.

    Args:
        counts: how often each id occurs, most frequent first.
        blocks: at most so many.
        balance: ``"mass"`` for equal shares of the lookups, ``"count"`` for equally many ids.

    >>> cut(torch.tensor([8, 4, 2, 1, 1]), 2, "mass"), cut(torch.tensor([8, 4, 2, 1, 1]), 2, "count")
    ([1, 4], [3, 2])
    """
    n = len(counts)
    marks = torch.arange(1, blocks, dtype=torch.float64) / blocks
    if balance == "count" or not counts.any():
        edges = (marks * n).ceil().long().tolist()
    else:
        mass = counts.double().cumsum(0)
        # An id that reaches over a mark belongs to the block before it.
        edges = (torch.searchsorted(mass, marks * mass[-1]) + 1).tolist()
    kept = [e for e in sorted(set(edges)) if 0 < e < n]
    return [b - a for a, b in zip([0, *kept], [*kept, n], strict=True)]


def block_sizes(counts: Sequence[Tensor], blocks: int, scope: str, balance: str) -> list[list[int]]:
    """Ids of each block of each feature, most frequent first; in scope ``"global"`` some are 0.

    Args:
        counts: of each feature's ids.
        blocks: at most so many.
        scope: ``"field"``: every feature is cut by itself; ``"global"``: all ids together are.
        balance: see :func:`cut`.
    """
    ordered = [c.sort(descending=True).values for c in counts]
    if scope == "field":
        return [cut(c, blocks, balance) for c in ordered]
    joined, place = torch.cat(ordered).sort(descending=True, stable=True)
    field = torch.repeat_interleave(torch.arange(len(ordered)), torch.tensor([len(c) for c in ordered]))[place]
    found = []
    for part in field.split(cut(joined, blocks, balance)):
        found.append(torch.bincount(part, minlength=len(ordered)))
    return torch.stack(found, 1).tolist()


def block_maps(counts: Sequence[Tensor], sizes: Sequence[Sequence[int]], scope: str) -> list[Tensor]:
    """Block of every id of every feature, as a :class:`DnisLayer` numbers them."""
    maps, first = [], 0
    for found, row in zip(counts, sizes, strict=True):
        by_rank = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(list(row)))
        order = order_of(found)
        block = by_rank if order is None else torch.empty_like(by_rank).index_copy_(0, order, by_rank)
        maps.append(block + (first if scope == "field" else 0))
        first += len(row)
    return maps
