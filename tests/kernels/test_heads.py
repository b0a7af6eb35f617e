"""Heads of several features in one collection: those that differ in form never share an output of fused kernels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.methods.compositional import CompositionalConfig
from recsys_embed.methods.full import FullConfig
from recsys_embed.methods.lowdim import LowdimConfig
from recsys_embed.methods.mixeddim import MixeddimConfig

# Matrices of one shape, behind combined columns of different widths; and heads of other kinds.
KINDS: dict[str, Any] = {
    "narrow": LowdimConfig(dim=1),
    "passing": MixeddimConfig(dims=(2, 1), blocks=(10,)),
    "plain": FullConfig(),
    "networks": CompositionalConfig(combine="path", num_collisions=4, hidden=1),
    "pooled": CompositionalConfig(bag="pooled", num_collisions=4),
}


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
@pytest.mark.parametrize("rule", [None, rse.SGD(lr=0.1)], ids=repr)
def test_all_pairs_beside_each_other_are_the_definition(pooling: Any, rule: Any) -> None:
    for names in itertools.product(KINDS, repeat=2):
        schema = Schema([FeatureSpec(f"f{i}", 60, 2, pooling=pooling, unseen="zero") for i in range(3)])
        plan = Plan({f"f{i}": KINDS[n] for i, n in enumerate((*names, "narrow"))})
        ours = EmbeddingCollection(schema, plan, rule)
        oracle = EmbeddingCollection(schema, plan, backend="reference", dtype=torch.float64)
        ids = torch.tensor([[3, 5, 59], [0, 77, 2], [3, 59, 9]])
        bags = ids.t().reshape(-1), torch.tensor([0, 2, 3, 3, 5, 6, 6, 8, 9, 9])
        for given in ((ids,), bags):
            got, wanted = ours(*given), oracle(*given)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6, msg=f"{names}")
            if rule is None:
                got.sin().sum().backward()
                wanted.sin().sum().backward()
        if rule is None:
            for (name, p), q in zip(ours.named_parameters(), oracle.parameters(), strict=True):
                torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5, msg=f"{names}: {name}")


def test_a_network_per_class_is_that_of_the_id() -> None:
    """By hand in float64, one id at a time."""
    spec = FeatureSpec("a", 60, 2)
    module = rse.get_method("compositional").embedding_cls(60, 2, config=KINDS["networks"], dtype=torch.float64)
    moduli = module.config.moduli_of(spec)
    names = ("part0", "part1_hidden_weight", "part1_hidden_bias", "part1_out_weight", "part1_out_bias")
    rows, w1, b1, w2, b2 = (module.table(n).tolist() for n in names)
    for i in (0, 7, 59):
        row, c = rows[i // moduli[1]], i % moduli[1]
        hidden = max(0.0, math.fsum(row[d] * w1[c][d][0] for d in range(2)) + b1[c][0])
        wanted = [hidden * w2[c][0][o] + b2[c][o] for o in range(2)]
        assert module(torch.tensor([i]))[0].tolist() == pytest.approx(wanted, rel=1e-12)
