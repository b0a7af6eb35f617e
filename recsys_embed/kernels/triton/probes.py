"""What forward and backward share: how a probe finds its row, reads it and weighs it."""

import triton
import triton.language as tl

from recsys_embed.kernels.triton.fields import JOB, PROBE
from recsys_embed.kernels.triton.ids import rows_of, sign_of

JOB_SIZE = tl.constexpr(len(JOB))
IDS = tl.constexpr(JOB.index("ids"))
FEATURE = tl.constexpr(JOB.index("feature"))
FIRST = tl.constexpr(JOB.index("first"))
PROBES = tl.constexpr(JOB.index("probes"))
LIMIT = tl.constexpr(JOB.index("limit"))
OPTIONAL = tl.constexpr(JOB.index("optional"))
OUT = tl.constexpr(JOB.index("out"))
STRIDE = tl.constexpr(JOB.index("stride"))
COLUMN = tl.constexpr(JOB.index("column"))
SPAN = tl.constexpr(JOB.index("span"))
PRODUCT = tl.constexpr(JOB.index("product"))
PLAIN = tl.constexpr(JOB.index("plain"))

PROBE_SIZE = tl.constexpr(len(PROBE))
STORAGE = tl.constexpr(PROBE.index("storage"))
BASE = tl.constexpr(PROBE.index("base"))
ROWS = tl.constexpr(PROBE.index("rows"))
WIDTH = tl.constexpr(PROBE.index("width"))
RUN = tl.constexpr(PROBE.index("run"))
REPEAT = tl.constexpr(PROBE.index("repeat"))
HAS_SIGN = tl.constexpr(PROBE.index("has_sign"))
SIGN = tl.constexpr(PROBE.index("sign"))
KEPT = tl.constexpr(PROBE.index("kept"))
OWN = tl.constexpr(PROBE.index("own"))
READ = tl.constexpr(PROBE.index("read"))
WEIGHT_STORAGE = tl.constexpr(PROBE.index("weight_storage"))
WEIGHT_BASE = tl.constexpr(PROBE.index("weight_base"))
WEIGHT_ROWS = tl.constexpr(PROBE.index("weight_rows"))
WEIGHT_KEPT = tl.constexpr(PROBE.index("weight_kept"))
WEIGHT_OWN = tl.constexpr(PROBE.index("weight_own"))
WEIGHT_READ = tl.constexpr(PROBE.index("weight_read"))
OF = tl.constexpr(PROBE.index("of_kind"))
WEIGHT_OF = tl.constexpr(PROBE.index("weight_of_kind"))

GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))


@triton.jit
def find(x, probe, index, live, KINDS: tl.constexpr):
    """The probe's rows within its table; -1 where there is none, or one that lies outside (damaged arrays)."""
    rows = rows_of(x, probe + OF, index, live, KINDS)
    return tl.where(live & (rows >= 0) & (rows < tl.load(probe + ROWS)), rows, -1)


@triton.jit
def find_weight(x, probe, index, live, KINDS: tl.constexpr):
    """As :func:`find`, of the probe's learned weight."""
    rows = rows_of(x, probe + WEIGHT_OF, index, live, KINDS)
    return tl.where(live & (rows >= 0) & (rows < tl.load(probe + WEIGHT_ROWS)), rows, -1)


@triton.jit
def straight(probe):
    """Whether each row is read as it is: no run of several rows, no element that repeats."""
    return (tl.load(probe + RUN) == 1) & (tl.load(probe + REPEAT) == 0)


@triton.jit
def read_straight(table, rows, probe, cols, span, VECTOR: tl.constexpr):
    """Whole rows as float32 ``[samples, columns]``; zeros where there is none."""
    # A product with VECTOR tells the compiler how addresses are aligned, so that it loads 16 bytes at once.
    width = tl.load(probe + WIDTH) // VECTOR * VECTOR
    at = (tl.load(probe + BASE) + rows) * width
    mask = (rows >= 0)[:, None] & (cols < span)[None, :]
    return tl.load(table + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def run_columns(probe, cols):
    """Which row of a run each column shows, and which of its elements."""
    width = tl.load(probe + WIDTH).to(tl.int32)
    step = tl.where(tl.load(probe + REPEAT) != 0, 0, cols // width)
    return step, tl.where(tl.load(probe + REPEAT) != 0, 0, cols - step * width)


@triton.jit
def read_run(table, rows, probe, cols, span):
    """As :func:`read_straight` for runs, which go on at the table's first row, and for single elements that repeat."""
    step, element = run_columns(probe, cols)
    size = tl.load(probe + ROWS)
    row = rows[:, None] + step[None, :]
    row = tl.where(row >= size, row - size, row)
    at = (tl.load(probe + BASE) + row) * tl.load(probe + WIDTH) + element[None, :]
    mask = (rows >= 0)[:, None] & (cols < span)[None, :]
    return tl.load(table + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def run_signs(x, probe, cols):
    """A sign per element of a run."""
    step, _ = run_columns(probe, cols)
    salts = tl.load(probe + SIGN) + step.to(tl.int64) * GAMMA
    return sign_of(x[:, None], salts[None, :])


@triton.jit
def weighed(value, x, probe, scale, cols, SIGNS: tl.constexpr, RUNS: tl.constexpr):
    """``value`` times the probe's scale and signs."""
    value = value * scale
    if SIGNS:
        if tl.load(probe + HAS_SIGN) != 0:
            if RUNS:
                value = value * run_signs(x, probe, cols)
            else:
                value = value * sign_of(x, tl.load(probe + SIGN))[:, None]
    return value


@triton.jit
def storage(storages, number, like):
    """Pointer to a storage of the element type of ``like``; the caller has checked that it is aligned to 16 bytes."""
    return tl.multiple_of(tl.load(storages + number).to(tl.pointer_type(like.dtype.element_ty)), 16)
