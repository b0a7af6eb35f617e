"""Row formats by precision: bytes of a row, encoding and decoding.

Integer rows have the layout of FBGEMM's n-bit inference tables, so that its kernels can read them directly: an fp16
scale and an fp16 bias at the head of the row, then the codes (two to a byte for int4, four for int2, the first column
in the low bits); x = code * scale + bias. Quantisation is FBGEMM's (``FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf``):
the minimum is rounded to fp16 first, the range is taken from there. Its tail layouts are converted by
:func:`head_to_tail` and :func:`tail_to_head`. Rows of fp8 are e4m3 numbers behind an fp16 scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.errors import unknown_name

Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "int2"]
Search = Literal["minmax", "greedy", "mse"]
FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4, "int2": 2}
SEARCHES: dict[str, Search] = {"int8": "minmax", "int4": "greedy", "int2": "mse"}
"""Searches of scales that pay by default."""
FP8 = "fp8"
HEAD = 4  # bytes of scale and bias
FP8_HEAD = 2  # bytes of the scale
FP8_MAX = 448.0
FP16_MAX = 65504.0
NARROW = 8  # for narrower rows, scale and bias take more bytes than quantisation saves

_BLOCK = 64
_CHUNK = 1 << 18


def check_precision(precision: str) -> Precision:
    """``precision``, or an error that names the nearest one.

    >>> check_precision("int9")
    Traceback (most recent call last):
    recsys_embed.errors.UnknownNameError: unknown precision 'int9'; did you mean 'int8'? ...
    """
    if precision not in get_args(Precision):
        raise unknown_name("precision", str(precision), get_args(Precision))
    return precision  # type: ignore[return-value]


@dataclass(frozen=True)
class Layout:
    """Storage format of the rows of one table.

    Args:
        kind: a :data:`Precision`, or ``"fp64"``.
        width: elements of a table row.
        block: consecutive table rows that share one stored row, and with it scale and bias; 1 for floats.

    >>> Layout.of(16, "int8").row_bytes, Layout.of(16, "int4").row_bytes, Layout.of(1, "int8")
    (20, 12, Layout(kind='int8', width=1, block=64))
    """

    kind: str
    width: int
    block: int = 1

    @classmethod
    def of(
        cls, width: int, precision: str, dtype: torch.dtype = torch.float32, rows: int = _BLOCK, per_scale: int = 1
    ) -> Layout:
        """The layout at a precision for ``rows`` rows of ``width`` elements of ``dtype``.

        Rows of fewer than 8 elements are quantised in blocks of about 64 elements, or of the whole table if it is
        smaller. ``"fp32"`` keeps float16 and bfloat16 tables in their type, which is exact and smaller.

        Args:
            per_scale: rows that share a scale at least.
        """
        if precision in BITS or precision == FP8:
            least = 1 if width >= NARROW else _BLOCK // width
            return cls(precision, width, 1 if max(least, per_scale) == 1 else min(max(least, per_scale), rows))
        if precision == "fp32" and dtype in (torch.float16, torch.bfloat16):
            precision = "fp16" if dtype == torch.float16 else "bf16"
        return cls(precision, width)

    @property
    def bits(self) -> int | None:
        """Bits of a code; None for floats."""
        return BITS.get(self.kind)

    @property
    def scaled(self) -> bool:
        """Whether rows have a scale, and so decode to other numbers than the stored ones."""
        return self.kind in BITS or self.kind == FP8

    @property
    def head(self) -> int:
        """Bytes before the numbers of a row."""
        return HEAD if self.kind in BITS else FP8_HEAD if self.kind == FP8 else 0

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return FLOATS.get(self.kind, torch.uint8)

    @property
    def items(self) -> int:
        """Elements of a stored row; bytes if rows have a scale."""
        return self.head + -(-self.block * self.width * (self.bits or 8) // 8) if self.scaled else self.width

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return self.items * self.dtype.itemsize

    def stored_rows(self, rows: int) -> int:
        return -(-rows // self.block)

    def nbytes(self, rows: int) -> int:
        """Bytes of a table of ``rows`` rows."""
        return self.stored_rows(rows) * self.row_bytes

    def encode(self, values: Tensor, search: Search = "minmax", step: float | Tensor | None = None) -> Tensor:
        """Stored rows of ``values [n, width]``: ``[stored_rows(n), items]``.

        The last block is padded with copies of its last row.

        Args:
            step: of integers that were trained at one, whose codes are kept; of all rows, or ``[n, 1]``.
        """
        if not self.scaled:
            return values.to(self.dtype)
        flat = values.to(torch.float32)
        if self.block > 1:
            missing = self.stored_rows(len(flat)) * self.block - len(flat)
            flat = torch.cat([flat, flat[-1:].expand(missing, -1)]).view(-1, self.block * self.width)
        if self.bits is not None and step is not None:
            return at_step(flat, self.bits, step)
        return to_fp8(flat) if self.bits is None else quantise(flat, self.bits, search)

    def decode(self, stored: Tensor) -> Tensor:
        """Table rows of ``stored [n, items]``: float32 (float64 for fp64) ``[n * block, width]``."""
        if not self.scaled:
            return stored.to(torch.promote_types(stored.dtype, torch.float32))
        if self.bits is None:
            return from_fp8(stored).view(-1, self.width)
        return dequantise(stored, self.bits, self.block * self.width).view(-1, self.width)


def table_bytes(rows: int, width: int, precision: str) -> int:
    """Bytes of a float32 table ``[rows, width]`` stored at a precision, including scales and biases.

    >>> [table_bytes(1000, 16, p) for p in ("fp32", "fp16", "fp8", "int8", "int4", "int2")]
    [64000, 32000, 18000, 20000, 12000, 8000]
    """
    block, size = _stored_row(width, precision, min(rows, _BLOCK))
    return -(-rows // block) * size


@cache
def _stored_row(width: int, precision: str, rows: int) -> tuple[int, int]:
    """Rows that share a stored row, and its bytes; kept, since planning asks for the same few by the ten thousand."""
    layout = Layout.of(width, precision, rows=rows)
    return layout.block, layout.row_bytes


@torch.no_grad()
def round_rows_(table: Tensor, precision: str, search: Search | None = None) -> Tensor:
    """Replace the rows of a table ``[rows, width]`` by those that a file of a precision holds, in place.

    Args:
        search: of scales; by default that of :data:`SEARCHES`.

    >>> round_rows_(torch.tensor([[0.1, 0.2, 0.3, 0.9] * 2]), "int2").unique().tolist()
    [0.125, 0.375, 0.875]
    """
    layout = Layout.of(table.shape[1], precision, table.dtype, len(table))
    size = max(1, _CHUNK // (layout.block * layout.width)) * layout.block
    for rows in table.split(size):
        stored = layout.encode(rows, search or SEARCHES.get(precision, "minmax"))
        rows.copy_(layout.decode(stored)[: len(rows)])
    return table


def rows_within(available: int, width: int, precision: str) -> int:
    """Rows of ``width`` elements that fit ``available`` bytes at a precision, in full blocks where rows share scales.

    >>> [rows_within(64_000, 16, p) for p in ("fp32", "int8")], rows_within(100, 1, "int8")
    ([1000, 3200], 64)
    """
    layout = Layout.of(width, precision, rows=_BLOCK)
    return available // layout.row_bytes * layout.block


def matrix_bytes(elements: int, precision: str) -> int:
    """Bytes of parameters that every lookup reads entirely (projections, networks): 16-bit if rows are quantised.

    >>> matrix_bytes(256, "fp32"), matrix_bytes(256, "int4")
    (1024, 512)
    """
    return elements * (4 if precision == "fp32" else 2)


def _grid(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of rows that span ``low`` to ``high``: float32 ``[n, 1]``, exact in fp16."""
    bias = low.half()
    below = torch.nextafter(bias, torch.full_like(bias, -torch.inf))
    # FBGEMM rounds both to nearest. Where that would clip an end of the range by more than half a step (offsets far
    # from zero, scales that are subnormal in fp16) the neighbour that covers it is taken.
    step = (high - low).abs() / levels
    bias = torch.where(bias.float() - low > step / 2, below, bias).float()
    scale = ((high - bias) / levels).half()
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    short = high - (bias + levels * scale.float())
    scale = torch.where((short > step / 2) & (short > 0), above, scale).float()
    return torch.where((scale == 0) | torch.isinf(1 / scale), torch.ones_like(scale), scale), bias


