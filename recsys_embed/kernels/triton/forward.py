"""The forward kernel: vectors of all features in one launch."""

import triton
import triton.language as tl

from recsys_embed.kernels.triton import row_lookups as p
from recsys_embed.kernels.triton.few_bits import read_elements
from recsys_embed.kernels.triton.row_lookups import (
    find,
    find_weight,
    read_coded,
    read_slice,
    read_straight,
    storage,
    straight,
    weighed,
)


@triton.jit
def _row_lookup(
    total, row_lookup, scale, used, live, x, sample, batch, product, plain, cols, span,
    storages, formats, distances, index, found, kept, out,
    KINDS: tl.constexpr, VECTOR: tl.constexpr, PRODUCTS: tl.constexpr, SLICES: tl.constexpr, SIGNS: tl.constexpr,
    WEIGHTS: tl.constexpr, SAVE: tl.constexpr, KEEP: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """``total`` combined with a row lookup's values; ``used``: samples with values, ``live``: samples to write."""
    rows = find(x, row_lookup, index, used, KINDS)
    table = storage(storages, tl.load(row_lookup + p.STORAGE), out)
    if SAVE:
        place = tl.where(rows >= 0, rows + tl.load(row_lookup + p.BASE), -1).to(tl.int32)
        tl.store(found + tl.load(row_lookup + p.READ) * batch + sample, place, mask=live)
    if CODED:
        value = read_coded(storages, formats, distances, rows, row_lookup, cols, span, SLICES)
    elif SLICES:
        # Both, not a branch: masked loads cost nothing, and triton 3.6 does not compile the branch.
        whole = straight(row_lookup)
        value = read_straight(table, tl.where(whole, rows, -1), row_lookup, cols, span, VECTOR)
        value += read_slice(table, tl.where(whole, -1, rows), row_lookup, cols, span)
    else:
        value = read_straight(table, rows, row_lookup, cols, span, VECTOR)
    if KEEP:
        if plain == 0:
            to, width = tl.load(row_lookup + p.KEPT), span
            if SLICES:
                width = tl.where(tl.load(row_lookup + p.REPEAT) != 0, 1, span)
            else:
                to = to // VECTOR * VECTOR
            to = kept + to * batch + sample * width
            tl.store(to[:, None] + cols[None, :], value.to(kept.dtype.element_ty),
                     mask=live[:, None] & (cols < width)[None, :])  # fmt: skip
    value = weighed(value, x, row_lookup, scale, cols, SIGNS, SLICES)
    if WEIGHTS:
        number = tl.load(row_lookup + p.WEIGHT_STORAGE)
        if number >= 0:
            at = find_weight(x, row_lookup, index, used, KINDS)
            base = tl.load(row_lookup + p.WEIGHT_BASE)
            if CODED:
                weight = read_elements(storages, formats, distances, number, at + base, at * 0, 1, at >= 0)
            else:
                weights = storage(storages, number, out)
                weight = tl.load(weights + base + at, mask=at >= 0, other=0.0).to(tl.float32)
            if SAVE:
                place = tl.where(at >= 0, at + base, -1).to(tl.int32)
                tl.store(found + tl.load(row_lookup + p.WEIGHT_READ) * batch + sample, place, mask=live)
            if KEEP:
                if plain == 0:
                    to = kept + tl.load(row_lookup + p.WEIGHT_KEPT) * batch + sample
                    tl.store(to, weight.to(kept.dtype.element_ty), mask=live)
            value = value * weight[:, None]
    if PRODUCTS:
        # Row lookups without a row are left out of products.
        factor = tl.where((rows >= 0)[:, None], value, 1.0)
        return tl.where(product != 0, total * factor, total + value)
    return total + value


@triton.jit(do_not_specialize=["sample_stride", "feature_stride", "batch", "index", "job_count"])
def forward(
    ids, sample_stride, feature_stride, batch,
    jobs, row_lookups, scales, storages, formats, distances, index,
    out, found, kept, faults, job_count,
    TILE: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, MOST: tl.constexpr, EVEN: tl.constexpr,
    KINDS: tl.constexpr, PRODUCTS: tl.constexpr, SLICES: tl.constexpr, SIGNS: tl.constexpr, WEIGHTS: tl.constexpr,
    LIMITS: tl.constexpr, NONE: tl.constexpr, SAVE: tl.constexpr, KEEP: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """One job for TILE samples.

    Args:
        ids: int32 or int64, of any strides.
        jobs, row_lookups, scales: see :class:`recsys_embed.kernels.triton.fields.Tables`.
        storages: addresses of the tables.
        formats, distances: see :func:`recsys_embed.kernels.triton.few_bits.formats_of`, read if CODED.
        index: addresses of the arrays of all indexes.
        out: outputs one after the other, each ``[batch, stride]``.
        found: int32 ``[reads, batch]``, rows of each read, written if SAVE.
        kept: unchanged rows, written if KEEP.
        faults: int64 ``[features, 2]``: an id out of range writes 1 and itself.
    """
    # Jobs of one tile are neighbouring programs, because they share cache lines of ids and outputs.
    job = jobs + (tl.program_id(0) % job_count) * p.JOB_SIZE
    sample = (tl.program_id(0) // job_count).to(tl.int64) * TILE + tl.arange(0, TILE)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = sample < batch
    x = tl.load(ids + sample * sample_stride + tl.load(job + p.IDS) * feature_stride, mask=live, other=0).to(tl.int64)
    used = live
    if LIMITS:
        limit = tl.load(job + p.LIMIT)
        bad = live & (limit >= 0) & ((x < 0) | (x >= limit))
        if NONE:
            bad = bad & ((tl.load(job + p.OPTIONAL) == 0) | (x != -1))
        # One faulty id is enough for the message, so a racing store is fine.
        fault = faults + tl.load(job + p.FEATURE) * 2 + tl.zeros_like(x)
        tl.store(fault + 1, x, mask=bad)
        tl.store(fault, tl.full(x.shape, 1, tl.int64), mask=bad)
        used = used & ~bad
    if NONE:
        used = used & ((tl.load(job + p.OPTIONAL) == 0) | (x != -1))
    count = tl.load(job + p.ROW_LOOKUPS)
    first = tl.load(job + p.FIRST)
    product = tl.load(job + p.PRODUCT)
    plain = tl.load(job + p.PLAIN)
    span = tl.load(job + p.SPAN).to(tl.int32) // VECTOR * VECTOR
    total = tl.zeros([TILE, COLS], tl.float32)
    if PRODUCTS:
        total = tl.where(product != 0, total + 1.0, total)
    if MOST <= 4:
        for j in tl.static_range(MOST):
            asked = used
            written = live
            if not EVEN:
                asked = used & (j < count)
                written = live & (j < count)
            at = first + tl.maximum(tl.minimum(j, count - 1), 0)
            total = _row_lookup(
                total, row_lookups + at * p.ROW_LOOKUP_SIZE, tl.load(scales + at), asked, written,
                x, sample, batch, product,
                plain, cols, span, storages, formats, distances, index, found, kept, out,
                KINDS, VECTOR, PRODUCTS, SLICES, SIGNS, WEIGHTS, SAVE, KEEP, CODED,
            )  # fmt: skip
    else:
        for j in range(count):
            at = first + j
            total = _row_lookup(
                total, row_lookups + at * p.ROW_LOOKUP_SIZE, tl.load(scales + at), used, live,
                x, sample, batch, product,
                plain, cols, span, storages, formats, distances, index, found, kept, out,
                KINDS, VECTOR, PRODUCTS, SLICES, SIGNS, WEIGHTS, SAVE, KEEP, CODED,
            )  # fmt: skip
    total = tl.where(used[:, None], total, 0.0)
    stride = tl.load(job + p.STRIDE) // VECTOR * VECTOR
    column = tl.load(job + p.COLUMN) // VECTOR * VECTOR
    to = out + (tl.load(job + p.OUT) // VECTOR * VECTOR) * batch + sample * stride + column
    tl.store(to[:, None] + cols[None, :], total.to(out.dtype.element_ty), mask=live[:, None] & (cols < span)[None, :])
