"""Device functions for forward and backward: how a row lookup finds its row, reads it and multiplies it."""

import triton
import triton.language as tl

from recsys_embed.kernels.triton.few_bits import read_elements
from recsys_embed.kernels.triton.fields import JOB, ROW_LOOKUP
from recsys_embed.kernels.triton.ids import rows_of, sign_of

JOB_SIZE = tl.constexpr(len(JOB))
IDS = tl.constexpr(JOB.index("ids"))
FEATURE = tl.constexpr(JOB.index("feature"))
FIRST = tl.constexpr(JOB.index("first"))
ROW_LOOKUPS = tl.constexpr(JOB.index("row_lookups"))
LIMIT = tl.constexpr(JOB.index("limit"))
OPTIONAL = tl.constexpr(JOB.index("optional"))
OUT = tl.constexpr(JOB.index("out"))
STRIDE = tl.constexpr(JOB.index("stride"))
COLUMN = tl.constexpr(JOB.index("column"))
SPAN = tl.constexpr(JOB.index("span"))
PRODUCT = tl.constexpr(JOB.index("product"))
PLAIN = tl.constexpr(JOB.index("plain"))

ROW_LOOKUP_SIZE = tl.constexpr(len(ROW_LOOKUP))
STORAGE = tl.constexpr(ROW_LOOKUP.index("storage"))
BASE = tl.constexpr(ROW_LOOKUP.index("base"))
ROWS = tl.constexpr(ROW_LOOKUP.index("rows"))
WIDTH = tl.constexpr(ROW_LOOKUP.index("width"))
NUM_ROWS = tl.constexpr(ROW_LOOKUP.index("num_rows"))
REPEAT = tl.constexpr(ROW_LOOKUP.index("repeat"))
HAS_SIGN = tl.constexpr(ROW_LOOKUP.index("has_sign"))
SIGN = tl.constexpr(ROW_LOOKUP.index("sign"))
KEPT = tl.constexpr(ROW_LOOKUP.index("kept"))
OWN = tl.constexpr(ROW_LOOKUP.index("own"))
READ = tl.constexpr(ROW_LOOKUP.index("read"))
WEIGHT_STORAGE = tl.constexpr(ROW_LOOKUP.index("weight_storage"))
WEIGHT_BASE = tl.constexpr(ROW_LOOKUP.index("weight_base"))
WEIGHT_ROWS = tl.constexpr(ROW_LOOKUP.index("weight_rows"))
WEIGHT_KEPT = tl.constexpr(ROW_LOOKUP.index("weight_kept"))
WEIGHT_OWN = tl.constexpr(ROW_LOOKUP.index("weight_own"))
WEIGHT_READ = tl.constexpr(ROW_LOOKUP.index("weight_read"))
OF = tl.constexpr(ROW_LOOKUP.index("of_kind"))
WEIGHT_OF = tl.constexpr(ROW_LOOKUP.index("weight_of_kind"))

GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))


@triton.jit
def find(x, row_lookup, index, live, KINDS: tl.constexpr):
    """The row lookup's rows within its table; -1 for no row, and for rows outside the table (damaged arrays)."""
    rows = rows_of(x, row_lookup + OF, index, live, KINDS)
    return tl.where(live & (rows >= 0) & (rows < tl.load(row_lookup + ROWS)), rows, -1)


@triton.jit
def find_weight(x, row_lookup, index, live, KINDS: tl.constexpr):
    """As :func:`find`, of the row lookup's learned weight."""
    rows = rows_of(x, row_lookup + WEIGHT_OF, index, live, KINDS)
    return tl.where(live & (rows >= 0) & (rows < tl.load(row_lookup + WEIGHT_ROWS)), rows, -1)


@triton.jit
def straight(row_lookup):
    """Whether one whole row is read: no slice of several rows, no broadcast element."""
    return (tl.load(row_lookup + NUM_ROWS) == 1) & (tl.load(row_lookup + REPEAT) == 0)


@triton.jit
def read_straight(table, rows, row_lookup, cols, span, VECTOR: tl.constexpr):
    """Whole rows as float32 ``[samples, columns]``; zeros for absent rows."""
    # Multiplying by VECTOR tells the compiler the alignment, so that it loads 16 bytes at once.
    width = tl.load(row_lookup + WIDTH) // VECTOR * VECTOR
    at = (tl.load(row_lookup + BASE) + rows) * width
    mask = (rows >= 0)[:, None] & (cols < span)[None, :]
    return tl.load(table + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def slice_columns(row_lookup, cols):
    """The row of a slice that each column reads, and the element of that row."""
    width = tl.load(row_lookup + WIDTH).to(tl.int32)
    step = tl.where(tl.load(row_lookup + REPEAT) != 0, 0, cols // width)
    return step, tl.where(tl.load(row_lookup + REPEAT) != 0, 0, cols - step * width)


@triton.jit
def read_coded(storages, formats, distances, rows, row_lookup, cols, span, SLICES: tl.constexpr):
    """As :func:`read_straight` and :func:`read_slice`, of storages some of which train in few bits."""
    number = tl.load(row_lookup + STORAGE)
    width = tl.load(row_lookup + WIDTH)
    row = rows[:, None] + cols[None, :] * 0
    element = (cols[None, :] + rows[:, None] * 0).to(tl.int64)
    if SLICES:
        size = tl.load(row_lookup + ROWS)
        step, place = slice_columns(row_lookup, cols)
        ahead = row + step[None, :]
        whole = straight(row_lookup)
        row = tl.where(whole, row, tl.where(ahead >= size, ahead - size, ahead))
        element = tl.where(whole, element, place[None, :].to(tl.int64))
    mask = (rows >= 0)[:, None] & (cols < span)[None, :]
    row = (row + tl.load(row_lookup + BASE)).to(tl.int64)
    return read_elements(storages, formats, distances, number, row, element, width, mask)


@triton.jit
def read_slice(table, rows, row_lookup, cols, span):
    """As :func:`read_straight`, for slices, which wrap around at the table's end, and for broadcast elements."""
    step, element = slice_columns(row_lookup, cols)
    size = tl.load(row_lookup + ROWS)
    row = rows[:, None] + step[None, :]
    row = tl.where(row >= size, row - size, row)
    at = (tl.load(row_lookup + BASE) + row) * tl.load(row_lookup + WIDTH) + element[None, :]
    mask = (rows >= 0)[:, None] & (cols < span)[None, :]
    return tl.load(table + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def slice_signs(x, row_lookup, cols):
    """A sign per row of a slice."""
    step, _ = slice_columns(row_lookup, cols)
    salts = tl.load(row_lookup + SIGN) + step.to(tl.int64) * GAMMA
    return sign_of(x[:, None], salts[None, :])


@triton.jit
def weighed(value, x, row_lookup, scale, cols, SIGNS: tl.constexpr, SLICES: tl.constexpr):
    """``value`` times the row lookup's scale and signs."""
    value = value * scale
    if SIGNS:
        if tl.load(row_lookup + HAS_SIGN) != 0:
            if SLICES:
                value = value * slice_signs(x, row_lookup, cols)
            else:
                value = value * sign_of(x, tl.load(row_lookup + SIGN))[:, None]
    return value


@triton.jit
def storage(storages, number, like):
    """Pointer to a storage of the element type of ``like``; the caller has checked that it is aligned to 16 bytes."""
    return tl.multiple_of(tl.load(storages + number).to(tl.pointer_type(like.dtype.element_ty)), 16)
