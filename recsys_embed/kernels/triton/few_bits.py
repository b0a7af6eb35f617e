"""Rows that train in few bits, bit for bit as :class:`recsys_embed.core.row_format.RowFormat` reads and writes them.

Kernels know a format by one number: bits of an element (16 of halves), 32 times the bytes before the codes, and 1024
where rows are rounded stochastically.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys_embed.core.precision import HEAD
from recsys_embed.kernels.low_precision_table import LowPrecisionTable, stored_rows
from recsys_embed.kernels.triton.rounding import random_words

_LEAST_STEP = tl.constexpr(2.0**-16)
_MOST_STEP = tl.constexpr(256.0)


class Coding(NamedTuple):
    """How kernels step the rows of a table.

    Args:
        code: of the format; 0: floats.
        distance: of two codes, where it is one number.
        numbers: int64 ``[2]``: seed of the random bits, and the bits of the float64 rate of learned steps.
    """

    code: int
    distance: float
    numbers: Any

    @classmethod
    def of(cls, table: Tensor) -> "Coding":
        if not isinstance(table, LowPrecisionTable):
            return cls(0, 0.0, table)
        format = table.format
        rate = torch.tensor(format.rate_of(table.shape[1]) if format.learns else 0.0, dtype=torch.float64)
        numbers = torch.stack([torch.tensor(table.seed), rate.view(torch.int64)]).to(table.device)
        return cls((format.bits or 16) + 32 * HEAD * format.learns + 1024 * format.stochastic, format.step, numbers)


def formats_of(tables: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """What :func:`read_elements` reads of storages: int64 ``[n, 2]`` codes and row bytes, float32 ``[n]`` distances.

    None where all are floats of one type.
    """
    if not any(isinstance(t, LowPrecisionTable) for t in tables):
        return None
    found = []
    for t in tables:
        held = stored_rows(t)
        is_brain = held.dtype is torch.bfloat16
        # A 17th bit tells one half from the other.
        code = 0 if not isinstance(t, LowPrecisionTable) else Coding.of(t).code % 1024 + is_brain
        found.append([code, held.stride(0) * held.element_size()])
    steps = [t.format.step if isinstance(t, LowPrecisionTable) else 0.0 for t in tables]
    device = tables[0].device
    return torch.tensor(found, device=device), torch.tensor(steps, device=device)


@triton.jit
def _step_at(row, live):
    """The step at the head of rows, which need not lie at even addresses, 1 of others: float32."""
    low = tl.load(row, mask=live, other=0).to(tl.uint16)
    high = tl.load(row + 1, mask=live, other=0).to(tl.uint16)
    return tl.where(live, (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32), 1.0)


@triton.jit
def read_elements(storages, formats, distances, number, row, element, width, mask):
    """Elements of rows of a storage, float32; ``row`` and ``element`` broadcast to the shape of ``mask``."""
    code = tl.load(formats + 2 * number)
    size = tl.load(formats + 2 * number + 1)
    address = tl.load(storages + number)
    at = row * width + element
    value = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask & (code == 0), other=0.0)
    value += tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=mask & (code == 16), other=0.0).to(tl.float32)
    value += tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask & (code == 17), other=0.0).to(tl.float32)
    head = code // 32
    bits = code % 32
    whole = mask & ((bits == 8) | (bits == 4))
    start = address.to(tl.pointer_type(tl.uint8)) + row * size
    place = tl.where(bits == 4, element // 2, element)
    found = tl.load(start + head + place, mask=whole, other=0).to(tl.int32)
    found = tl.where(bits == 4, (found >> ((element & 1) * 4).to(tl.int32)) & 15, found)
    own = _step_at(start + 0 * place, whole & (head > 0))
    step = tl.where(head > 0, own, tl.load(distances + number))
    signed = found - tl.where(bits == 4, 8, 128)
    return tl.where(whole, signed.to(tl.float32) * step, value)


@triton.jit
def load_rows(stored, row, cols, live, distance, CODE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows as rules step them: float32 ``[n, columns]``."""
    BITS: tl.constexpr = CODE % 32
    START: tl.constexpr = CODE // 32 % 32
    mask = live[:, None] & (cols < WIDTH)[None, :]
    if BITS == 16:
        value = tl.load(stored + row.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        SIZE: tl.constexpr = START + (WIDTH * BITS + 7) // 8
        start = stored + row.to(tl.int64) * SIZE
        PER: tl.constexpr = 8 // BITS
        code = tl.load(start[:, None] + START + cols[None, :] // PER, mask=mask, other=0).to(tl.int32)
        code = (code >> (cols % PER * BITS)[None, :]) & ((1 << BITS) - 1)
        step = tl.zeros_like(row).to(tl.float32) + distance
        if START > 0:
            step = _step_at(start, live)
        value = (code - (1 << (BITS - 1))).to(tl.float32) * step[:, None]
    return value


@triton.jit
def _uniform(word):
    return (word >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _nearest(x):
    """Of numbers below 2^22: adding and taking away 1.5 * 2^23 leaves an integer, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_float16(value, word, RANDOM: tl.constexpr):
    out = value.to(tl.float16)
    if RANDOM:
        bits = value.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        moved = ((bits + (word >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 the distance of two halves is 2^-24.
        small = tl.floor(tl.abs(value) * 16777216.0 + _uniform(word)) * (1.0 / 16777216.0)
        small = tl.where((bits >> 31) != 0, -small, small)
        moved = tl.where(tl.abs(value) < 6.103515625e-05, small, moved)
        out = tl.where(finite, moved, value).to(tl.float16)
    return out


@triton.jit
def _to_bfloat16(value, word, RANDOM: tl.constexpr):
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    # To nearest by hand, because triton's interpreter cuts.
    added = 0x7FFF + ((bits >> 16) & 1)
    if RANDOM:
        added = word >> 16
    moved = ((bits + added) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(finite, moved, value).to(tl.bfloat16)


@triton.jit
def _learned(before, after, step, mask, rate, BITS: tl.constexpr):
    """Steps of rows after a step of the optimizer; see ``RowFormat._moved_steps``: float32 ``[n]``."""
    most: tl.constexpr = (1 << (BITS - 1)) - 1
    scaled = tl.div_rn(after, tl.broadcast_to(step[:, None], after.shape))
    slope = _nearest(scaled) - scaled
    slope = tl.where(scaled <= -most - 1.0, -most - 1.0, slope)
    slope = tl.where(scaled >= most, most * 1.0, slope)
    moved = (after.to(tl.float64) - before.to(tl.float64)) * slope.to(tl.float64)
    total = tl.sum(tl.where(mask, moved, 0.0), 1)
    old = step.to(tl.float64)
    new = old + total * rate
    new = tl.minimum(tl.maximum(new, old * 0.5), old * 2.0)
    new = tl.minimum(tl.maximum(new, _LEAST_STEP), _MOST_STEP)
    return tl.where(total - total == 0.0, new, old).to(tl.float32)


@triton.jit
def store_rows(
    stored, row, cols, live, before, value, coding, distance, step_number, CODE: tl.constexpr, WIDTH: tl.constexpr
):
    """Write rows ``value [n, columns]`` in a step of the optimizer, which ``before`` were those of :func:`load_rows`.

    Args:
        coding: :class:`Coding`'s ``numbers``.
        distance: of two codes, where it is one number.
    """
    BITS: tl.constexpr = CODE % 32
    START: tl.constexpr = CODE // 32 % 32
    RANDOM: tl.constexpr = CODE // 1024
    mask = live[:, None] & (cols < WIDTH)[None, :]
    seed = tl.load(coding)
    word = random_words(row[:, None], cols[None, :], seed, step_number)
    if BITS == 16:
        at = stored + row.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        if stored.dtype.element_ty == tl.float16:
            tl.store(at, _to_float16(value, word, RANDOM), mask=mask)
        else:
            tl.store(at, _to_bfloat16(value, word, RANDOM), mask=mask)
    else:
        SIZE: tl.constexpr = START + (WIDTH * BITS + 7) // 8
        start = stored + row.to(tl.int64) * SIZE
        step = tl.zeros_like(row).to(tl.float32) + distance
        if START > 0:
            rate = tl.load(coding + 1).to(tl.float64, bitcast=True)
            learned = _learned(before, value, _step_at(start, live), mask, rate, BITS)
            half = _to_float16(learned, random_words(row, row * 0 + WIDTH, seed, step_number), RANDOM)
            step = half.to(tl.float32)
            bias = (step * -(1.0 * (1 << (BITS - 1)))).to(tl.float16)
            first = half.to(tl.uint16, bitcast=True)
            second = bias.to(tl.uint16, bitcast=True)
            tl.store(start, (first & 255).to(tl.uint8), mask=live)
            tl.store(start + 1, (first >> 8).to(tl.uint8), mask=live)
            tl.store(start + 2, (second & 255).to(tl.uint8), mask=live)
            tl.store(start + 3, (second >> 8).to(tl.uint8), mask=live)
        reach: tl.constexpr = 1 << (BITS - 1)
        scaled = tl.div_rn(value, tl.broadcast_to(step[:, None], value.shape))
        scaled = tl.where(scaled == scaled, scaled, 0.0)
        scaled = tl.minimum(tl.maximum(scaled, -1000.0), 1000.0)
        whole = _nearest(scaled)
        if RANDOM:
            whole = tl.floor(scaled + _uniform(word))
        whole = tl.minimum(tl.maximum(whole, -1.0 * reach), reach - 1.0)
        code = whole.to(tl.int32) + reach
        if BITS == 8:
            tl.store(start[:, None] + START + cols[None, :], code.to(tl.uint8), mask=mask)
        else:
            # Two codes to a byte, the lower half that of the even column.
            rows: tl.constexpr = code.shape[0]
            pairs: tl.constexpr = code.shape[1] // 2
            apart = tl.reshape(tl.where(mask, code, 0), (rows, pairs, 2))
            joined = tl.sum(apart * (tl.arange(0, 2) * 15 + 1)[None, None, :], 2)
            place = tl.arange(0, pairs)
            inside = live[:, None] & (place < (WIDTH + 1) // 2)[None, :]
            tl.store(start[:, None] + START + place[None, :], joined.to(tl.uint8), mask=inside)
