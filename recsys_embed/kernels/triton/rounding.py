"""Random bits of stochastic rounding, and optimizer state of 16 and 8 bits, as torch has them bit for bit.

See :mod:`recsys_embed.core.stochastic_rounding` and :mod:`recsys_embed.optim.state_format`.
"""

import triton
import triton.language as tl

from recsys_embed.kernels.triton.ids import splitmix
from recsys_embed.optim import FTRL, Adagrad, Adam, RowwiseAdagrad, RowwiseRMSprop
from recsys_embed.optim.state_format import LEAST_SIGNED

# Exponents of the least numbers of 8 bits.
ADAGRAD = tl.constexpr(Adagrad.least_exponents["sum"])
ROWWISE_ADAGRAD = tl.constexpr(RowwiseAdagrad.least_exponents["sum"])
ADAM = tl.constexpr(Adam.least_exponents["exp_avg_sq"])
FTRL_SUM = tl.constexpr(FTRL.least_exponents["sum"])
RMSPROP = tl.constexpr(RowwiseRMSprop.least_exponents["mean_square"])
SIGNED = tl.constexpr(LEAST_SIGNED)


@triton.jit
def _mix(z):
    """The finaliser of splitmix64 of uint64 bits."""
    return splitmix(z - 0x9E3779B97F4A7C15)


@triton.jit
def random_words(row, column, seed, step):
    """32 random bits, uint32 of the shape of ``row`` and ``column``, which broadcast."""
    zero = row.to(tl.uint64) * 0
    key = _mix(_mix(zero + seed.to(tl.uint64) + step.to(tl.uint64) * 0x9E3779B97F4A7C15) ^ row.to(tl.uint64))
    x = key.to(tl.uint32) + column.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = x ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def load_state(state, at, mask, LEAST: tl.constexpr):
    """State as rules compute with it, float32; 0 outside of ``mask``."""
    stored = tl.load(state + at, mask=mask, other=0)
    if state.dtype.element_ty == tl.uint8:
        code = stored.to(tl.uint32)
        size = code
        if LEAST == SIGNED:
            size = code & 127
        bits = tl.where(size > 0, (size - 1 + (127 + LEAST) * 4) << 21, 0)
        if LEAST == SIGNED:
            bits = bits | ((code & 128) << 24)
        out = bits.to(tl.float32, bitcast=True)
    else:
        out = stored.to(tl.float32)
    return out


@triton.jit
def store_state(state, at, value, mask, row, column, seed, step, LEAST: tl.constexpr):
    """Write new values by stochastic rounding; ``row`` and ``column`` broadcast to their shape."""
    if state.dtype.element_ty == tl.float32:
        tl.store(state + at, value, mask=mask)
    else:
        word = random_words(row, column, seed, step)
        bits = value.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        if state.dtype.element_ty == tl.bfloat16:
            moved = tl.where(size < 0x7F800000, (bits + (word >> 16)) & 0xFFFF0000, bits)
            tl.store(state + at, moved.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)
        else:
            if LEAST != SIGNED:
                size = tl.where(value < 0.0, 0, size)
            least: tl.constexpr = (127 + LEAST) << 23
            # Integers of 32 bits: codes below the first one are replaced.
            code = ((size + (word >> 11)) >> 21).to(tl.int32) - (127 + LEAST) * 4 + 1
            if LEAST == SIGNED:
                scale: tl.constexpr = 2.0 ** (-LEAST)
                part = (word >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
                small = (size.to(tl.float32, bitcast=True) * scale + part).to(tl.int32)
                code = tl.where(size < least, small, tl.minimum(code, 127)) | (bits >> 31 << 7).to(tl.int32)
            else:
                code = tl.where(size < least, (size > 0).to(tl.int32), tl.minimum(code, 255))
            tl.store(state + at, code.to(tl.uint8), mask=mask)
