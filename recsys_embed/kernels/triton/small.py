"""Backward of tables whose rows a batch reads many times: small tables, and arrays that are read in slices.

Gradients are added with atomics to a float32 buffer of the tables' size, and a second kernel updates the touched rows.
Several copies of the buffer reduce contention. The order of additions is not deterministic: with torch's deterministic
algorithms, all rows are sorted instead.
"""

import triton
import triton.language as tl

from recsys_embed.kernels.triton.fields import READ
from recsys_embed.kernels.triton.rules import apply

READ_SIZE = tl.constexpr(len(READ))
BASE = tl.constexpr(READ.index("base"))
ROWS = tl.constexpr(READ.index("rows"))
OWN = tl.constexpr(READ.index("own"))
AT = tl.constexpr(READ.index("at"))
STRIDE = tl.constexpr(READ.index("stride"))
COLUMN = tl.constexpr(READ.index("column"))
NUM_ROWS = tl.constexpr(READ.index("num_rows"))
BUFFER = tl.constexpr(READ.index("buffer"))


@triton.jit(do_not_specialize=["batch", "first_read", "reads_here", "rows", "copies"])
def accumulate(
    found, reads, scales, outer, own, batch, first_read, reads_here, buffer, touched, rows, copies,
    TILE: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add the gradients of TILE samples of one read to ``buffer [copies, rows, WIDTH]``; mark rows ``touched``."""
    tile = tl.program_id(0) // reads_here
    number = first_read + tl.program_id(0) % reads_here
    read = reads + number * READ_SIZE
    sample = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.load(found + number.to(tl.int64) * batch + sample, mask=sample < batch, other=-1).to(tl.int64)
    cols = tl.arange(0, COLS)
    num_rows = tl.load(read + NUM_ROWS)
    mask = (row >= 0)[:, None] & (cols < num_rows * WIDTH)[None, :]
    at = (tl.load(read + AT) // VECTOR * VECTOR) * batch + sample * (tl.load(read + STRIDE) // VECTOR * VECTOR)
    at += tl.load(read + COLUMN) // VECTOR * VECTOR
    place = at[:, None] + cols[None, :]
    if tl.load(read + OWN) != 0:
        grad = tl.load(own + place, mask=mask, other=0.0).to(tl.float32)
    else:
        grad = tl.load(outer + place, mask=mask, other=0.0).to(tl.float32)
    grad *= tl.load(scales + number)
    # Slices wrap around at the table's end.
    local = (row - tl.load(read + BASE))[:, None] + (cols // WIDTH)[None, :]
    size = tl.load(read + ROWS)
    local = tl.where(local >= size, local - size, local) + tl.load(read + BUFFER)
    tl.store(touched + local, tl.full([TILE, COLS], 1, tl.int8), mask=mask)
    to = buffer + ((tile % copies).to(tl.int64) * rows + local) * WIDTH + (cols % WIDTH)[None, :]
    tl.atomic_add(to, grad, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "copies", "seed", "step"])
def update_touched(
    tiles, buffer, touched, rows, copies,
    tensors, numbers, seed, step,
    TILE: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    RULE: tl.constexpr, COUNTS: tl.constexpr, LAST: tl.constexpr, DECAY: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Update the touched rows among TILE; ``tiles [n, 3]``: first row in the buffer and in the storage, count."""
    tile = tiles + tl.program_id(0) * 3
    i = tl.arange(0, TILE)
    here = tl.load(tile).to(tl.int64) + i
    live = i < tl.load(tile + 2)
    live = live & (tl.load(touched + here, mask=live, other=0) != 0)
    cols = tl.arange(0, COLS)
    mask = live[:, None] & (cols < WIDTH)[None, :]
    grad = tl.zeros([TILE, COLS], tl.float32)
    for copy in range(copies):
        grad += tl.load(buffer + (copy * rows + here)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)
    row = tl.load(tile + 1) + i
    apply(row, grad, live, cols, tensors, numbers, seed, step, RULE, WIDTH, COUNTS, LAST, DECAY, CODE)
