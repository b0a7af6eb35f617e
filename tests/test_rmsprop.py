"""Row-wise RMSprop with adaptive regularisation against FBGEMM's own kernel, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.native.lookup import knows

ROWS, WIDTH, STEPS = 50, 16, 12
SCHEMA = Schema([FeatureSpec("C1", ROWS, WIDTH, init="normal:0.5")])
NATIVE = pytest.mark.skipif(not knows(rse.RowwiseRMSprop()), reason="no kernels")
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
RULES = pytest.mark.parametrize(
    "rule",
    [
        rse.RowwiseRMSprop(lr=0.05),
        rse.RowwiseRMSprop(lr=0.05, ar_alpha=0.8),
        rse.RowwiseRMSprop(lr=0.1, eps=1e-3, ema_beta=0.9, ar_alpha=3.0, min_shrinkage=0.4),
    ],
    ids=repr,
)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids, some of which come again after many steps, and gradients of their vectors."""
    generator = torch.Generator().manual_seed(step)
    ids = (torch.rand(20, generator=generator).pow(3) * (ROWS - 5)).long()
    return ids, torch.randn(20, WIDTH, generator=generator)


def train(coll: EmbeddingCollection, steps: range = range(STEPS)) -> None:
    for step in steps:
        ids, grad = batch(step)
        coll(ids.unsqueeze(1)).reshape(-1, WIDTH).backward(grad)


def fbgemm(rule: rse.RowwiseRMSprop, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and means that FBGEMM's kernel leaves."""
    pytest.importorskip("fbgemm_gpu")
    if not hasattr(torch.ops.fbgemm, "split_embedding_backward_codegen_rowwise_rmsprop_ar_cpu"):
        pytest.skip("this FBGEMM has no row-wise RMSprop")
    host, mean, seen = weight.flatten(), torch.zeros(ROWS), torch.zeros(ROWS)
    first, on_host = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    for step in range(STEPS):
        ids, grad = batch(step)
        torch.ops.fbgemm.split_embedding_backward_codegen_rowwise_rmsprop_ar_cpu(
            grad, host, on_host, first, torch.tensor([0, WIDTH], dtype=torch.int32), WIDTH,
            torch.tensor([0, ROWS]), 8, ids, torch.arange(len(ids) + 1), 0, None, False,
            mean, on_host, first, seen, on_host, first, torch.tensor(rule.lr),
            rule.eps, rule.ar_alpha, step + 1, rule.ema_beta, rule.min_shrinkage,
        )  # fmt: skip
    return host.view(ROWS, WIDTH), mean


@BACKENDS
@RULES
def test_steps_are_those_of_fbgemm(rule: rse.RowwiseRMSprop, backend: str) -> None:
    coll = EmbeddingCollection(SCHEMA, None, rule, backend=backend)
    start = coll.table("C1.weight").detach().clone()
    weight, mean = fbgemm(rule, start.clone())
    train(coll)
    torch.testing.assert_close(coll.table("C1.weight").detach(), weight, rtol=1e-4, atol=1e-5)
    state = coll.optimizer_state_dict()["state"]
    torch.testing.assert_close(state[f"{coll.storages[0]}_mean_square"][:, 0], mean, rtol=1e-4, atol=1e-6)
    assert torch.equal(coll.table("C1.weight")[-5:], start[-5:])


@BACKENDS
@RULES
def test_steps_are_the_formula(rule: rse.RowwiseRMSprop, backend: str) -> None:
    coll = EmbeddingCollection(SCHEMA, None, rule, backend=backend)
    weight, mean, seen = coll.table("C1.weight").detach().double(), [0.0] * ROWS, [0] * ROWS
    weight = weight.clone()
    for step in range(STEPS):
        ids, grad = batch(step)
        for row in ids.unique().tolist():
            g = grad.double()[ids == row].sum(0)
            mean[row] = rule.ema_beta * mean[row] + (1 - rule.ema_beta) * float(g.square().mean())
            gap = step + 1 - seen[row] if seen[row] else 1
            keep = max(rule.min_shrinkage, 1 - min(1.0, rule.lr * rule.ar_alpha * gap))
            weight[row] = keep * weight[row] - rule.lr / (mean[row] ** 0.5 + rule.eps) * g
            seen[row] = step + 1
    train(coll)
    torch.testing.assert_close(coll.table("C1.weight").detach().double(), weight, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_where_all_rows_take_part_each_shrinks_at_every_step(backend: str) -> None:
    rule = rse.RowwiseRMSprop(lr=0.05, ar_alpha=0.8, rows="all")
    coll = EmbeddingCollection(SCHEMA, None, rule, backend=backend)
    start = coll.table("C1.weight")[-5:].detach().clone()
    train(coll)
    torch.testing.assert_close(coll.table("C1.weight")[-5:].detach(), start * (1 - 0.05 * 0.8) ** STEPS)
    assert set(rule.tensors) == {"mean_square", "last"}
    assert set(rse.RowwiseRMSprop(ar_alpha=0.8).tensors) == {"mean_square", "seen"}
    assert set(rse.RowwiseRMSprop().tensors) == {"mean_square"}


def test_shares_lie_between_0_and_1() -> None:
    with pytest.raises(ConfigError, match=r"(?s)ar_alpha.*|ema_beta.*min_shrinkage"):
        rse.RowwiseRMSprop(ema_beta=1.5, min_shrinkage=-0.1, ar_alpha=-1)
