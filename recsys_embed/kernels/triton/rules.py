"""Consumers of the summed gradients of rows: an optimizer step, or writing the gradient."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from recsys_embed.kernels.triton.few_bits import load_rows, store_rows
from recsys_embed.kernels.triton.rounding import (
    ADAGRAD,
    ADAM,
    FTRL_SUM,
    RMSPROP,
    ROWWISE_ADAGRAD,
    SIGNED,
    load_state,
    store_state,
)

# Names of the rules in :func:`apply`; a rule's number is its index.
RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl", "rowwise_rmsprop")
GRADIENT = tl.constexpr(-1)
_SGD = tl.constexpr(RULES.index("sgd"))
_ADAGRAD = tl.constexpr(RULES.index("adagrad"))
_ROWWISE_ADAGRAD = tl.constexpr(RULES.index("rowwise_adagrad"))
_ADAM = tl.constexpr(RULES.index("adam"))
_FTRL = tl.constexpr(RULES.index("ftrl"))
_ROWWISE_RMSPROP = tl.constexpr(RULES.index("rowwise_rmsprop"))


class Tensors(NamedTuple):
    """The tensors that a step changes.

    Args:
        weights: ``[rows, width]`` of a storage.
        state: of its optimizer, in the order of the rule's class.
        last: last step of each row; not used unless LAST.
        gradient: receives the sums if the rule is GRADIENT; else not used.
        coding: numbers of :class:`recsys_embed.kernels.triton.few_bits.Coding`, of rows that train in few bits.
    """

    weights: Any
    state: tuple[Any, ...]
    last: Any
    gradient: Any
    coding: Any


class Numbers(NamedTuple):
    """Numbers of a step. Floats only: triton specialises some integers in a tuple, which recompiles the kernel.

    Args:
        size, eps: step size and epsilon.
        decay: weight decay.
        constants: of the rule, in the order of its class.
        distance: of two codes of rows that train in few bits.
    """

    size: float
    eps: float
    decay: float
    constants: tuple[float, ...]
    distance: float = 0.0


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
    # Below 2**-14, float16 is subnormal: its spacing is 2**-24.
    small = tl.floor(value * 16777216.0 + (random >> 8).to(tl.float32) * (1.0 / 16777216.0)) * (1.0 / 16777216.0)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(tl.abs(value) < 6.103515625e-05, small, normal.to(tl.float32, bitcast=True))
    return tl.where(finite, rounded, value).to(tl.float16)


@triton.jit
def rounded(value, row, cols, seed, step, like):
    """``value`` in the type of ``like``: to 16 bits by stochastic rounding (Gupta et al. 2015).

    Philox is keyed by element and step, so results do not depend on how the work is divided.
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
def _adam(grad, row, at, live, cols, mask, tensors, numbers, seed, step, COUNTS: tl.constexpr):
    """Direction of Adam's step ``[n, columns]``; updates the moments."""
    mean = load_state(tensors.state[0], at, mask, SIGNED)
    square = load_state(tensors.state[1], at, mask, ADAM)
    mean += (grad - mean) * numbers.constants[0]
    # A mean of squares that overflowed stays infinite: the difference would be NaN.
    square = tl.where(square < float("inf"), square + (grad * grad - square) * numbers.constants[1], square)
    store_state(tensors.state[0], at, mean, mask, row[:, None], cols[None, :], seed + 1, step, SIGNED)
    store_state(tensors.state[1], at, square, mask, row[:, None], cols[None, :], seed + 2, step, ADAM)
    direction = mean / (tl.sqrt_rn(square) + numbers.eps)
    if COUNTS:
        count = tl.load(tensors.state[2] + row, mask=live, other=0) + 1
        tl.store(tensors.state[2] + row, count, mask=live)
        # In float64: 1 - beta**count loses digits in the first steps.
        n = count.to(tl.float64)
        fading = 1.0 - tl.exp(n * numbers.constants[2])
        correction = tl.sqrt(1.0 - tl.exp(n * numbers.constants[3])) / fading
        direction = direction * correction.to(tl.float32)[:, None]
    return direction


@triton.jit
def _mean_square(grad, mask, WIDTH: tl.constexpr):
    return tl.sum(tl.where(mask, grad * grad, 0.0), 1) / WIDTH


