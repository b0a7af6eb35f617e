"""What becomes of the summed gradients of rows: one optimizer step, or a gradient handed out."""

import triton
import triton.language as tl

SGD = tl.constexpr(0)
ADAGRAD = tl.constexpr(1)
ROWWISE = tl.constexpr(2)
ADAM = tl.constexpr(3)
GRADIENT = tl.constexpr(4)


@triton.jit
def _round_to_bfloat16(value, random):
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, bits + (random & 0xFFFF), bits) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _round_to_float16(value, random):
    bits = value.to(tl.uint32, bitcast=True)
    normal = (bits + (random & 0x1FFF)) & 0xFFFFE000
    # Below 2**-14 the steps of float16 are 2**-24 whatever the exponent.
    small = tl.floor(value * 16777216.0 + (random >> 8).to(tl.float32) * (1.0 / 16777216.0)) * (1.0 / 16777216.0)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(tl.abs(value) < 6.103515625e-05, small, normal.to(tl.float32, bitcast=True))
    return tl.where(finite, rounded, value).to(tl.float16)


@triton.jit
def rounded(value, row, cols, seed, step, like):
    """``value`` in the type of ``like``: 16 bits by chance, so that small steps count on average (Gupta et al. 2015).

    Philox draws by element and step, so results do not depend on how the work is divided.
    """
    if like.dtype.element_ty == tl.float32:
        out = value
    else:
        at = row.to(tl.uint32)[:, None] + tl.zeros_like(cols).to(tl.uint32)[None, :]
        column = tl.zeros_like(at) + cols.to(tl.uint32)[None, :]
        random, _, _, _ = tl.philox(seed, at, column, tl.zeros_like(at) + step.to(tl.uint32), tl.zeros_like(at))
        if like.dtype.element_ty == tl.bfloat16:
            out = _round_to_bfloat16(value, random)
        else:
            out = _round_to_float16(value, random)
    return out


@triton.jit
def apply(
    row, grad, live, cols, weights, first, second, counts, last, gradient,
    size, eps, rest1, rest2, log1, log2, decay, seed, step,
    RULE: tl.constexpr, WIDTH: tl.constexpr, COUNTS: tl.constexpr, LAST: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """One step of RULE on ``row [n]`` with summed gradients ``grad [n, columns]``.

    Args:
        weights, first, second, counts, last: a storage and the state of its optimizer.
        gradient: where RULE is GRADIENT, what receives it.
        size, eps: step size and epsilon of this step.
        rest1, rest2, log1, log2: one less Adam's betas, and their logarithms.
        seed, step: of the draws that round 16-bit weights.
        COUNTS, LAST: whether rows count their own steps, and note the step they have come to.
    """
    mask = live[:, None] & (cols < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + cols[None, :]
    if RULE == GRADIENT:
        tl.store(gradient + at, grad.to(gradient.dtype.element_ty), mask=mask)
    else:
        weight = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)
        if DECAY:
            grad += weight * decay
        if RULE == SGD:
            weight = weight - size * grad
        elif RULE == ADAGRAD:
            total = tl.load(first + at, mask=mask, other=0.0) + grad * grad
            tl.store(first + at, total, mask=mask)
            weight = weight - size * grad / (tl.sqrt_rn(total) + eps)
        elif RULE == ROWWISE:
            square = tl.sum(tl.where(mask, grad * grad, 0.0), 1) / WIDTH
            total = tl.load(first + row, mask=live, other=0.0) + square
            tl.store(first + row, total, mask=live)
            weight = weight - (size / (tl.sqrt_rn(total) + eps))[:, None] * grad
        else:
            mean = tl.load(first + at, mask=mask, other=0.0)
            square = tl.load(second + at, mask=mask, other=0.0)
            mean += (grad - mean) * rest1
            square += (grad * grad - square) * rest2
            tl.store(first + at, mean, mask=mask)
            tl.store(second + at, square, mask=mask)
            direction = mean / (tl.sqrt_rn(square) + eps)
            if COUNTS:
                count = tl.load(counts + row, mask=live, other=0) + 1
                tl.store(counts + row, count, mask=live)
                # In float64: 1 - beta**count of the first steps is a small difference.
                n = count.to(tl.float64)
                fading = 1.0 - tl.exp(n * log1)
                correction = tl.sqrt(1.0 - tl.exp(n * log2)) / fading
                direction = direction * correction.to(tl.float32)[:, None]
            weight = weight - size * direction
        tl.store(weights + at, rounded(weight, row, cols, seed, step, weights), mask=mask)
        if LAST:
            tl.store(last + row, tl.zeros_like(row) + step, mask=live)
