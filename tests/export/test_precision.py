"""Rows at a precision: FBGEMM's bytes, bounded errors, and converters that lose nothing."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recsys_embed.core.precision import (
    BITS,
    Layout,
    Precision,
    dequantise,
    fp8_values,
    from_fp8,
    head_to_tail,
    matrix_bytes,
    quantise,
    table_bytes,
    tail_to_head,
    to_fp8,
)
from recsys_embed.kernels import fbgemm

HAS_FBGEMM = importlib.util.find_spec("fbgemm_gpu") is not None
needs_fbgemm = pytest.mark.skipif(not HAS_FBGEMM, reason="fbgemm is not installed")
KINDS = pytest.mark.parametrize("kind", list(BITS))


def rows(n: int, width: int, std: float = 1.0, offset: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * std + offset


@given(
    width=st.integers(1, 33),
    scale=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_no_element_is_further_than_a_step_from_its_code(width, scale, offset, bits, seed) -> None:
    values = rows(9, width, scale, offset, seed)
    back = dequantise(quantise(values, bits), bits, width)
    span, largest = (values.amax(1) - values.amin(1)).double(), values.abs().amax(1).double()
    # A step of the range as fp16 may have to widen it: by a bias below the minimum, and by a scale rounded up. Half of
    # it is lost to rounding, the other half at most to an end that is cut off.
    smallest = 2.0**-24
    bias = torch.clamp(largest * 2.0**-10, min=smallest)
    allowed = (span + bias) / (2**bits - 1) * (1 + 2.0**-10) + smallest + largest * 2.0**-22
    assert ((back.double() - values.double()).abs().amax(1) <= allowed).all()


@KINDS
def test_constant_and_zero_rows(kind: str) -> None:
    bits = BITS[kind]
    values = torch.tensor([[0.0] * 6, [0.1] * 6, [-3.7] * 6, [65504.0] * 6])
    back = dequantise(quantise(values, bits), bits, 6)
    assert (back[0] == 0).all()
    assert torch.allclose(back, values, rtol=1e-5, atol=0)


@KINDS
def test_integers_that_a_code_can_hold_are_exact(kind: str) -> None:
    top = 2 ** BITS[kind] - 1
    values = torch.arange(top + 1, dtype=torch.float32).repeat(2, 1) - 7
    assert torch.equal(dequantise(quantise(values, BITS[kind]), BITS[kind], top + 1), values)


def test_the_even_column_is_the_low_half_of_a_byte() -> None:
    stored = quantise(torch.tensor([[0.0, 15.0, 1.0]]), 4)
    assert stored[0, 4:].tolist() == [0xF0, 0x01]
    assert stored[0, :4].view(torch.float16).tolist() == [1.0, 0.0]


@KINDS
def test_greedy_search_is_never_worse(kind: str) -> None:
    bits = BITS[kind]
    values = torch.cat([rows(200, 16), rows(200, 16) ** 3, rows(50, 16, 1e-4), rows(50, 16, 1e-3, 1.0)])

    def error(search) -> Tensor:
        return (dequantise(quantise(values, bits, search), bits, 16) - values).square().sum(1)

    assert (error("greedy") <= error("minmax")).all()
    assert (error("mse") <= error("greedy")).all()
    if bits < 8:
        assert error("greedy").sum() < 0.9 * error("minmax").sum()
    if bits == 2:
        assert error("mse").sum() < 0.9 * error("greedy").sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tail_and_head_layouts_convert_back(bits: int) -> None:
    stored = quantise(rows(20, 11), bits)
    assert torch.equal(tail_to_head(head_to_tail(stored, bits), bits), stored)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("width", [1, 2, 5, 8, 13, 64])
def test_bytes_are_those_of_the_stored_rows(precision: str, width: int) -> None:
    values = rows(131, width)
    layout = Layout.of(width, precision)
    stored = layout.encode(values)
    assert stored.nbytes == layout.nbytes(131) == table_bytes(131, width, precision)
    assert stored.shape == (layout.stored_rows(131), layout.items)
    assert layout.decode(stored)[:131].shape == values.shape
    assert torch.equal(layout.decode(stored)[:131], values) == (precision == "fp32")
    if precision in BITS and width >= 8:
        assert layout.row_bytes == 4 + -(-width * BITS[precision] // 8)
    if precision == "fp8" and width >= 8:
        assert layout.row_bytes == 2 + width


def test_narrow_rows_share_scales() -> None:
    """A row of one element with its own scale and bias would take more than the element."""
    for width in range(1, 8):
        assert table_bytes(6400, width, "int8") < 0.6 * table_bytes(6400, width, "fp16")
        assert table_bytes(6400, width, "int4") < 0.4 * table_bytes(6400, width, "fp16")
        assert table_bytes(6400, width, "int2") < 0.25 * table_bytes(6400, width, "fp16")
        assert table_bytes(6400, width, "fp8") < 0.6 * table_bytes(6400, width, "fp16")


def test_matrices_take_four_bytes_or_two() -> None:
    assert [matrix_bytes(10, p) for p in ("fp32", "fp16", "bf16", "int8", "int4")] == [40, 20, 20, 20, 20]


def test_bytes_of_fp8_are_the_numbers_of_torchs_type() -> None:
    numbers = torch.tensor([n for n in range(256) if n & 127 != 127], dtype=torch.uint8)  # two are no numbers
    assert torch.equal(fp8_values(numbers), numbers.view(torch.float8_e4m3fn).float())


@given(
    width=st.integers(1, 33),
    scale=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 100.0, 1e4]),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 1000),
)
def test_fp8_keeps_three_bits_of_every_number_that_is_not_tiny_in_its_row(width, scale, offset, seed) -> None:
    values = rows(9, width, scale, offset, seed).clamp(-65504, 65504)
    back = from_fp8(to_fp8(values)).double()
    # The scale is a power of two, so that a row's largest number lies between 224 and 448 steps of it; below 2**-6 of a
    # step, numbers are 2**-9 apart.
    step = torch.clamp(values.double().abs().amax(1, keepdim=True) / 224, min=2.0**-14)
    allowed = torch.maximum(values.double().abs() * 2.0**-4, step * 2.0**-10)
    assert ((back - values.double()).abs() <= allowed).all()


def test_no_scale_and_bias_fit_two_bits_better() -> None:
    """Beside a search over all ranges of a row, in float64."""
    values = torch.cat([rows(40, 16), rows(40, 16) ** 3, rows(20, 16, 0.1, 1.0)])
    ours = (dequantise(quantise(values, 2, "mse"), 2, 16) - values).square().sum(1).double()
    low, high = values.amin(1, keepdim=True).double(), values.amax(1, keepdim=True).double()
    best, ends = torch.full((len(values),), torch.inf, dtype=torch.float64), torch.linspace(0, 1, 41).double()
    for a in ends[:-1]:
        for b in ends[ends > a]:
            bias, scale = low + a * (high - low), (b - a) * (high - low) / 3
            back = ((values - bias) / scale).round().clamp(0, 3) * scale + bias
            best = torch.minimum(best, (back - values).square().sum(1))
    assert (ours < 1.15 * best + 1e-6).float().mean() > 0.9
    assert ours.sum() < 1.02 * best.sum()


# -- beside FBGEMM ----------------------------------------------------------------------------------------------------


@needs_fbgemm
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_scale_and_bias_are_fbgemms(bits: int) -> None:
    fbgemm.require_fbgemm()
    values = torch.cat([rows(500, 16), rows(500, 16, 0.1, 0.3, 1), torch.zeros(1, 16)])
    theirs = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(values, bits)
    # At both widths the operator writes an fp16 tail, as this module does at 4 bits.
    assert torch.equal(quantise(values, bits), tail_to_head(theirs, 4))
    if bits == 8:
        fused = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(head_to_tail(quantise(values, 8), 8))
        assert torch.allclose(fused, dequantise(quantise(values, 8), 8, 16), rtol=0, atol=1e-6)


@needs_fbgemm
def test_where_fbgemm_clips_the_error_is_smaller() -> None:
    fbgemm.require_fbgemm()
    for std, offset in ((1e-3, 1.0), (1e-5, 0.0)):
        values = rows(500, 16, std, offset)
        theirs = tail_to_head(torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(values, 8), 4)
        ours = quantise(values, 8)
        errors = [(dequantise(q, 8, 16) - values).square().mean().sqrt() for q in (ours, theirs)]
        assert errors[0] < 0.5 * errors[1]


@needs_fbgemm
@KINDS
@pytest.mark.parametrize("width", [8, 12, 16, 36, 64, 132])
def test_fbgemms_inference_tables_serve_the_very_bytes(kind: str, width: int) -> None:
    fbgemm.require_fbgemm()
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    layout = Layout.of(width, kind)
    stored = layout.encode(rows(60, width))
    tables = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", 60, width, SparseType(kind), EmbeddingLocation.HOST)],
        device="cpu",
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
    )
    tables.initialize_weights()
    tables.split_embedding_weights(split_scale_shifts=False)[0][0].copy_(stored)
    ids, offsets = torch.tensor([3, 59, 0, 3, 7]), torch.tensor([0, 2, 2, 5])
    pooled = torch.nn.functional.embedding_bag(
        ids, layout.decode(stored), offsets, mode="sum", include_last_offset=True
    )
    assert torch.allclose(tables(ids.int(), offsets.int()), pooled, rtol=1e-6, atol=1e-6)


@needs_fbgemm
@KINDS
@pytest.mark.parametrize("width", [8, 9, 14, 16, 64, 100])
def test_rows_read_by_fbgemm_are_the_same_bits(kind: str, width: int) -> None:
    layout = Layout.of(width, kind)
    if not fbgemm.usable(layout):
        assert width * BITS[kind] % 8
        return
    stored, read = layout.encode(rows(300, width)), fbgemm.RowReader(layout)
    for ids in (torch.randint(0, 300, (999,)), torch.tensor([0]), torch.tensor([299, 298, 5]), torch.tensor([]).long()):
        assert torch.equal(read(stored, ids), layout.decode(stored.index_select(0, ids)))
    few = stored[:3].clone()
    assert torch.equal(read(few, torch.tensor([2, 0])), layout.decode(few[[2, 0]]))
    for wrong in ([300], [-1]):
        with pytest.raises(IndexError, match=r"rows must be in \[0, 300\)"):
            read(stored, torch.tensor(wrong))