def _codes(values: Tensor, scale: Tensor, bias: Tensor, levels: int) -> Tensor:
    return ((values - bias) * (1 / scale)).round_().clamp_(0, levels)


def quantise(values: Tensor, bits: int, search: Search = "minmax") -> Tensor:
    """Rows as codes with their scale and bias at the head.

    Args:
        values: float32 ``[n, width]``, finite and within ±65504.
        bits: 8, 4 or 2.
        search: ``"minmax"`` covers each row's range; ``"greedy"`` narrows it while the squared error falls, as
            FBGEMM's ``param_search_greedy`` does, which pays at 4 bits; ``"mse"`` goes on from there, codes and the
            line through them (scale and bias, by least squares) in turns, which pays at 2 bits.

    Returns:
        uint8 ``[n, 4 + ceil(width * bits / 8)]``.

    >>> rows = torch.tensor([[0.0, 5.0, 10.0, 15.0]])
    >>> quantise(rows, 4).tolist()[0][4:], dequantise(quantise(rows, 4), 4, 4).tolist()
    ([80, 250], [[0.0, 5.0, 10.0, 15.0]])
    """
    levels = (1 << bits) - 1
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale, bias = _grid(low, high, levels)
    if search != "minmax":
        scale, bias = _greedy(values, low, high, scale, bias, levels)
    if search == "mse":
        # From two starts, since each ends at the nearest minimum.
        found = [_least_squares(values, *start, levels) for start in ((scale, bias), _grid(low, high, levels))]
        errors = [_squared_error(values, *line, levels) for line in found]
        scale, bias = (torch.where(errors[1] < errors[0], b, a) for a, b in zip(*found, strict=True))
    return _packed(_codes(values, scale, bias, levels), bits, scale, bias)


