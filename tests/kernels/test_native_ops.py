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


@pytest.mark.parametrize("rule", [None, RULES[2]], ids=["none", "all"])
def test_compiled_weighted_bags_that_keep_values_for_backward_have_the_same_bits(rule: FusedOptimizer | None) -> None:
    plain = EmbeddingCollection(SCHEMA, plan_of("memcom"), rule, backend="native")
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([2, 1, 0, 1, 2, 2], [1, 0, 3, 0, 0, 2], [0] * 6):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        values, weights = torch.arange(sum(lengths)) % 3, torch.linspace(0.5, 2, sum(lengths))
        got, wanted = compiled(values, offsets, weights), plain(values, offsets, weights)
        assert torch.equal(got, wanted)
        got.sin().sum().backward()
        wanted.sin().sum().backward()
    for a, b in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert rule is not None or torch.equal(a.grad, b.grad)


@pytest.mark.slow
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
    step, ids = coll._native_step(None, False), ids_of(0)
    given = ids, [], len(ids)
    tables = [getattr(coll, name).detach().clone() for name in coll.storages]
    trained = [t.clone().requires_grad_() for t in tables]
    with torch.no_grad():
        outputs = native_ops._look_up(*given, tables, [], False, lookup.handle, native_ops.NO_OWNER)
    outputs, arrays, kept = outputs[: len(lookup.widths)], outputs[len(lookup.widths) : -1], outputs[-1]
    grads, states = [torch.ones_like(o) for o in outputs], [s.clone() for s in step.states]
    check = torch.library.opcheck
    coll._in_memory = list  # type: ignore[method-assign]
    check(native_ops._look_up, (*given, trained, [], False, lookup.handle, native_ops.NO_OWNER))
    check(native_ops._gradients, (*given, tables, grads, kept, arrays, lookup.handle))
    # A step counts itself, so that running it twice gives two results: its schema is what can be checked.
    check(
        native_ops._step,
        (*given, tables, states, grads, kept, arrays, False, lookup.handle, step.owner),
        test_utils="test_schema",
    )
    check(native_ops._catch_up, (*given, tables, states, lookup.handle, step.owner))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_compiled_lookups_without_gradients_apply_missed_steps(backend: str) -> None:
    coll = EmbeddingCollection(SCHEMA, None, RULES[2], backend=backend)
    for step in range(3):
        coll(ids_of(step)).sum().backward()
    plain = copy.deepcopy(coll)
    with torch.no_grad():
        found = torch.compile(coll, fullgraph=True, backend="aot_eager")(ids_of(9))
        assert torch.equal(found, plain(ids_of(9)))
    assert torch.equal(coll.width8, plain.width8)
    assert not coll._has_missed_steps


def test_copies_step_themselves() -> None:
    coll = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.1), backend="native")
    for other in (copy.deepcopy(coll), pickle.loads(pickle.dumps(coll))):
        assert other._handle != coll._handle
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
