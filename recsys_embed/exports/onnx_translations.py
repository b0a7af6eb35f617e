"""The translations themselves, in onnxscript; importing this module needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recsys_embed.exports.onnx_opset import OPSET, PURPOSE
from recsys_embed.utils.optional import require

onnxscript = require("onnxscript", extra="onnx", purpose=PURPOSE)
torchlib = require("onnxscript.function_libs.torch_lib.ops.core", extra="onnx", purpose=PURPOSE)
ir = onnxscript.ir
op = getattr(onnxscript, f"opset{OPSET}")


def integer(value: Any, like: Any) -> Any:
    """Integers of Python as constants of ``like``'s type."""
    return op.Constant(value=ir.tensor(value, dtype=like.dtype)) if isinstance(value, int) else value


def divide(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    """``div`` with a rounding mode; integers stay exact."""
    if rounding_mode is None or not x.dtype.is_integer():
        return torchlib.aten_div_mode(x, y, rounding_mode=rounding_mode)
    y = integer(y, x)
    return torchlib.aten_floor_divide(x, y) if rounding_mode == "floor" else op.Div(x, y)


def shift_right(x: Any, bits: Any) -> Any:
    """``>>``, of signed integers too."""
    # ONNX shifts unsigned integers only: zeros move in, then the sign is copied down, (v ^ m) - m with m its bit.
    signed = x.dtype
    if not signed.is_signed():
        return op.BitShift(x, integer(bits, x), direction="RIGHT")
    width, unsigned = signed.bitwidth, ir.DataType[f"U{signed.name}"]
    at = op.Cast(integer(bits, x), to=unsigned)
    moved = op.Cast(op.BitShift(op.Cast(x, to=unsigned), at, direction="RIGHT"), to=signed)
    top = op.Constant(value=ir.tensor(1 << (width - 1), dtype=unsigned))
    sign = op.Cast(op.BitShift(top, at, direction="RIGHT"), to=signed)
    return op.Sub(op.BitwiseXor(moved, sign), sign)


def shift_left(x: Any, bits: Any) -> Any:
    """``<<``, of signed integers too."""
    unsigned = ir.DataType[f"U{x.dtype.name}"] if x.dtype.is_signed() else x.dtype
    moved = op.BitShift(op.Cast(x, to=unsigned), op.Cast(integer(bits, x), to=unsigned), direction="LEFT")
    return op.Cast(moved, to=x.dtype)


def embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Any, ...]:
    """``embedding_bag``, all bags at once."""
    number, zero, one = ir.DataType.FLOAT, ints(0), ints(1)
    rows = op.Cast(op.Gather(weight, indices), to=number)
    if per_sample_weights is not None:
        rows = op.Mul(rows, op.Unsqueeze(op.Cast(per_sample_weights, to=number), one))
    # Bag of every id: an offset starts a bag, so count the offsets up to each place. The slot behind the last id
    # takes the offsets of empty bags at the end.
    slots = op.Add(op.Shape(indices), one)
    starts = op.ScatterElements(op.Expand(zero, slots), offsets, op.Expand(one, op.Shape(offsets)), reduction="add")
    bag = op.Sub(op.Slice(op.CumSum(starts, op.Constant(value_int=0)), zero, op.Shape(indices), zero), one)
    # Ids before the first offset have no bag: beyond the last row, where the scatter refuses them.
    bags = op.Shape(offsets)
    where = op.Unsqueeze(op.Where(op.Less(bag, zero), bags, bag), one)
    kept = None
    if padding_idx is not None and padding_idx >= 0:
        kept = op.Not(op.Equal(indices, ints(padding_idx)))
    lowest = op.Constant(value_float=torch.finfo(torch.float32).min if mode == 2 else 0.0)
    if kept is not None:
        rows = op.Where(op.Unsqueeze(kept, one), rows, lowest)
    shape = op.Concat(bags, op.Shape(weight, start=1), axis=0)
    out = op.ScatterND(op.Expand(lowest, shape), where, rows, reduction="max" if mode == 2 else "add")
    if mode:
        each = op.Expand(op.Constant(value_float=1.0), op.Shape(indices))
        each = each if kept is None else op.Cast(kept, to=number)
        count = op.ScatterND(op.Expand(op.Constant(value_float=0.0), bags), where, each, reduction="add")
        count = op.Unsqueeze(count, one)
        if mode == 1:
            out = op.Div(out, op.Max(count, op.Constant(value_float=1.0)))
        else:
            out = op.Where(op.Greater(count, op.Constant(value_float=0.0)), out, op.Constant(value_float=0.0))
    if include_last_offset:
        out = op.Slice(out, zero, ints(-1), zero)
    # Nothing reads the other outputs, which torch shapes otherwise: a value of this graph under their shapes would be
    # given another's memory.
    return op.Cast(out, to=weight.dtype), *(op.Reshape(x, ints(-1)) for x in (bag, bags, bags))


