"""Compiled training through torch's gathers, as without native kernels: the bits of uncompiled collections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.kernels import gather_ops
from recsys_embed.kernels.dispatch import available_backends
from recsys_embed.optim import FusedOptimizer, list_rules, make_rule
from tests.tiers import slow_but

# One feature whose ids may be none, so that rows are partial.
SCHEMA = Schema([FeatureSpec("C1", 60, 8), FeatureSpec("C2", 900, 8, unseen="zero"), FeatureSpec("C3", 3, 8)])

ALL = rse.Adam(lr=0.1, weight_decay=0.01, rows="all")
BACKENDS = [b.name for b in available_backends() if b.available and b.name in ("torch", "native")]


def ids_of(step: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in SCHEMA]
    ids[1][::3] = 900
    return torch.stack(ids, 1)


def train(model: Any, coll: EmbeddingCollection) -> list[Tensor]:
    found = []
    for step, batch in enumerate((20, 7, 20, 33)):
        coll.lr = 0.1 / (step + 1)
        out = model(ids_of(step, batch))
        found.append(out.detach().clone())
        out.square().sum().backward()
    state = coll.optimizer_state_dict()
    found += [torch.tensor(list(state["steps"].values())), *state["state"].values()]
    found += [v for k, v in coll.state_dict().items() if not k.endswith("_extra_state")]
    coll.eval()
    return [*found, model(ids_of(9, 20)).detach()]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def same_bits(plan: Plan | None, rule: FusedOptimizer, compiler: str = "aot_eager", **options: Any) -> None:
    plain = EmbeddingCollection(SCHEMA, plan, rule, backend="torch", **options)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend=compiler, dynamic=True)
    for a, b in zip(train(plain, plain), train(compiled, other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "rule",
    [
        *(
            pytest.param(
                make_rule(name, lr=0.1, weight_decay=0.01, rows="all"),
                marks=() if name == "ftrl" else pytest.mark.slow,
            )
            for name in list_rules()
        ),
        # State that is a count per row.
        make_rule("rowwise_rmsprop", lr=0.1, ar_alpha=0.1),
        pytest.param(make_rule("adam", lr=0.1, bias_correction="row"), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_every_rule_takes_the_same_steps(rule: FusedOptimizer) -> None:
    same_bits(None, rule)


@pytest.mark.parametrize(
    "method",
    ["compositional", pytest.param("memcom", marks=pytest.mark.slow), pytest.param("robe", marks=pytest.mark.slow)],
)  # products, learned weights, runs of rows
def test_programs_of_every_kind_take_the_same_steps(method: str) -> None:
    plan = Plan.uniform(SCHEMA, method, budget="12KiB", full_below=1)
    same_bits(plan, rse.Adam(lr=0.1, weight_decay=0.01, rows="all"))


@pytest.mark.slow
def test_inductor_takes_the_same_steps_on_tables_of_half_precision() -> None:
    same_bits(None, rse.Adam(lr=0.1, weight_decay=0.01, rows="all"), "inductor", dtype=torch.bfloat16)


@pytest.mark.crossed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", slow_but([None, ALL], ALL), ids=["none", "all"])
def test_bags_are_compiled_whole(rule: FusedOptimizer | None, backend: str) -> None:
    schema = Schema([FeatureSpec("a", 30, 8), FeatureSpec("b", 20, 8, pooling="mean"), FeatureSpec("c", 9, 8)])
    plain = EmbeddingCollection(schema, None, rule, backend=backend)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)
    empty = torch.tensor([], dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    bags = torch.tensor([1, 2, 8, 3, 1, 0, 4, 4, 1]), torch.tensor([0, 2, 3, 5, 6, 8, 9])
    for values, offsets in (bags, empty, bags):
        got, wanted = compiled(values, offsets), plain(values, offsets)
        assert torch.equal(got, wanted)
        got.sin().sum().backward()
        wanted.sin().sum().backward()
    assert torch.equal(other.state_dict()["width8"], plain.state_dict()["width8"])
    if rule is None:
        assert torch.equal(other.width8.grad, plain.width8.grad)


def test_operators_pass_torchs_checks() -> None:
    coll = EmbeddingCollection(SCHEMA, None, rse.Adam(lr=0.1, rows="all"), backend="torch")
    coll(ids_of(0, 20)).sum().backward()
    rows, table, owner = torch.tensor([3, -1, 3, 70]), coll.width8.detach().clone(), coll._handle
    states = [s.clone() for s in coll._all_states().values()]
    check = torch.library.opcheck
    where = True, "width8", owner
    check(gather_ops._gather, (rows, table, states, *where))
    # A step counts itself, so that running it twice gives two results: its schema is what can be checked.
    arguments = rows, torch.ones(4, 8), table, states, *where
    check(gather_ops._step, arguments, test_utils="test_schema")
    check(gather_ops._catch_up, (rows, table, states, *where[1:]))
