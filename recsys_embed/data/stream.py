"""Batches of rows that do not fit in memory: chunks are read in windows, and each window is shuffled by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from recsys_embed.data.batch import Batch, InMemoryDataset, permutation

Chunk = tuple[int, int]
"""A range of rows: first row, and the one after the last."""


def windows(chunks: Sequence[Chunk], buffer_rows: int, order: tuple[int, int] | None) -> list[list[Chunk]]:
    """Chunks grouped into windows of at most ``buffer_rows`` rows.

    Args:
        chunks: in file order.
        buffer_rows: rows that are shuffled together; a larger chunk is a window of its own.
        order: seed and epoch that chunks are shuffled by; None: file order.
    """
    if order is not None:
        chunks = [chunks[i] for i in permutation(len(chunks), *order).tolist()]
    found: list[list[Chunk]] = []
    size = 0
    for start, stop in chunks:
        if not found or size + stop - start > buffer_rows:
            found.append([])
            size = 0
        found[-1].append((start, stop))
        size += stop - start
    return found


def stream(
    read: Callable[[int, int], Batch],
    parts: Sequence[Sequence[Chunk]],
    batch_size: int,
    start_batch: int,
    count: int,
    order: tuple[int, int] | None,
) -> Iterator[Batch]:
    """Cut windows into batches; windows before the first batch wanted are not read.

    Args:
        read: rows of a chunk.
        parts: windows of chunks, see :func:`windows`.
        batch_size: rows per batch; a batch may take rows of two windows.
        start_batch: first batch to yield.
        count: batches to yield; a last one of fewer rows is left out where it is not among them.
        order: seed and epoch that rows of a window are shuffled by; None: file order.
    """
    skip = start_batch * batch_size
    left: Batch | None = None
    made = 0
    for number, window in enumerate(parts):
        rows = sum(stop - start for start, stop in window)
        if skip >= rows:
            skip -= rows
            continue
        pieces = [read(start, stop) for start, stop in window]
        held = InMemoryDataset.of(Batch.cat(pieces))
        del pieces
        if order is None:
            places = torch.arange(rows)
        else:
            seed, epoch = order
            places = permutation(rows, seed, epoch * len(parts) + number + (1 << 40))
        places = places[skip:]
        skip = 0
        at = 0
        while at < len(places):
            take = batch_size - (left.num_rows if left else 0)
            piece = held.rows(places[at : at + take])
            at += take
            left = Batch.cat([left, piece]) if left else piece
            if left.num_rows == batch_size:
                yield left
                made += 1
                left = None
    if left is not None and made < count:
        yield left


def moments_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from rows, sums and sums of squares: float32 ``[columns]`` each."""
    rows, (total, squares) = sums[0].clamp_min(1), sums[1:].chunk(2)
    mean = total / rows
    return mean.float(), (squares / rows - mean.square()).clamp_min(0).sqrt().float()