def ints(value: int) -> Any:
    """A constant of one int64."""
    return op.Constant(value_ints=[value])


def array(values: Any, dtype: str) -> Any:
    """A constant array."""
    kind = ir.DataType[dtype]
    return op.Constant(value=ir.tensor(values.astype(kind.numpy()), dtype=kind))


def bucketize(x: Any, edges: Any, out_int32: bool = False, right: bool = False) -> Any:
    """``bucketize``, by bisection."""
    count = edges.shape[0] if edges.shape is not None else None
    if not isinstance(count, int):
        raise NotImplementedError("torch.bucketize with a varying number of boundaries")
    passes = op.LessOrEqual if right else op.Less
    place = op.Cast(op.Less(x, x), to=ir.DataType.INT64)  # zeros
    for step in reversed(range(count.bit_length())):
        # Of 2**step more boundaries, all lie before x if the last does.
        ahead = op.Add(place, ints(1 << step))
        known = op.Gather(edges, op.Sub(op.Min(ahead, ints(count)), ints(1)))
        place = op.Where(op.And(op.LessOrEqual(ahead, ints(count)), passes(known, x)), ahead, place)
    return op.Cast(place, to=ir.DataType.INT32) if out_int32 else place


def view_as(x: Any, dtype: int) -> Any:
    """``view(dtype)``: bytes read as float16."""
    if x.dtype == ir.DataType.UINT8 and dtype == ir.DataType.FLOAT16:
        return halves(x)
    raise NotImplementedError(f"bytes of {x.dtype.name} read as {ir.DataType(dtype).name}")


def halves(x: Any) -> Any:
    """Pairs of bytes as float16."""
    # Sign and exponent are six bits, so a table of 64 knows what the mantissa is worth and whether a 1 precedes it.
    exponent = np.arange(64) % 32
    worth = np.ldexp(1.0, np.maximum(exponent, 1) - 25)
    worth = np.where(exponent == 31, np.inf, worth) * np.where(np.arange(64) < 32, 1, -1)
    first = np.where(exponent > 0, 1024, 0)
    low, high = (op.Cast(op.Slice(x, ints(i), ints(2**62), ints(-1), ints(2)), to=ir.DataType.INT64) for i in (0, 1))
    top = op.Div(high, ints(4))
    mantissa = op.Add(op.Mul(op.Mod(high, ints(4)), ints(256)), op.Add(low, op.Gather(array(first, "INT64"), top)))
    value = op.Mul(op.Cast(mantissa, to=ir.DataType.FLOAT), op.Gather(array(worth, "FLOAT"), top))
    unknown = op.And(op.Gather(array(exponent == 31, "BOOL"), top), op.Greater(mantissa, ints(1024)))
    return op.Cast(op.Where(unknown, array(np.array(np.nan), "FLOAT"), value), to=ir.DataType.FLOAT16)


def whether_any(x: Any) -> Any:
    """``any`` over all elements."""
    # A sum, because a maximum over no elements is not False.
    return op.Greater(op.ReduceSum(op.Cast(x, to=ir.DataType.INT64), keepdims=False), op.Constant(value_int=0))


def whether_all(x: Any) -> Any:
    """``all`` over all elements."""
    return op.Not(whether_any(op.Not(op.Cast(x, to=ir.DataType.BOOL))))


_aten = torch.ops.aten
_SAME: dict[Callable[..., Any], tuple[Any, ...]] = {
    divide: (_aten.div.Tensor_mode, _aten.div.Scalar_mode),
    shift_right: (_aten.__rshift__.Scalar, _aten.__rshift__.Tensor),
    shift_left: (_aten.__lshift__.Scalar, _aten.__lshift__.Tensor),
    embedding_bag: (_aten.embedding_bag.padding_idx, _aten.embedding_bag.default),
    bucketize: (_aten.bucketize.Tensor,),
    view_as: (_aten.view.dtype,),
    whether_any: (_aten.any.default,),
    whether_all: (_aten.all.default,),
}
_SAME[shift_right] += (_aten.bitwise_right_shift.Tensor_Scalar, _aten.bitwise_right_shift.Tensor)
_SAME[shift_left] += (_aten.bitwise_left_shift.Tensor_Scalar, _aten.bitwise_left_shift.Tensor)
_SAME[embedding_bag] += (_aten._embedding_bag.default, _aten._embedding_bag_forward_only.default)
TRANSLATIONS: dict[Any, Callable[..., Any]] = {name: function for function, names in _SAME.items() for name in names}