def at_step(values: Tensor, bits: int, step: float | Tensor) -> Tensor:
    """As :func:`quantise`, for values that are multiples of a step: code ``q + 2**(bits - 1)`` of ``q * step``.

    Args:
        step: of all rows, or ``[n, 1]``.

    >>> rows = torch.tensor([[-1.0, 0.25, 0.0, 1.75]])
    >>> dequantise(at_step(rows, 4, 0.25), 4, 4).tolist()
    [[-1.0, 0.25, 0.0, 1.75]]
    """
    scale = torch.as_tensor(step, dtype=torch.float32, device=values.device).expand(len(values), 1)
    bias = scale * -(1 << (bits - 1))
    return _packed(_codes(values, scale, bias, (1 << bits) - 1), bits, scale, bias)


def _packed(numbers: Tensor, bits: int, scale: Tensor, bias: Tensor) -> Tensor:
    """Codes behind their scale and bias."""
    codes = packed(numbers.to(torch.uint8), bits)
    head = torch.cat([scale, bias], 1).half().contiguous().view(torch.uint8)
    return torch.cat([head, codes], 1)


def _greedy(
    values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bias: Tensor, levels: int, bins: int = 64, steps: int = 24
) -> tuple[Tensor, Tensor]:
    """Scale and bias of least error found by shrinking the range in steps, each at the end where it costs less."""

    def loss(scale: Tensor, bias: Tensor) -> Tensor:
        return _squared_error(values, scale, bias, levels)

    best, step = loss(scale, bias), (high - low) / bins
    for _ in range(steps):
        up, down = _grid(low + step, high, levels), _grid(low, high - step, levels)
        loss_up, loss_down = loss(*up), loss(*down)
        rise = loss_up < loss_down
        low, high = torch.where(rise, low + step, low), torch.where(rise, high, high - step)
        found = torch.minimum(loss_up, loss_down)
        better = found < best
        best = torch.where(better, found, best)
        scale = torch.where(better, torch.where(rise, up[0], down[0]), scale)
        bias = torch.where(better, torch.where(rise, up[1], down[1]), bias)
    return scale, bias


def _squared_error(values: Tensor, scale: Tensor, bias: Tensor, levels: int) -> Tensor:
    back = _codes(values, scale, bias, levels).mul_(scale).add_(bias)
    return back.sub_(values).square_().sum(1, keepdim=True)


def _least_squares(values: Tensor, scale: Tensor, bias: Tensor, levels: int, steps: int = 12) -> tuple[Tensor, Tensor]:
    """Scale and bias of least error found from given ones: the codes nearest to the values, and the line that fits the
    values of these codes best, in turns (Lloyd's algorithm for levels at equal distances)."""
    best, current = _squared_error(values, scale, bias, levels), (scale, bias)
    mean = values.mean(1, keepdim=True)
    for _ in range(steps):
        codes = _codes(values, *current, levels)
        middle = codes.mean(1, keepdim=True)
        codes -= middle
        spread = codes.square().sum(1, keepdim=True)
        slope = (codes * (values - mean)).sum(1, keepdim=True) / torch.where(spread > 0, spread, 1.0)
        line = slope.half().float()
        usable = (spread > 0) & (line > 0) & torch.isfinite(1 / line)
        line = torch.where(usable, line, current[0])
        start = torch.where(usable, (mean - line * middle).half().float(), current[1])
        current = line, torch.where(torch.isfinite(start), start, current[1])
        found = _squared_error(values, *current, levels)
        better = found < best
        best = torch.where(better, found, best)
        scale, bias = torch.where(better, current[0], scale), torch.where(better, current[1], bias)
    return scale, bias


