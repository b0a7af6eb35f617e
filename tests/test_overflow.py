"""Gradients whose squares overflow float32: every rule does what torch's own does, and no weight becomes NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.optim import list_rules, make_rule

ROWS, LARGE = 6, (1e18, 1e19, 2e19, 1e30, 3e38)
# Of tables of one column, whose row-wise rules are torch's rules per weight.
TORCH: dict[tuple[str, str], Any] = {
    ("sgd", "all"): lambda p: torch.optim.SGD(p, lr=0.1),
    ("sgd", "touched"): lambda p: torch.optim.SGD(p, lr=0.1),
    ("adam", "all"): lambda p: torch.optim.Adam(p, lr=0.1),
    ("adagrad", "all"): lambda p: torch.optim.Adagrad(p, lr=0.1),
    ("adagrad", "touched"): lambda p: torch.optim.Adagrad(p, lr=0.1),
    ("rowwise_adagrad", "touched"): lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8),
    ("rowwise_rmsprop", "all"): lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.99, eps=1e-8),
}


def collection(name: str, rows: str, width: int, backend: str) -> rse.EmbeddingCollection:
    schema = rse.Schema([rse.FeatureSpec("a", ROWS, width, init="normal:1")])
    rule = make_rule(name, lr=0.1, rows=rows)
    return rse.EmbeddingCollection(schema, None, rule, backend=backend, seed=0)


def gradients(large: float, width: int) -> list[Tensor]:
    """Ordinary, large in some rows and of both signs, ordinary twice."""
    g = torch.Generator().manual_seed(1)
    steps = [torch.randn(ROWS, width, generator=g) for _ in range(4)]
    steps[1][1], steps[1][3] = large, -large
    return steps


def stepped(coll: rse.EmbeddingCollection, grads: list[Tensor]) -> Tensor:
    ids = torch.arange(ROWS).unsqueeze(1)
    for grad in grads:
        coll(ids).backward(grad.unsqueeze(1))
    with torch.no_grad():
        return coll.eval()(ids)[:, 0]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("rows", ["touched", "all"])
@pytest.mark.parametrize("name", list_rules())
def test_squares_that_overflow_leave_no_weight_that_is_not_a_number(name: str, rows: str, backend: str) -> None:
    for width in (1, 4, 19):
        for large in LARGE:
            coll, grads = collection(name, rows, width, backend), gradients(large, width)
            got = stepped(coll, grads)
            assert torch.isfinite(got).all(), (width, large)
            usual = stepped(collection(name, rows, width, backend), gradients(1.0, width))
            others = [0, 2, 4, 5]
            assert torch.equal(got[others], usual[others]), "rows beside them are as they would be without"


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("name", "rows"), TORCH)
def test_a_rule_overflows_where_torchs_does(name: str, rows: str, backend: str) -> None:
    for large in (1e18, 1e19, 1e30, 3e38):  # between them torch's Adam and RMSprop, which scale first, overflow later
        coll = collection(name, rows, 1, backend)
        weight = nn.Parameter(coll.eval()(torch.arange(ROWS).unsqueeze(1)).detach()[:, 0].clone())
        theirs, grads = TORCH[name, rows]([weight]), gradients(large, 1)
        for grad in grads:
            weight.grad = grad.clone()
            theirs.step()
        torch.testing.assert_close(stepped(coll.train(), grads), weight.detach(), rtol=2e-5, atol=1e-6)
