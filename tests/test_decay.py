"""Optimizers that move all rows, whichever a batch reads: the weights of torch's dense optimizers, on every road."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.native import library as native_library
from recsys_embed.optim import FusedOptimizer, list_rules, make_rule

NATIVE = pytest.mark.skipif(isinstance(native_library.library(), str), reason="no kernels")
BACKENDS = [pytest.param("native", marks=NATIVE), "torch"]
SCHEMA = Schema([FeatureSpec("C1", 300, 16), FeatureSpec("C2", 40, 16), FeatureSpec("C3", 5, 16)])
RULES: list[tuple[FusedOptimizer, Any]] = [
    (rse.SGD(lr=0.1, weight_decay=0.05, rows="all"), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05)),
    (rse.Adagrad(lr=0.1, weight_decay=0.05, rows="all"), lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.05)),
    (rse.Adam(lr=0.02, weight_decay=0.05, rows="all"), lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.05)),
    (rse.Adam(lr=0.02, eps=1e-3, rows="all"), lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-3)),
]
EVERY = [r for r, _ in RULES]
EVERY += [
    make_rule(n, lr=0.1, weight_decay=0.05, rows="all") for n in list_rules() if n not in ("sgd", "adagrad", "adam")
]


def ids_of(step: int, batch: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in SCHEMA], 1)


def train(coll: EmbeddingCollection, steps: range, optimizer: Any = None, lrs: Any = None) -> list[Tensor]:
    outputs = []
    for step in steps:
        if lrs and coll.optimizer:
            coll.lr = lrs(step)
        out = coll(ids_of(step))
        outputs.append(out.detach().clone())
        (out * torch.linspace(-1, 1, 16, dtype=out.dtype) * (1 + step)).square().sum().backward()
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = lrs(step) if lrs else group["lr"]
            optimizer.step()
            optimizer.zero_grad()
    return outputs


def rate(step: int) -> float:
    return 0.03 / (1 + step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["full", "multihash", "compositional", "memcom", "robe"])
@pytest.mark.parametrize(("rule", "dense"), RULES, ids=lambda r: repr(r) if isinstance(r, FusedOptimizer) else "")
def test_all_rows_move_as_torchs_do(rule: FusedOptimizer, dense: Any, method: str, backend: str) -> None:
    plan = Plan.uniform(SCHEMA, method, budget="8KiB", full_below=1) if method != "full" else Plan.full(SCHEMA)
    ours = EmbeddingCollection(SCHEMA, plan, rule, backend=backend)
    oracle = EmbeddingCollection(SCHEMA, plan, backend="reference").double()
    optimizer = dense(oracle.parameters())
    for ours_out, wanted in zip(
        train(ours, range(12), lrs=rate), train(oracle, range(12), optimizer, rate), strict=True
    ):
        torch.testing.assert_close(ours_out.double(), wanted, rtol=2e-4, atol=2e-5)
    ours.eval()
    for name in ours.storages:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(oracle, name), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_when_rows_make_up_for_it(rule: FusedOptimizer, backend: str) -> None:
    lazy = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=backend)
    eager = copy.deepcopy(lazy)
    for step in range(10):
        train(lazy, range(step, step + 1), lrs=rate)
        train(eager.catch_up_(), range(step, step + 1), lrs=rate)
    for name, value in lazy.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name
    for name, value in lazy.optimizer_state_dict()["state"].items():
        assert torch.equal(value, eager.optimizer_state_dict()["state"][name]), name


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_both_backends_agree_and_hand_over_in_the_middle(rule: FusedOptimizer) -> None:
    if isinstance(native_library.library(), str):
        pytest.skip("no kernels")
    colls = [EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=b) for b in ("native", "torch")]
    for coll in colls:
        train(coll, range(7), lrs=rate)
    swapped = [EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=b) for b in ("torch", "native")]
    for before, after in zip(colls, swapped, strict=True):
        after.load_optimizer_state_dict(before.optimizer_state_dict())
        after.load_state_dict(before.state_dict())
        train(after, range(7, 12), lrs=rate)
    torch.testing.assert_close(swapped[0].table("C1.weight"), swapped[1].table("C1.weight"), rtol=2e-4, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([1, 3, 4, 8, 12, 16, 33, 64, 130]),
    gaps=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    rule=st.sampled_from(EVERY),
)
def test_long_gaps_of_rows_of_any_width(width: int, gaps: list[int], rule: FusedOptimizer) -> None:
    schema = Schema([FeatureSpec("C1", 3, width)])
    colls = [EmbeddingCollection(schema, None, rule, backend=b) for b in ("auto", "torch")]
    colls[1].double()
    for coll in colls:
        for gap in gaps:
            for row in [0] * gap + [1]:
                coll(torch.tensor([[row]])).square().sum().backward()
    values = [coll.table("C1.weight").double() for coll in colls]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", [rse.SGD(rows="all"), rse.Adagrad(rows="all"), rse.RowwiseAdagrad(rows="all")])
def test_rules_without_decay_or_moments_keep_no_steps_of_rows(rule: FusedOptimizer) -> None:
    assert not rule.lazy
    assert "last" not in rule.tensors
    assert replace(rule, weight_decay=0.1).lazy
    assert rse.Adam(rows="all").lazy


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_may_train_and_evaluate_at_once(backend: str) -> None:
    schema = Schema([FeatureSpec("C1", 500, 16)])
    coll = EmbeddingCollection(schema, None, rse.Adam(lr=1e-3, weight_decay=0.01, rows="all"), backend=backend)
    faults: list[BaseException] = []

    def work(train: bool) -> None:
        try:
            for i in range(60):
                ids = torch.randint(0, 500, (64, 1), generator=torch.Generator().manual_seed(i))
                if train:
                    coll(ids).square().sum().backward()
                else:
                    with torch.no_grad():
                        coll(ids)
        except BaseException as e:  # a thread's own would be lost
            faults.append(e)

    threads = [threading.Thread(target=work, args=(train,)) for train in (True, True, False)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults
    assert {log.step for log in coll._all_step_logs} == {120}
    assert bool(coll.catch_up_().width16.isfinite().all())
    assert coll.width16.abs().max() < 1


def test_every_reader_sees_rows_that_moved() -> None:
    rule = rse.SGD(lr=0.1, weight_decay=1.0, rows="all")
    coll = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule)
    start = coll.table("C1.weight")[7].clone()
    row = torch.tensor([[0, 0, 0]])
    reads = {
        "eval": lambda c: c.eval()(torch.tensor([[7, 0, 0]]))[0, 0],
        "no_grad": lambda c: torch.no_grad()(c)(torch.tensor([[7, 0, 0]]))[0, 0],
        "training": lambda c: c(torch.tensor([[7, 0, 0]]))[0, 0],
        "bags": lambda c: c({s.name: torch.tensor([[7 if s.name == "C1" else 0]]) for s in SCHEMA})[0, 0],
        "state_dict": lambda c: c.state_dict()["width16"][7],
        "table": lambda c: c.table("C1.weight")[7],
        "copy": lambda c: copy.deepcopy(c).table("C1.weight")[7],
    }
    for name, read in reads.items():
        trained = copy.deepcopy(coll)
        for _ in range(3):
            trained(row).sum().backward()
        torch.testing.assert_close(read(trained), start * 0.9**3, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loaded_weights_miss_no_steps(backend: str) -> None:
    rule = rse.SGD(lr=0.1, weight_decay=1.0, rows="all")
    coll = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=backend)
    saved = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, seed=1).state_dict()
    coll(torch.tensor([[0, 0, 0]])).sum().backward()
    coll.load_state_dict(saved)
    assert torch.equal(coll.eval().width16, saved["width16"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_lookups_before_a_backward(backend: str) -> None:
    rule = rse.Adam(lr=0.1, weight_decay=0.1, rows="all")
    coll = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=backend)
    weight = coll.table("C1.weight")[3].clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.1, weight_decay=0.1)
    a, b = coll(torch.tensor([[3, 0, 0]])), coll(torch.tensor([[4, 0, 0]]))
    b.sum().backward()
    with pytest.raises(ConfigError, match="fused_optimizer"):
        a.sum().backward()
    optimizer.step(lambda: (weight * 0).sum().backward())
    torch.testing.assert_close(coll.table("C1.weight")[3], weight.detach())
    # Both in one backward are one step.
    (coll(torch.tensor([[3, 0, 0]])) + coll(torch.tensor([[3, 1, 1]]))).sum().backward()
    optimizer.zero_grad()
    optimizer.step(lambda: (weight * 2).sum().backward())
    torch.testing.assert_close(coll.table("C1.weight")[3], weight.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [rse.SGD(lr=0.1, weight_decay=0.5), rse.Adam(lr=0.1, weight_decay=0.5)], ids=repr)
def test_decay_of_touched_rows_alone(rule: FusedOptimizer, backend: str) -> None:
    coll = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=backend)
    before = coll.table("C1.weight").clone()
    coll(torch.tensor([[3, 0, 0], [3, 1, 1]])).sum().backward()
    after = coll.table("C1.weight")
    assert [i for i in range(300) if not torch.equal(before[i], after[i])] == [3]
    gradient = 2 + 0.5 * before[3]
    wanted = before[3] - 0.1 * (gradient if isinstance(rule, rse.SGD) else gradient.sign())
    torch.testing.assert_close(after[3], wanted)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.5, 0.75), (0.0, 0.9)], ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_correction_by_row_is_that_of_a_row_alone(backend: str, betas: tuple[float, float]) -> None:
    rule = rse.Adam(lr=0.1, betas=betas, bias_correction="row")
    coll = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=backend)
    weight = coll.table("C1.weight")[9].clone().requires_grad_()
    for _ in range(30):
        coll(torch.tensor([[1, 0, 0]])).sum().backward()
    optimizer = torch.optim.SparseAdam([weight.unsqueeze(0).detach().requires_grad_()], lr=0.1, betas=betas)
    (twin,) = optimizer.param_groups[0]["params"]
    for step in range(5):
        (coll(torch.tensor([[9, 0, 0]]))[0, 0] * (1 + step)).square().sum().backward()
        out = torch.nn.functional.embedding(torch.tensor([0]), twin, sparse=True)
        optimizer.zero_grad()
        (out * (1 + step)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(coll.table("C1.weight")[9], twin.detach()[0], rtol=1e-4, atol=1e-6)
    assert coll.width16_count[9].item() == 5


def test_rows_and_correction_exclude_each_other() -> None:
    with pytest.raises(rse.errors.ConfigError, match="`bias_correction` must be 'table' where all rows move"):
        rse.Adam(rows="all", bias_correction="row")