def _own(rows: Tensor) -> Tensor:
    """A copy with standard strides, so that it can be viewed as another dtype: torch calls a single row contiguous
    whatever its strides."""
    return rows.clone(memory_format=torch.contiguous_format)


def dequantise(rows: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of :func:`quantise` up to rounding: float32 ``[n, width]`` of uint8 ``[n, 4 + ...]``."""
    head = _own(rows[:, :HEAD]).view(torch.float16).float()
    codes = unpacked(rows[:, HEAD:], bits)[:, :width]
    # In place: allocating memory costs more than the arithmetic.
    return codes.float().mul_(head[:, :1]).add_(head[:, 1:])


def packed(codes: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`unpacked`, 0 beyond the width: uint8 ``[n, width]`` to ``[n, ceil(width * bits / 8)]``."""
    per = 8 // bits
    if per == 1:
        return codes
    codes = F.pad(codes, (0, -codes.shape[1] % per))
    codes = codes.view(len(codes), codes.shape[1] // per, per)  # also of no rows
    return (codes << (torch.arange(per, device=codes.device) * bits).to(torch.uint8)).sum(2, dtype=torch.uint8)


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """One code to a byte: uint8 ``[n, bytes * 8 / bits]`` of uint8 ``[n, bytes]``."""
    if bits == 8:
        return codes
    mask = (1 << bits) - 1
    return torch.stack([codes >> at & mask for at in range(0, 8, bits)], -1).flatten(1)


def to_fp8(values: Tensor) -> Tensor:
    """Rows as e4m3 numbers (1 sign, 4 exponent and 3 mantissa bits, largest 448) behind their scale.

    Args:
        values: float32 ``[n, width]``, finite and within ±65504.

    Returns:
        uint8 ``[n, 2 + width]``: the scale in fp16, a power of two by which the largest number of the row is within
        reach, then the numbers.

    >>> from_fp8(to_fp8(torch.tensor([[0.5, -3.0, 0.0, 100.0]]))).tolist()
    [[0.5, -3.0, 0.0, 96.0]]
    """
    largest = values.abs().amax(1, keepdim=True)
    # A power of two, so that decoding rounds nothing; the smallest that fp16 holds as a normal number.
    power = torch.ceil(torch.log2(largest / FP8_MAX)).clamp_(-14, 15)
    scale = torch.where(largest > 0, torch.exp2(power), 1.0).half().float()
    numbers = (values / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([scale.half().contiguous().view(torch.uint8), numbers], 1)


def from_fp8(rows: Tensor) -> Tensor:
    """Inverse of :func:`to_fp8` up to rounding: float32 ``[n, width]``."""
    scale = _own(rows[:, :FP8_HEAD]).view(torch.float16).float()
    return fp8_values(rows[:, FP8_HEAD:]) * scale


def fp8_values(numbers: Tensor) -> Tensor:
    """Float32 values of bytes that are e4m3 numbers, by integer operations, which every device and exporter has.

    >>> fp8_values(torch.tensor([0x38, 0xC0, 0x01], dtype=torch.uint8)).tolist()
    [1.0, -2.0, 0.001953125]
    """
    size = (numbers & 127).to(torch.int32)
    exponent, mantissa = size >> 3, size & 7
    normal = (8 + mantissa).float() * torch.exp2((exponent - 10).float())
    value = torch.where(exponent > 0, normal, mantissa.float() * 2.0**-9)
    return torch.where(numbers > 127, -value, value)


def head_to_tail(rows: Tensor, bits: int) -> Tensor:
    """From this layout to FBGEMM's fused rows: codes, then scale and bias; fp32 for 8 bits, fp16 for 4 and 2.

    >>> rows = quantise(torch.randn(5, 8), 8)
    >>> head_to_tail(rows, 8).shape, bool((tail_to_head(head_to_tail(rows, 8), 8) == rows).all())
    (torch.Size([5, 16]), True)
    """
    head = _own(rows[:, :HEAD])
    if bits == 8:
        head = head.view(torch.float16).float().view(torch.uint8)
    return torch.cat([rows[:, HEAD:], head], 1)


def tail_to_head(rows: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`head_to_tail`; scales and biases that are fp32 are rounded to fp16, codes stay."""
    size = 8 if bits == 8 else HEAD
    tail = _own(rows[:, -size:])
    if bits == 8:
        tail = tail.view(torch.float32).half().view(torch.uint8)
    return torch.cat([tail, rows[:, :-size]], 1)
