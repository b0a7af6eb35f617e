"""Gradients of rows that forward multiplied by something: signs, learned weights, other rows."""

import triton
import triton.language as tl

from recsys_embed.kernels.triton import row_lookups as p
from recsys_embed.kernels.triton.row_lookups import weighed


@triton.jit
def _kept(row_lookup, kept, sample, batch, live, cols, span, VECTOR: tl.constexpr, SLICES: tl.constexpr):
    """The values that forward saved, ``[samples, columns]``."""
    to = tl.load(row_lookup + p.KEPT)
    if not SLICES:
        # Without slices and broadcast elements, rows are aligned.
        to = to // VECTOR * VECTOR
    to = kept + to * batch
    inside = live[:, None] & (cols < span)[None, :]
    if SLICES:
        single = tl.load(row_lookup + p.REPEAT) != 0
        at = sample[:, None] * tl.where(single, 1, span) + tl.where(single, 0, cols)[None, :]
        return tl.load(to + at, mask=inside, other=0.0).to(tl.float32)
    return tl.load(to + sample[:, None] * span + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weight(row_lookup, kept, sample, batch, live):
    to = kept + tl.load(row_lookup + p.WEIGHT_KEPT) * batch
    return tl.load(to + sample, mask=live, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["sample_stride", "feature_stride", "batch", "job_count"])
def spread(
    ids, sample_stride, feature_stride, batch, jobs, row_lookups, scales, found, kept, outer, own, job_count,
    TILE: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, PRODUCTS: tl.constexpr, SLICES: tl.constexpr,
    SIGNS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of every row lookup's row and weight, float32, to ``own``, for one job and TILE samples."""
    job = jobs + (tl.program_id(0) % job_count) * p.JOB_SIZE
    if tl.load(job + p.PLAIN) != 0:
        return
    sample = (tl.program_id(0) // job_count).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = sample < batch
    cols = tl.arange(0, COLS)
    span = tl.load(job + p.SPAN).to(tl.int32) // VECTOR * VECTOR
    inside = live[:, None] & (cols < span)[None, :]
    x = tl.load(ids + sample * sample_stride + tl.load(job + p.IDS) * feature_stride, mask=live, other=0).to(tl.int64)
    stride = tl.load(job + p.STRIDE) // VECTOR * VECTOR
    at = (tl.load(job + p.OUT) // VECTOR * VECTOR) * batch + sample * stride
    at += tl.load(job + p.COLUMN) // VECTOR * VECTOR
    grad = tl.load(outer + at[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    first = tl.load(job + p.FIRST)
    count = tl.load(job + p.ROW_LOOKUPS)
    for j in range(count):
        row_lookup = row_lookups + (first + j) * p.ROW_LOOKUP_SIZE
        here = weighed(grad, x, row_lookup, tl.load(scales + first + j), cols, SIGNS, SLICES)
        if PRODUCTS:
            if tl.load(job + p.PRODUCT) != 0:
                for k in range(count):
                    if k != j:
                        other = row_lookups + (first + k) * p.ROW_LOOKUP_SIZE
                        value = _kept(other, kept, sample, batch, live, cols, span, VECTOR, SLICES)
                        value = weighed(value, x, other, tl.load(scales + first + k), cols, SIGNS, SLICES)
                        if WEIGHTS:
                            if tl.load(other + p.WEIGHT_STORAGE) >= 0:
                                value *= _weight(other, kept, sample, batch, live)
                        rows = tl.load(found + tl.load(other + p.READ) * batch + sample, mask=live, other=-1)
                        here *= tl.where((rows >= 0)[:, None], value, 1.0)
        if WEIGHTS:
            if tl.load(row_lookup + p.WEIGHT_STORAGE) >= 0:
                value = _kept(row_lookup, kept, sample, batch, live, cols, span, VECTOR, SLICES)
                to = own + tl.load(row_lookup + p.WEIGHT_OWN) * batch
                tl.store(to + sample, tl.sum(tl.where(inside, here * value, 0.0), 1), mask=live)
                here *= _weight(row_lookup, kept, sample, batch, live)
        to = tl.load(row_lookup + p.OWN)
        if not SLICES:
            to = to // VECTOR * VECTOR
        to = own + to * batch
        if SLICES:
            if tl.load(row_lookup + p.REPEAT) != 0:
                tl.store(to + sample, tl.sum(tl.where(inside, here, 0.0), 1), mask=live)
            else:
                tl.store(to + sample[:, None] * span + cols[None, :], here, mask=inside)
        else:
            tl.store(to + sample[:, None] * span + cols[None, :], here, mask=inside)
