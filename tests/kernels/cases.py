"""What compiled kernels of every backend are held to: the readable definition, and rules stepped in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, Plan, Schema
from recsys_embed.core.generators import TensorTrain
from recsys_embed.optim import FusedOptimizer

METHODS = pytest.mark.parametrize("method", rse.list_methods(), ids=lambda m: m.name)


def plan_of(method: Any, schema: Schema, part: float = 0.5) -> Plan:
    """The method for every feature, at a part of the bytes of full tables, or the least that it needs."""
    config = method.config_cls
    need = sum(config.sized(s, 1).footprint(s).serve for s in schema)
    bytes_of_all = sum(4 * s.num_embeddings * s.embedding_dim for s in schema)
    return Plan.uniform(schema, method.name, budget=max(need, int(part * bytes_of_all)), full_below=1)


def ids_of(schema: Schema, batch: int, seed: int = 0, repeat: int = 1, device: str = "cpu") -> Tensor:
    """Ids ``[batch, features]``, the first ``1 / repeat`` of every vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, max(1, s.num_embeddings // repeat), (batch,), generator=generator) for s in schema]
    return torch.stack(columns, 1).to(device)


def upstream_of(out: Tensor, seed: int) -> Tensor:
    """A gradient of an output, float64."""
    return torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(out.device)


def pair(
    backend: str, schema: Schema, plan: Plan | None, rule: FusedOptimizer | None, device: str = "cpu"
) -> tuple[EmbeddingCollection, EmbeddingCollection]:
    """A collection that the kernels run, and its oracle in float64."""
    oracle = EmbeddingCollection(schema, plan, rule, backend="torch", device=device).double()
    return EmbeddingCollection(schema, plan, rule, backend=backend, device=device), oracle


def assert_definition(
    backend: str, schema: Schema, plan: Plan, batch: int, *, sparse: bool, device: str = "cpu"
) -> None:
    """Vectors and gradients of every parameter are those of the reference in float64."""
    ours = EmbeddingCollection(schema, plan, backend=backend, device=device, sparse=sparse)
    oracle = EmbeddingCollection(schema, plan, backend="reference", device=device).double()
    ids = ids_of(schema, batch, device=device)
    got, wanted = ours(ids), oracle(ids)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    upstream = upstream_of(got, 1)
    got.backward(upstream.float())
    wanted.backward(upstream)
    torch_gathers = backend == "triton" and any(p.generates for p in ours.bundle.programs.values())
    for (name, p), q in zip(ours.named_parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert p.grad.is_sparse == (sparse and name in ours.storages)
        if p.grad.is_sparse and not torch_gathers:
            assert bool((p.grad._indices()[0].diff() > 0).all()), "each row once, in order"
        torch.testing.assert_close(p.grad.to_dense().double(), q.grad, rtol=1e-4, atol=1e-5)


def assert_steps_agree(
    ours: EmbeddingCollection, oracle: EmbeddingCollection, steps: int, batch: int, ids: Tensor | None = None
) -> None:
    """Outputs, weights and state after some steps are those of the oracle."""
    device = str(next(ours.parameters()).device)
    # Gradients of products of several factors are small, and rules that divide by their sizes amplify rounding.
    atol = 5e-4 if any(isinstance(p.head, TensorTrain) for p in ours.bundle.programs.values()) else 1e-5
    for step in range(steps):
        seen = ids_of(ours.schema, batch, step, device=device) if ids is None else ids
        got, wanted = ours(seen), oracle(seen)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=atol)
        upstream = upstream_of(got, step)
        got.backward(upstream.float())
        wanted.backward(upstream)
    states = [f"_{key}" for key in (ours.optimizer.tensors if ours.optimizer else ())]
    for name in [name + key for name in ours.storages for key in ("", *states)]:
        found, right = getattr(ours, name).double(), getattr(oracle, name).double()
        torch.testing.assert_close(found, right, rtol=2e-4, atol=2e-5)


def assert_two_lookups(ours: EmbeddingCollection, oracle: EmbeddingCollection, ids: list[Tensor]) -> None:
    """Two lookups of one loss: one step by the sum of their gradients."""
    for coll in (ours, oracle):
        outs = [coll(i) for i in ids]
        (outs[0].sin().sum() * 2 + outs[1].square().sum()).backward()
    for name in ours.storages:
        got, wanted = getattr(ours, name), getattr(oracle, name)
        if ours.optimizer is None:
            got, wanted = got.grad, wanted.grad
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
