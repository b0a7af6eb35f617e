"""FTRL-Proximal against the published algorithm in float64, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.kernels.native.lookup import knows

ROWS, WIDTH = 60, 24
SCHEMA = Schema([FeatureSpec("C1", ROWS, WIDTH, init="normal:0.3")])
NATIVE = pytest.mark.skipif(not knows(rse.FTRL()), reason="no kernels")
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])


class Published:
    """McMahan et al. 2013, Algorithm 1, one coordinate at a time in float64: weights come from z and n alone."""

    def __init__(self, rule: rse.FTRL, weight: Tensor) -> None:
        self.rule, self.n = rule, torch.zeros_like(weight)
        sign, curvature = torch.sign(weight), rule.beta / rule.lr + rule.l2
        self.z = -sign * rule.l1 - weight * curvature

    def weight(self) -> Tensor:
        r = self.rule
        inner = -(self.z - torch.sign(self.z) * r.l1) / ((r.beta + self.n.sqrt()) / r.lr + r.l2)
        return torch.where(self.z.abs() <= r.l1, 0.0, inner)

    def step(self, grad: Tensor, rows: Tensor) -> None:
        w = self.weight()
        for i in rows.tolist():
            g = grad[i]
            sigma = ((self.n[i] + g * g).sqrt() - self.n[i].sqrt()) / self.rule.lr
            self.z[i] += g - sigma * w[i]
            self.n[i] += g * g


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids with repeats, and gradients of their vectors."""
    generator = torch.Generator().manual_seed(step)
    ids = (torch.rand(40, 1, generator=generator).pow(2) * (ROWS - 5)).long()
    return ids, torch.randn(40, WIDTH, generator=generator) * 0.3


def summed(ids: Tensor, grad: Tensor) -> Tensor:
    return torch.zeros(ROWS, WIDTH, dtype=torch.float64).index_add_(0, ids[:, 0], grad.double())


def train(coll: EmbeddingCollection, steps: range) -> None:
    for step in steps:
        ids, grad = batch(step)
        coll(ids).reshape(-1, WIDTH).backward(grad)


@BACKENDS
@pytest.mark.parametrize(
    "rule",
    [
        rse.FTRL(lr=0.1),
        rse.FTRL(lr=0.5, beta=0.3, l1=0.4, l2=0.2),
        rse.FTRL(lr=0.1, l1=3.0),
        rse.FTRL(lr=0.05, beta=0.0, l1=0.01, l2=1e-3),
        rse.FTRL(lr=0.05, beta=0.0, l1=0.01, l2=1.0),
    ],
    ids=repr,
)
def test_steps_are_those_of_the_published_algorithm(rule: rse.FTRL, backend: str) -> None:
    coll = EmbeddingCollection(SCHEMA, None, rule, backend=backend)
    start = coll.table("C1.weight").detach().clone()
    oracle = Published(rule, start.double())
    for step in range(25):
        train(coll, range(step, step + 1))
        ids, grad = batch(step)
        oracle.step(summed(ids, grad), ids.unique())
    found, wanted = coll.table("C1.weight").detach(), oracle.weight()
    wanted = torch.where(oracle.n > 0, wanted, start.double())  # a weight without gradient, or curvature, stays
    torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=2e-5)
    assert torch.equal(found == 0, wanted == 0)
    state = coll.optimizer_state_dict()["state"]
    torch.testing.assert_close(
        next(v for k, v in state.items() if k.endswith("_sum")).double(), oracle.n, rtol=1e-5, atol=1e-6
    )
    z = next(v for k, v in state.items() if k.endswith("_z")).double()
    torch.testing.assert_close(z, oracle.z, rtol=2e-4, atol=2e-4)
    assert torch.equal(found[-5:], start[-5:]), "rows that no batch reads keep their bits"
    if rule.l1 == 3.0:
        assert float((found == 0).float().mean()) > 0.03


@BACKENDS
@pytest.mark.parametrize("rule", [rse.FTRL(lr=0.2, l1=0.05, l2=0.1), rse.FTRL(lr=0.2, beta=0.0, l1=0.05)], ids=repr)
def test_loaded_weights_are_trained_on_and_rates_move_nothing_by_themselves(rule: rse.FTRL, backend: str) -> None:
    coll = EmbeddingCollection(SCHEMA, None, rule, backend=backend)
    train(coll, range(10))
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) + 3
    name = coll.storages[0]
    coll.load_state_dict({**coll.state_dict(), name: weight})
    for rate in (0.2, 0.0, 0.001, 5.0):
        coll.lr = rate
        before = coll.table("C1.weight").detach().clone()
        (coll(torch.arange(ROWS).unsqueeze(1)) * 0).sum().backward()
        assert torch.equal(coll.table("C1.weight"), before), f"gradients of 0 at rate {rate}"
    coll.lr = 0.0
    train(coll, range(3))
    assert torch.equal(coll.table("C1.weight"), before), "rate 0 freezes weights"
    coll.lr = 1e-4
    train(coll, range(1))
    assert float((coll.table("C1.weight") - before).abs().max()) < 1e-3


@BACKENDS
def test_a_weight_leaves_zero_when_its_gradients_pass_l1(backend: str) -> None:
    schema = Schema([FeatureSpec("C1", 3, 1)])
    coll = EmbeddingCollection(schema, None, rse.FTRL(lr=0.1, l1=1.0), backend=backend)
    coll.load_state_dict({**coll.state_dict(), coll.storages[0]: torch.zeros(3, 1)})
    for key, state in coll.optimizer_state_dict()["state"].items():
        coll.optimizer.reset_state_(key.rpartition("_")[2], state, torch.zeros(3, 1))
    seen = []
    for _ in range(4):
        coll(torch.tensor([[1]])).reshape(1, 1).backward(torch.full((1, 1), 0.4))
        seen.append(float(coll.table("C1.weight")[1].detach()))
    assert seen[:2] == [0.0, 0.0]
    assert seen[3] < seen[2] < 0
    curvature = (1 + (3 * 0.16) ** 0.5) / 0.1
    assert seen[2] == pytest.approx(-(3 * 0.4 - 1) / curvature, rel=1e-5)
