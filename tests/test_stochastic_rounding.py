"""Stochastic rounding: mean, variance and independence of the random bits, and equal bits in torch and in C++."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recsys_embed.core import stochastic_rounding as rounding
from recsys_embed.core.precision import BITS
from recsys_embed.core.row_format import TRAINED, RowFormat
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native.row_steps import update_rows
from recsys_embed.optim import SGD

N = 40_000
NATIVE = not isinstance(native_library.library(), str)


def words(rows: int = N, width: int = 4, seed: int = 7, step: int = 3) -> Tensor:
    return rounding.random_words(torch.arange(rows), width, seed, step)


@pytest.mark.parametrize("where", [-129.7, -2.25, 0.0, 0.001, 0.5, 63.999, 126.4])
def test_mean_and_variance_are_those_of_two_neighbours(where: float) -> None:
    codes = rounding.round_to_codes(torch.full((N, 4), where * 0.25), 0.25, 8, words()).double() - 128
    expected = max(where, -128.0)
    part = expected - math.floor(expected)
    assert set(codes.unique().tolist()) <= {math.floor(expected), math.ceil(expected)}
    # Five standard errors of the mean of independent elements.
    assert abs(float(codes.mean()) - expected) <= 5 * math.sqrt(part * (1 - part) / codes.numel()) + 1e-7
    assert float(codes.var()) == pytest.approx(part * (1 - part), abs=0.01)


def test_random_bits_are_uniform_and_independent() -> None:
    """Every bit is set half of the time; neighbours in columns, rows, steps and seeds are uncorrelated."""
    a = words(width=16)
    bound = 5 / math.sqrt(a.numel())
    for bit in range(32):
        assert abs(float((a >> bit & 1).double().mean()) - 0.5) < bound / 2
    u = rounding.uniform(a).double()
    counts = torch.histc(u, 64, 0, 1)
    assert float(((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum()) < 63 + 5 * math.sqrt(126)

    def correlation(x: Tensor, y: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])

    pairs = {
        "columns": (u[:, :-1], u[:, 1:]),
        "distant columns": (u[:, :8], u[:, 8:]),
        "rows": (u[:-1], u[1:]),
        "steps": (u, rounding.uniform(words(width=16, step=4)).double()),
        "seeds": (u, rounding.uniform(words(width=16, seed=8)).double()),
    }
    found = {name: correlation(*pair) for name, pair in pairs.items()}
    assert all(abs(value) < bound * 1.2 for value in found.values()), found
    # No column repeats another's bits in another row.
    assert a.unique().numel() > a.numel() * (1 - a.numel() / 2**32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0003, -3.1e-3, 2.7e-6, 1.234e4])
def test_halves_keep_the_mean(dtype: torch.dtype, value: float) -> None:
    values = torch.full((N, 4), value)
    rounded = rounding.round_to_halves(values, dtype, words()).double()
    found = rounded.unique()
    assert len(found) <= 2
    assert float(found.min()) <= float(values[0, 0]) <= float(found.max())
    distance = float(found.max() - found.min())
    assert abs(float(rounded.mean()) - float(values[0, 0])) <= 2.5 * distance / math.sqrt(rounded.numel()) + 1e-12


def test_halves_keep_what_is_exact_infinite_or_not_a_number() -> None:
    values = torch.tensor([[0.0, -0.0, 1.5, -(2.0**-24), 65504.0, torch.inf, -torch.inf, torch.nan]])
    for dtype in (torch.float16, torch.bfloat16):
        got = rounding.round_to_halves(values, dtype, words(1, 8))
        expected = values if dtype == torch.float16 else torch.where(values == 65504, got.float(), values)
        assert torch.equal(got.float().nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(torch.signbit(got[:, :-1]), torch.signbit(values[:, :-1]))


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
@pytest.mark.parametrize("kind", TRAINED["lpt"])
@pytest.mark.parametrize("width", [1, 3, 8, 16, 27, 64])
@pytest.mark.parametrize("stochastic", [True, False])
def test_native_rows_are_those_of_torch(kind: str, width: int, stochastic: bool) -> None:
    torch.manual_seed(width)
    count, step = 300, 11
    values = torch.randn(count, width) * torch.logspace(-9, 4, count).unsqueeze(1)
    values[0, 0], values[-1, -1] = 0.0, -1e9
    rows = torch.randperm(2 * count)[:count]
    format = RowFormat(kind, 2.0**-7 if kind in BITS else 0.0, stochastic)
    table = LowPrecisionTable.empty(2 * count, width, format, torch.device("cpu"), seed=-5)
    table.fill_(0.0)
    before = table.stored.clone()
    # From rows of zeros a step of rate 1 by the negative values arrives at these.
    rule, log = SGD(1.0), StepLog(step - 1)
    log.advance(rule, 1.0)
    update_rows(rule, table, {}, rows, -values, log)
    drawn = rounding.random_words(rows, width, -5, step) if stochastic else None
    assert torch.equal(table.stored[rows], format.encode(values, drawn))
    untouched = torch.ones(2 * count, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(table.stored[untouched], before[untouched])
