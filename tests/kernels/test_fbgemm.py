"""FBGEMM's tables as a backend: its values, gradients and updates are those of the others, and the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.kernels import fbgemm
from recsys_embed.optim import FusedOptimizer
from recsys_embed.testing import poisoned_memory

WHY = fbgemm.why_not()
pytestmark = pytest.mark.skipif(WHY is not None, reason=f"fbgemm: {WHY}")
# Sums of rows: plain, several to a row, several rows to an id, side by side, narrower, and of one table for all.
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("hash", {}),
    ("hash", {"sign": True}),
    ("multihash", {}),
    ("multihash", {"sign": True}),
    ("multihash", {"combine": "mean", "separate": True}),
    ("compositional", {"combine": "add"}),
    ("compositional", {"combine": "concat"}),
    ("unified", {}),
    ("lowdim", {}),
    ("adaptive", {}),
    ("freqcut", {}),
]
EACH = pytest.mark.parametrize("method", PLANS, ids=lambda m: "-".join([m[0], *map(str, m[1].values())]))
RULES = [rse.SGD(lr=0.1), rse.Adagrad(lr=0.1), rse.RowwiseAdagrad(lr=0.1)]
RULE = pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)


def plan_of(method: tuple[str, dict[str, Any]], schema: Schema, part: float = 0.5) -> Plan:
    name, params = method
    budget = max(1, int(part * sum(4 * s.num_embeddings * s.embedding_dim for s in schema)))
    return Plan.full(schema) if name == "full" else Plan.uniform(schema, name, budget=budget, full_below=1, **params)


def ids_of(schema: Schema, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)


def bags_of(schema: Schema, batch: int, seed: int = 0, longest: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(schema), batch), generator=generator)
    values = [
        torch.randint(0, s.num_embeddings, (int(n),), generator=generator)
        for s, n in zip(schema, lengths.sum(1), strict=True)
    ]
    return torch.cat(values), torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))


def schema_of(dim: int, **options: Any) -> Schema:
    return Schema([FeatureSpec(f"C{i}", n, dim, **options) for i, n in enumerate((60, 900, 2, 300))])


@EACH
@RULE
@pytest.mark.parametrize("dim", [16, 10])
def test_steps_are_the_rule_on_summed_gradients(method: Any, rule: FusedOptimizer, dim: int) -> None:
    schema = schema_of(dim)
    plan = plan_of(method, schema)
    with poisoned_memory():
        ours = EmbeddingCollection(schema, plan, rule, backend="fbgemm")
        oracle = EmbeddingCollection(schema, plan, rule, backend="torch").double()
    for step in range(4):
        given = (ids_of(schema, 80, step),) if step % 2 else bags_of(schema, 50, step)
        got, wanted = ours(*given), oracle(*given)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        got.backward(upstream.float())
        wanted.backward(upstream)
    for name in ours.storages:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(oracle, name), rtol=2e-4, atol=2e-5)
        for key in rule.state:
            state, right = getattr(ours, f"{name}_{key}"), getattr(oracle, f"{name}_{key}")
            torch.testing.assert_close(state.double(), right.double(), rtol=2e-4, atol=2e-5)
