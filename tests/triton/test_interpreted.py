"""The GPU kernels in triton's interpreter against the readable definition in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.triton import fields
from recsys_embed.optim import FusedOptimizer

METHODS = pytest.mark.parametrize("method", rse.list_methods(), ids=lambda m: m.name)
RULES = [
    rse.SGD(lr=0.1),
    rse.Adagrad(lr=0.1),
    rse.RowwiseAdagrad(lr=0.1, weight_decay=0.1),
    rse.Adam(lr=0.1),
    rse.Adam(lr=0.1, bias_correction="row"),
    rse.Adam(lr=0.1, weight_decay=0.1, rows="all"),
]


@pytest.fixture(params=["sorted", "small"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether small tables are sorted like large ones."""
    if request.param == "sorted":
        monkeypatch.setattr(fields, "_SMALL_BYTES", 0)
    return str(request.param)


def plan_of(method: Any, schema: Schema, part: float = 0.5) -> Plan:
    config = method.config_cls
    need = sum(config.sized(s, 1).footprint(s).serve for s in schema)
    bytes_of_all = sum(4 * s.num_embeddings * s.embedding_dim for s in schema)
    return Plan.uniform(schema, method.name, budget=max(need, int(part * bytes_of_all)), full_below=1)


def ids_of(schema: Schema, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)


def fused(coll: EmbeddingCollection) -> bool:
    """Whether the kernels, not torch's operations, ran last."""
    return "triton" in coll.bundle.fused


@METHODS
@settings(max_examples=4, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    dim=st.sampled_from([1, 3, 4, 12, 16]),
    batch=st.sampled_from([0, 1, 7, 33]),
    part=st.floats(0.05, 1.2),
    sparse=st.booleans(),
)
def test_vectors_and_gradients_are_those_of_the_definition(
    method: Any, sizes: list[int], dim: int, batch: int, part: float, sparse: bool
) -> None:
    schema = Schema([FeatureSpec(f"C{i}", n, dim) for i, n in enumerate(sizes)])
    plan = plan_of(method, schema, part)
    ours = EmbeddingCollection(schema, plan, backend="triton", sparse=sparse)
    oracle = EmbeddingCollection(schema, plan, backend="reference").double()
    ids = ids_of(schema, batch)
    got, wanted = ours(ids), oracle(ids)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got.backward(upstream.float())
    wanted.backward(upstream)
    for (name, p), q in zip(ours.named_parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert p.grad.is_sparse == (sparse and name in ours.storages)
        if p.grad.is_sparse:
            assert bool((p.grad._indices()[0].diff() > 0).all()), "each row once, in order"
        torch.testing.assert_close(p.grad.to_dense().double(), q.grad, rtol=1e-4, atol=1e-5)


@METHODS
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_step_is_the_rule_on_summed_gradients(method: Any, rule: FusedOptimizer, path: str) -> None:
    schema = Schema([FeatureSpec("C1", 60, 8), FeatureSpec("C2", 900, 8), FeatureSpec("C3", 2, 8)])
    plan = plan_of(method, schema)
    ours = EmbeddingCollection(schema, plan, rule, backend="triton")
    oracle = EmbeddingCollection(schema, plan, rule, backend="torch").double()
    for step in range(3):
        ids = ids_of(schema, 20, step)
        got, wanted = ours(ids), oracle(ids)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        got.backward(upstream.float())
        wanted.backward(upstream)
    for name in ours.storages:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(oracle, name), rtol=2e-4, atol=2e-5)
        for key in rule.tensors:
            state = getattr(ours, f"{name}_{key}").double()
            torch.testing.assert_close(state, getattr(oracle, f"{name}_{key}").double(), rtol=2e-4, atol=2e-5)
