"""A method whose rows are contracted, from one file and one line: contract, fused steps, exports, shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, registry
from recsys_embed.optim import unfused_parameters
from recsys_embed.testing import check_embedding
from tests.extend.tensor_train import TensorTrainConfig, TensorTrainEmbedding

SCHEMA = Schema([FeatureSpec("train", 500, 16), FeatureSpec("plain", 40, 16), FeatureSpec("other", 90, 16)])
PLAN = Plan(
    {"train": TensorTrainConfig(rank=3), "plain": Plan.full(SCHEMA)["plain"], "other": TensorTrainConfig(rank=2)}
)
IDS = torch.tensor([[3, 7, 89], [499, 39, 0], [3, 0, 1]])


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register(TensorTrainEmbedding, paper="Yin et al. 2021, arXiv 2101.11714")


def test_it_keeps_the_contract() -> None:
    check_embedding("tensor_train")


def test_vectors_are_products_of_the_slices_of_their_digits() -> None:
    module = TensorTrainEmbedding(500, 16, rank=3, dtype=torch.float64)
    cores = [module.table(f"core{i}").detach().numpy() for i in range(3)]
    n1, n2 = len(cores[1]), len(cores[2])
    for i in (0, 3, 77, 499):
        a = cores[0][i // (n1 * n2)].reshape(2, 3)
        b = cores[1][i // n2 % n1].reshape(3, 2, 3)
        c = cores[2][i % n2].reshape(3, 4)
        wanted = [a[x] @ b[:, y] @ c[:, z] for x in range(2) for y in range(2) for z in range(4)]
        np.testing.assert_allclose(module(torch.tensor([i])).detach().numpy()[0], wanted, rtol=1e-12)


@pytest.mark.parametrize("rule", [rse.SGD(lr=0.1), rse.Adam(lr=0.01)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_its_cores_are_stepped_inside_backward(rule: rse.SGD | rse.Adam, backend: str) -> None:
    ours = EmbeddingCollection(SCHEMA, PLAN, rule, backend=backend)
    assert not unfused_parameters(ours), "cores are tables that the optimizer holds"
    if ours.backend == "native":
        assert not ours.bundle.batched["native"].mixed
    oracle = EmbeddingCollection(SCHEMA, PLAN, backend="reference", dtype=torch.float64)
    steps = [torch.optim.SGD, torch.optim.Adam][isinstance(rule, rse.Adam)](oracle.parameters(), lr=rule.lr)
    bags = IDS.t().reshape(-1), torch.tensor([0, 2, 3, 3, 5, 6, 6, 8, 9, 9, 9, 9, 9])[:10]
    every = torch.arange(9).repeat(3, 1).t() if isinstance(rule, rse.Adam) else IDS
    for given in ((every,), (IDS,), bags) if isinstance(rule, rse.SGD) else ((every,),):
        got, wanted = ours(*given), oracle(*given)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
        got.square().sum().backward()
        wanted.square().sum().backward()
        steps.step()
        steps.zero_grad()
    torch.testing.assert_close(ours(every).double(), oracle(every), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_it_is_exported_and_served(precision: Any, tmp_path: Path) -> None:
    coll = EmbeddingCollection(SCHEMA, PLAN)
    rse.export(coll, tmp_path / "c.safetensors", precision=precision)
    served = rse.load(tmp_path / "c.safetensors")
    tolerance = 1e-6 if precision == "fp32" else 0.05 * float(coll(IDS).detach().abs().max())
    torch.testing.assert_close(served(IDS), coll(IDS).detach(), rtol=0, atol=tolerance)


def test_each_core_is_a_table_that_can_be_sharded() -> None:
    pytest.importorskip("torchrec")
    from recsys_embed.sharding import ShardableCollection

    whole = EmbeddingCollection(SCHEMA, PLAN, seed=2)
    sharded = ShardableCollection(SCHEMA, PLAN, rse.SGD(lr=0.1), seed=2)
    assert {"train.core0", "train.core1", "train.core2", "plain.weight"} <= set(sharded.physical_tables)
    assert torch.equal(sharded(IDS), whole(IDS))
    bags = IDS.t().reshape(-1), torch.arange(0, 10)
    torch.testing.assert_close(sharded(*bags), whole(*bags))
