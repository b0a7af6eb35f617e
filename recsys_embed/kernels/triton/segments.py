"""Backward by sorted rows: the gradients of each row are summed in order of occurrence, then the row is updated once.

Sorted reads are cut into *pieces* where the row changes and at every multiple of CHUNK. A piece with all reads of a row
ends in the optimizer's step; others write a partial sum per chunk, and a second kernel adds these. Each row belongs to
one program, there are no atomics on values, and sums have a fixed order, so results are deterministic.

For example, with CHUNK = 4 the sorted rows ``2 2 5 5 | 5 5 5 5 | 5 7 8 8`` make the pieces ``22``, ``55``, ``5555``,
``5``, ``7`` and ``88``. Rows 2, 7 and 8 are whole pieces and are updated at once. The sum of row 5 in the first
chunk goes to ``tails``, those in the other two to ``heads``; the second kernel adds the three.
"""

import triton
import triton.language as tl

from recsys_embed.kernels.triton.fields import READ
from recsys_embed.kernels.triton.rules import apply

READ_SIZE = tl.constexpr(len(READ))
OWN = tl.constexpr(READ.index("own"))
AT = tl.constexpr(READ.index("at"))
STRIDE = tl.constexpr(READ.index("stride"))
COLUMN = tl.constexpr(READ.index("column"))


@triton.jit(do_not_specialize=["count"])
def cut(keys, starts, ends, number, count, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Starts and ends of pieces among ``count`` sorted ``keys``, and their ``number``; absent rows (-1) form none.

    Pieces of one tile are contiguous; the order of tiles is arbitrary and does not matter.
    """
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = i < count
    key = tl.load(keys + i, mask=live, other=-1)
    before = tl.load(keys + i - 1, mask=live & (i > 0), other=-1)
    # Chunks bound the length of pieces, and with it the loop over one, however often a row is read.
    opens = live & (key >= 0) & ((key != before) | (i % CHUNK == 0))
    after = tl.load(keys + i + 1, mask=i + 1 < count, other=-1)
    closes = live & (key >= 0) & ((key != after) | ((i + 1) % CHUNK == 0))
    place = tl.cumsum(opens.to(tl.int32), 0) - 1
    first = tl.atomic_add(number, tl.sum(opens.to(tl.int32), 0))
    # Pieces do not cross tiles, so the piece that ends here is the last that started.
    tl.store(starts + first + place, i, mask=opens)
    tl.store(ends + first + place, i + 1, mask=closes)


@triton.jit
def _gradients(position, live, batch, reads, scales, outer, own, cols, first_read,
               WIDTH: tl.constexpr, VECTOR: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    """Gradients ``[n, columns]`` of lookups, numbered read by read."""
    number = first_read + position // batch
    sample = (position % batch).to(tl.int64)
    read = reads + number * READ_SIZE
    # Dividing and multiplying by VECTOR changes no value; it tells the compiler that loads are aligned.
    at = tl.load(read + AT, mask=live, other=0) // VECTOR * VECTOR * batch
    at += sample * (tl.load(read + STRIDE, mask=live, other=0) // VECTOR * VECTOR)
    at += tl.load(read + COLUMN, mask=live, other=0) // VECTOR * VECTOR
    place = at[:, None] + cols[None, :]
    inside = (cols < WIDTH)[None, :]
    if OUTER and INNER:
        mine = tl.load(read + OWN, mask=live, other=0) != 0
        value = tl.load(outer + place, mask=(live & ~mine)[:, None] & inside, other=0.0).to(tl.float32)
        value += tl.load(own + place, mask=(live & mine)[:, None] & inside, other=0.0)
    elif OUTER:
        value = tl.load(outer + place, mask=live[:, None] & inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(own + place, mask=live[:, None] & inside, other=0.0)
    return value * tl.load(scales + number, mask=live, other=0.0)[:, None]


@triton.jit(do_not_specialize=["count", "batch", "first_read", "seed", "step"])
def sum_pieces(
    starts, ends, number, keys, order, count, heads, tails,
    reads, scales, outer, own, batch, first_read,
    tensors, numbers, seed, step,
    TILE: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, RULE: tl.constexpr, COUNTS: tl.constexpr, LAST: tl.constexpr,
    DECAY: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Sum TILE pieces; complete rows are updated, partial sums go to ``heads`` or ``tails [chunks, WIDTH]``."""
    piece = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.load(number)
    if tl.program_id(0) * TILE >= total:
        return
    live = piece < total
    start = tl.load(starts + piece, mask=live, other=0)
    end = tl.load(ends + piece, mask=live, other=0)
    row = tl.load(keys + start, mask=live, other=-1)
    # Whether the row continues in the next chunk, and whether it began in an earlier one.
    goes_on = tl.load(keys + end, mask=live & (end < count), other=-1) == row
    began = tl.load(keys + start - 1, mask=live & (start > 0), other=-1) == row
    cols = tl.arange(0, COLS)
    length = tl.max(end - start, 0)
    grad = tl.zeros([TILE, COLS], tl.float32)
    for t in range(length):
        at = start + t
        here = live & (at < end)
        position = tl.load(order + at, mask=here, other=0).to(tl.int32)
        grad += _gradients(position, here, batch, reads, scales, outer, own, cols, first_read,
                           WIDTH, VECTOR, OUTER, INNER)  # fmt: skip
    whole = live & ~goes_on & ~began
    apply(row, grad, whole, cols, tensors, numbers, seed, step, RULE, WIDTH, COUNTS, LAST, DECAY, CODE)
    # Per chunk, at most one piece started earlier and at most one continues, so each has one place per chunk.
    place = (start // CHUNK).to(tl.int64)[:, None] * WIDTH + cols[None, :]
    inside = (cols < WIDTH)[None, :]
    tl.store(heads + place, grad, mask=(live & began)[:, None] & inside)
    tl.store(tails + place, grad, mask=(live & goes_on & ~began)[:, None] & inside)


@triton.jit(do_not_specialize=["count", "seed", "step"])
def join_pieces(
    keys, count, heads, tails,
    tensors, numbers, seed, step,
    TILE: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    RULE: tl.constexpr, COUNTS: tl.constexpr, LAST: tl.constexpr, DECAY: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Sum over all chunks and update of the row that starts in this chunk and continues in the next, if any."""
    chunk = tl.program_id(0)
    border = (chunk + 1) * CHUNK
    if border >= count:
        return
    row = tl.load(keys + border - 1)
    if row < 0:
        return
    if tl.load(keys + border) != row:
        return
    # A row that started in an earlier chunk belongs to the program of that chunk.
    if chunk > 0:
        if tl.load(keys + chunk * CHUNK - 1) == row:
            return
    cols = tl.arange(0, COLS)
    inside = cols < WIDTH
    total = tl.load(tails + chunk.to(tl.int64) * WIDTH + cols, mask=inside, other=0.0)
    at = chunk + 1
    more = True
    while more:
        part = at + tl.arange(0, TILE)
        # Rows are sorted, so the chunks that begin with this row are the next ones.
        key = tl.load(keys + part * CHUNK, mask=part * CHUNK < count, other=-1)
        same = key == row
        place = part.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        total += tl.sum(tl.load(heads + place, mask=same[:, None] & inside[None, :], other=0.0), 0)
        more = tl.min(same.to(tl.int32), 0) > 0
        at += TILE
    one = tl.zeros([1], tl.int32)
    apply(
        one + row, total[None, :], one == 0, cols, tensors, numbers, seed, step, RULE, WIDTH, COUNTS, LAST, DECAY, CODE
    )
