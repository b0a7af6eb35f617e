"""Rows whose steps learn (ALPT, LSQ): the gradient of a step, its size, learning, and files that hold the steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, RowwiseAdagrad, Schema
from recsys_embed.core.program import Initializer
from recsys_embed.core.row_format import DEFAULT_STEPS, TRAINED, RowFormat
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.optim import SGD
from tests.test_low_precision import BACKENDS, EVERY_WAY, batch, collection, stored, train

LEARNED = [(q, kind) for q in ("alpt", "lsq") for kind in TRAINED[q]]


def table_of(coll: EmbeddingCollection) -> LowPrecisionTable:
    (table,) = coll.parameters()
    assert isinstance(table, LowPrecisionTable)
    return table


def rounded(rows: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The vectors of LSQ in float64, with its gradients by autograd: straight through the rounding, inside of codes."""
    codes = (rows / steps).clamp(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return (codes + (codes.round() - codes).detach()) * steps


@pytest.mark.parametrize(("quantization", "kind"), LEARNED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_that_of_the_gradient_by_autograd(backend: str, quantization: str, kind: str) -> None:
    """SGD: the step moves by its gradient, scaled, at its rate; alpt takes it at the stepped row."""
    lr, rate, bits = 0.1, 0.01, {"int8": 8, "int4": 4, "int2": 2}[kind]
    options = {"precision": kind, "quantization": quantization, "quantization_step_lr": rate}
    if quantization == "alpt":
        options["rounding"] = "nearest"
    coll = collection(SGD(lr), backend, **options)
    table = table_of(coll)
    rows, steps = table.all_unrounded().double(), table.distances().double().requires_grad_()
    raw = table.stored[:, -1:].double() if quantization == "lsq" else steps.detach()
    ids, weights = batch(0)
    torch.testing.assert_close(coll(ids).double(), rounded(rows, steps, bits)[ids + torch.tensor([0, 1000])])
    (coll(ids) * weights).sum().backward()
    places = (ids + torch.tensor([0, 1000])).flatten()
    of_rows = torch.zeros_like(rows).index_add_(0, places, weights.flatten(0, 1).double())
    after = rows - lr * of_rows
    at = (after if quantization == "alpt" else rows).requires_grad_()
    of_at, of_steps = torch.autograd.grad((rounded(at, steps, bits) * of_rows).sum(), (at, steps))
    wanted = raw - lr * rate * of_steps / math.sqrt(16 * (2 ** (bits - 1) - 1))
    wanted = torch.minimum(torch.maximum(wanted, raw / 2), raw * 2).detach()
    assert bool((of_steps != 0).any())
    got = table.stored[:, -1:].double() if quantization == "lsq" else table.distances().double()
    torch.testing.assert_close(got, wanted, rtol=1e-6 if quantization == "lsq" else 2.0**-11, atol=1e-7)
    if quantization == "lsq":
        torch.testing.assert_close(table.all_unrounded().double(), (rows - lr * of_at).detach(), rtol=1e-5, atol=1e-6)
    else:
        half, distance = 2.0 ** (bits - 1), table.distances().double()
        nearest = after.detach().clamp(-half * distance, (half - 1) * distance)
        assert bool(((table.to_dense() - nearest).abs() <= distance * 0.501).all())


@pytest.mark.parametrize("kind", TRAINED["lsq"])
def test_beyond_the_codes_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    """There rounding is constant, so that a step's gradient is exact: of a row of numbers that are all clipped."""
    bits = {"int8": 8, "int4": 4, "int2": 2}[kind]
    steps, values = torch.tensor([[0.01]], dtype=torch.float64), torch.tensor([[9.0, -9.0, 7.0, -8.0] * 2]).double()

    def clipped(at: Tensor) -> Tensor:
        return (values / at).round().clamp(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) * at

    moved = torch.linspace(1e-4, 8e-4, 8, dtype=torch.float64).unsqueeze(0)
    difference = ((clipped(steps + 1e-6) - clipped(steps - 1e-6)) / 2e-6 * moved).sum()
    format = RowFormat(kind, 0.01, quantization="alpt", step_rate=0.1)
    got = format._moved_steps(moved, (values / steps).float(), steps.float())
    wanted = 0.01 + 0.1 * float(difference) / math.sqrt(8 * (2 ** (bits - 1) - 1))
    assert float(got) == pytest.approx(min(max(wanted, 0.005), 0.02), rel=1e-5)


def test_steps_are_written_back_without_bias() -> None:
    """Moves far below the distance of two fp16 numbers move steps in the mean."""
    format = RowFormat("int8", 2.0**-6, quantization="alpt", step_rate=1.0)
    table = LowPrecisionTable.empty(4000, 16, format, torch.device("cpu"), seed=3)
    table.fill_from(lambda start, count: torch.zeros(count, 16))
    rows, first = torch.arange(4000), float(table.distances()[0])
    # A quarter of a code below 0: slope 1/4 in every column, and 16 moves of -step/4.
    exact = first - 16 * (first / 4) * (1 / 4) / math.sqrt(16 * 127)
    table.step_rows(rows, torch.full((4000, 16), -first / 4), 1)
    steps = table.distances()
    distance = 2.0**-17
    assert set(((steps - exact) / distance).floor().unique().tolist()) <= {-1.0, 0.0}
    assert abs(float(steps.double().mean()) - exact) < 5 * distance / 2 / math.sqrt(4000)
    values = table.to_dense()
    assert abs(float(values.double().mean()) + first / 4) < 5 * first / 2 / math.sqrt(64_000)


@pytest.mark.parametrize("quantization", ["alpt", "lsq"])
def test_rows_that_start_at_zero_have_steps_whatever_their_memory_held(quantization: str) -> None:
    format = RowFormat("int8", 2.0**-6, quantization=quantization)
    table = LowPrecisionTable.empty(50, 16, format, torch.device("cpu"), seed=3)
    table.stored.zero_()
    Initializer("constant").fill_(table, seed=0)
    assert float(table.distances().min()) >= 2.0**-6
    assert not table.to_dense().any()


@EVERY_WAY
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_way_learns_as_float32_does_and_leaves_unseen_rows(backend: str, quantization: str) -> None:
    """Regression on a table of signs: the loss falls near that of float32."""
    schema = Schema([FeatureSpec("id", 200, 16, init="normal:0.05")])
    target = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).sign() * 0.1
    losses = {}
    for name in ("ptq", quantization):
        plan = Plan.uniform(schema, "full", precision="int8", quantization=name)
        coll = EmbeddingCollection(schema, plan, RowwiseAdagrad(0.05), backend=backend)
        before = next(iter(stored(coll)), None)
        for number in range(150):
            ids = torch.randint(100, (64, 1), generator=torch.Generator().manual_seed(number))
            loss = (coll(ids)[:, 0] - target[ids[:, 0]]).square().sum() / 2
            loss.backward()
        losses[name] = float((coll(torch.arange(100).unsqueeze(1))[:, 0].detach() - target[:100]).square().mean())
        if before is not None:
            assert torch.equal(stored(coll)[0][100:], before[100:])
    assert losses["ptq"] < 1e-5
    # Numbers that are rounded at random are off by half the distance of two codes.
    assert losses[quantization] < losses["ptq"] + 0.5 * float(table_of(coll).distances().square().mean())


def test_steps_grow_where_values_reach_beyond_the_codes() -> None:
    schema = Schema([FeatureSpec("id", 50, 16, init="normal:0.001")])
    ids, found = torch.arange(50).unsqueeze(1), {}
    for quantization in ("lpt", "alpt"):
        plan = Plan.uniform(schema, "full", precision="int4", quantization=quantization)
        coll = EmbeddingCollection(schema, plan, RowwiseAdagrad(0.05))
        for _ in range(100):
            (coll(ids) - 0.3).square().sum().backward()
        found[quantization] = float(coll(ids).detach().mean())
    assert found["lpt"] < 0.03  # its last code
    assert found["alpt"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(("quantization", "kind"), LEARNED)
def test_files_hold_the_codes_and_steps_of_the_rows(quantization: str, kind: str, tmp_path: Path) -> None:
    coll = train(collection(RowwiseAdagrad(0.05), precision=kind, quantization=quantization))
    table, path = table_of(coll), tmp_path / "m.rse"
    steps, values = table.distances(), table.to_dense()
    assert len(steps.unique()) > 100
    rse.export(coll.eval(), path, prune=False)
    ids, _ = batch(0)
    served = rse.load(path)
    assert torch.equal(served(ids), coll(ids))
    file = load_file(path)
    for name, rows in (("C0", slice(0, 1000)), ("C1", slice(1000, 1300))):
        saved = file[f"{name}.weight"]
        assert torch.equal(saved[:, :2].clone().view(torch.float16).float(), steps[rows])
        if quantization == "alpt":
            assert torch.equal(saved, table.stored[rows])
    assert torch.equal(table.to_dense(), values)


@pytest.mark.parametrize(("quantization", "kind"), LEARNED)
def test_weights_of_float32_training_are_taken_over(quantization: str, kind: str) -> None:
    source = train(collection(RowwiseAdagrad(0.05), precision="fp32", quantization="ptq"))
    coll = collection(RowwiseAdagrad(0.05), precision=kind, quantization=quantization)
    with torch.no_grad():
        table_of(coll).copy_(next(source.parameters()))
    weights, table = next(source.parameters()).detach(), table_of(coll)
    if quantization == "lsq":
        assert torch.equal(table.all_unrounded(), weights)
        bits = table.format.bits or 0
        wanted = 2 * weights.abs().mean(1, keepdim=True) / math.sqrt(2 ** (bits - 1) - 1)
        torch.testing.assert_close(table.stored[:, -1:], wanted.clamp_min(DEFAULT_STEPS[kind]))
    else:
        assert bool(((table.to_dense() - weights).abs() <= 0.501 * table.distances()).all())