@triton.jit
def _sign(x):
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def _ftrl(weight, grad, row, at, cols, mask, tensors, numbers, seed, step):
    """New weights ``[n, columns]`` of FTRL; updates the state."""
    total = load_state(tensors.state[0], at, mask, FTRL_SUM) + grad * grad
    store_state(tensors.state[0], at, total, mask, row[:, None], cols[None, :], seed + 1, step, FTRL_SUM)
    before = load_state(tensors.state[1], at, mask, SIGNED)
    beta, l1, l2 = numbers.constants
    # At learning rate 0 only the sum changes.
    still = numbers.size == 0.0
    curvature = (tl.sqrt_rn(total) + beta) / tl.where(still, 1.0, numbers.size) + l2
    sign = _sign(weight)
    moved = weight * curvature - grad
    z = tl.where(sign != 0.0, -(moved + sign * l1), tl.minimum(tl.maximum(before, -l1), l1) + grad)
    z_or_before = tl.where(still, before, z)
    store_state(tensors.state[1], at, z_or_before, mask, row[:, None], cols[None, :], seed + 2, step, SIGNED)
    curvature = tl.where(curvature > 0.0, curvature, 1.0)
    crossed = tl.where(tl.abs(z) <= l1, 0.0, -(z - _sign(z) * l1) / curvature)
    stepped = tl.where((_sign(moved) * sign > 0.0) | (grad == 0.0), weight - grad / curvature, crossed)
    return tl.where(still, weight, stepped)


@triton.jit
def _rowwise_rmsprop(
    weight, grad, row, live, mask, tensors, numbers, seed, step, WIDTH: tl.constexpr, COUNTS: tl.constexpr
):
    """New weights ``[n, columns]`` of row-wise RMSprop; updates the state."""
    rest, alpha, least = numbers.constants
    mean = load_state(tensors.state[0], row, live, RMSPROP)
    mean = tl.where(mean < float("inf"), mean + (_mean_square(grad, mask, WIDTH) - mean) * rest, mean)
    store_state(tensors.state[0], row, mean, live, row, row * 0, seed + 1, step, RMSPROP)
    gap = tl.zeros_like(mean) + 1.0
    if COUNTS:
        seen = tl.load(tensors.state[1] + row, mask=live, other=0)
        gap = tl.where(seen > 0, (step - seen).to(tl.float32), 1.0)
        tl.store(tensors.state[1] + row, tl.zeros_like(seen) + step, mask=live)
    keep = tl.maximum(least, 1.0 - tl.minimum(1.0, gap * (numbers.size * alpha)))
    return keep[:, None] * weight - (numbers.size / (tl.sqrt_rn(mean) + numbers.eps))[:, None] * grad


@triton.jit
def apply(
    row, grad, live, cols, tensors, numbers, seed, step,
    RULE: tl.constexpr, WIDTH: tl.constexpr, COUNTS: tl.constexpr, LAST: tl.constexpr, DECAY: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """One step of RULE on ``row [n]`` with summed gradients ``grad [n, columns]``.

    Args:
        tensors: :class:`Tensors`.
        numbers: :class:`Numbers`.
        seed, step: of stochastic rounding of 16-bit weights and of state; ``step`` is the table's number of steps.
        COUNTS, LAST: whether rows count their own steps, and record their last step.
        CODE: of rows that train in few bits, else 0.
    """
    mask = live[:, None] & (cols < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + cols[None, :]
    if RULE == GRADIENT:
        tl.store(tensors.gradient + at, grad.to(tensors.gradient.dtype.element_ty), mask=mask)
    else:
        if CODE == 0:
            weight = tl.load(tensors.weights + at, mask=mask, other=0.0).to(tl.float32)
        else:
            weight = load_rows(tensors.weights, row, cols, live, numbers.distance, CODE, WIDTH)
        before = weight
        size = numbers.size
        if DECAY:
            grad += weight * numbers.decay
        if RULE == _SGD:
            weight = weight - size * grad
        elif RULE == _ADAGRAD:
            total = load_state(tensors.state[0], at, mask, ADAGRAD) + grad * grad
            store_state(tensors.state[0], at, total, mask, row[:, None], cols[None, :], seed + 1, step, ADAGRAD)
            weight = weight - size * grad / (tl.sqrt_rn(total) + numbers.eps)
        elif RULE == _ROWWISE_ADAGRAD:
            total = load_state(tensors.state[0], row, live, ROWWISE_ADAGRAD) + _mean_square(grad, mask, WIDTH)
            store_state(tensors.state[0], row, total, live, row, row * 0, seed + 1, step, ROWWISE_ADAGRAD)
            weight = weight - (size / (tl.sqrt_rn(total) + numbers.eps))[:, None] * grad
        elif RULE == _ADAM:
            weight = weight - size * _adam(grad, row, at, live, cols, mask, tensors, numbers, seed, step, COUNTS)
        elif RULE == _FTRL:
            weight = _ftrl(weight, grad, row, at, cols, mask, tensors, numbers, seed, step)
        elif RULE == _ROWWISE_RMSPROP:
            weight = _rowwise_rmsprop(weight, grad, row, live, mask, tensors, numbers, seed, step, WIDTH, COUNTS)
        weights = tensors.weights
        if CODE == 0:
            tl.store(weights + at, rounded(weight, row, cols, seed, step, weights), mask=mask)
        else:
            store_rows(weights, row, cols, live, before, weight, tensors.coding, numbers.distance, step, CODE, WIDTH)
        if LAST:
            tl.store(tensors.last + row, tl.zeros_like(row) + step, mask=live)
