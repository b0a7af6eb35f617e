"""The native kernels in compiled models: operators that torch's checks accept, and the values of uncompiled models."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native import ops as native_ops
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.optim import FusedOptimizer

LIBRARY = native_library.library()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"native kernels: {LIBRARY}")
SCHEMA = Schema([FeatureSpec("C1", 60, 8), FeatureSpec("C2", 900, 8), FeatureSpec("C3", 3, 8)])
METHODS = [m.name for m in rse.list_methods() if m.config_cls.plannable]
FEW = ["full", "compositional", "memcom", "robe"]  # operators do not know methods: bare rows, products, weights, runs
RULES = [rse.SGD(lr=0.1), rse.Adam(lr=0.1), rse.Adam(lr=0.1, weight_decay=0.01, rows="all")]


def plan_of(method: str) -> Plan:
    return Plan.full(SCHEMA) if method == "full" else Plan.uniform(SCHEMA, method, budget="12KiB", full_below=1)


def ids_of(step: int, batch: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in SCHEMA], 1)


def run(model: Any, coll: EmbeddingCollection, optimizer: Any = None) -> list[Tensor]:
    found = []
    for step, batch in enumerate((20, 7, 20, 33)):
        out = model(ids_of(step, batch))
        found.append(out.detach().clone())
        out.square().sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *(v for k, v in coll.state_dict().items() if not k.endswith("_extra_state"))]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        *(pytest.param(m, RULES[2], marks=() if m in FEW else pytest.mark.slow) for m in METHODS),
        *(("compositional", rule) for rule in RULES[:2]),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_compiled_collections_take_the_same_steps(method: str, rule: FusedOptimizer) -> None:
    plain = EmbeddingCollection(SCHEMA, plan_of(method), rule, backend="native")
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(plain, plain), run(compiled, other), strict=True):
        torch.testing.assert_close(a, b)
    other.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids_of(9)), plain(ids_of(9)))


@pytest.mark.parametrize("method", FEW)
def test_compiled_collections_have_the_same_gradients(method: str) -> None:
    plain = EmbeddingCollection(SCHEMA, plan_of(method), backend="native")
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)
    found = [
        run(model, coll, torch.optim.SGD(coll.parameters(), lr=0.1))
        for model, coll in ((plain, plain), (compiled, other))
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor_leaves_tables_where_they_are() -> None:
    coll = EmbeddingCollection(SCHEMA, None, rse.Adagrad(lr=0.1), backend="native")
    model = torch.nn.Sequential(coll, torch.nn.Flatten(), torch.nn.Linear(24, 1))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    at = coll.width8.data_ptr()
    for step in range(3):
        for m in (compiled, twin):
            m(ids_of(step)).sum().backward()
    assert coll.width8.data_ptr() == at
    torch.testing.assert_close(coll.width8, twin[0].width8)


@pytest.mark.parametrize("method", FEW)
def test_operators_pass_torchs_checks(method: str) -> None:
    coll = EmbeddingCollection(SCHEMA, plan_of(method), rse.Adam(lr=0.1, rows="all"), backend="native")
    lookup = coll.bundle.batched["native"].lookup
    step, ids = coll._native_step, ids_of(0)
    tables = [getattr(coll, name).detach().clone() for name in coll.storages]
    trained = [t.clone().requires_grad_() for t in tables]
    with torch.no_grad():
        *outputs, kept = native_ops._look_up(ids, tables, [], None, lookup.handle, native_ops.NOBODY)
    grads, states = [torch.ones_like(o) for o in outputs], [s.clone() for s in step.states]
    check = torch.library.opcheck
    check(native_ops._look_up, (ids, trained, [], None, lookup.handle, native_ops.NOBODY))
    check(native_ops._gradients, (ids, tables, grads, kept, lookup.handle))
    # A step counts itself, so that running it twice gives two results: its schema is what can be checked.
    check(native_ops._step, (ids, tables, states, grads, kept, lookup.handle, step.owner), test_utils="test_schema")
    check(native_ops._catch_up, (ids, tables, states, lookup.handle, step.owner))


@pytest.mark.filterwarnings("ignore")  # of what the compiler cannot trace
def test_compiled_lookups_do_not_read_rows_that_missed_steps() -> None:
    coll = EmbeddingCollection(SCHEMA, None, RULES[2], backend="native")
    coll(ids_of(0)).sum().backward()
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
            torch.compile(coll, fullgraph=True, backend="aot_eager")(ids_of(1))
        torch._dynamo.reset()
        found = torch.compile(coll, backend="aot_eager")(ids_of(1))
        assert torch.equal(found, coll(ids_of(1)))


def test_copies_step_themselves() -> None:
    coll = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.1), backend="native")
    for other in (copy.deepcopy(coll), pickle.loads(pickle.dumps(coll))):
        assert other._native_step.owner != coll._native_step.owner
        before = coll.width8.clone()
        torch.compile(other, fullgraph=True, backend="aot_eager")(ids_of(0)).sum().backward()
        assert torch.equal(coll.width8, before)
        assert not torch.equal(other.width8, before)


def test_ids_out_of_range_are_refused() -> None:
    coll = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.1), backend="native")
    compiled = torch.compile(coll, fullgraph=True, backend="aot_eager")
    with pytest.raises(rse.errors.IdRangeError):
        compiled(torch.tensor([[0, 900, 0]]))


def test_outputs_are_used_again_also_after_a_model_that_does_not_compile() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        torch.compile(broken, backend="eager")(torch.ones(2))
    pool = OutputPool()
    first = pool.take((1024, 64))
    address = first.data_ptr()
    del first
    assert pool.take((1024, 64)).data_ptr() == address
