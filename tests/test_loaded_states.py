"""Optimizer state that is loaded in any order, in part, or from a damaged file; what else a step refuses untouched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.data.batch import Batch
from recsys_embed.errors import CheckpointError, ConfigError, IdRangeError
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native import row_steps
from recsys_embed.optim import FusedOptimizer, RowGradient, fused_optimizer, rows_of
from recsys_embed.train.batch_norm import LastRowJoined

BACKENDS = ["torch"] if isinstance(native_library.library(), str) else ["torch", "native"]
LAZY = rse.Adam(lr=0.1, weight_decay=0.1, rows="all", eps=1e-3)


def tables(rule: FusedOptimizer | None, *widths: int, backend: str = "auto") -> EmbeddingCollection:
    schema = Schema([FeatureSpec(f"C{w}", 50, w) for w in widths or (4,)])
    return EmbeddingCollection(schema, None, rule, seed=1, backend=backend)


def train(coll: EmbeddingCollection, steps: int, optimizer: torch.optim.Optimizer | None = None) -> EmbeddingCollection:
    for i in range(steps):
        coll(torch.full((2, len(coll.schema)), 3 + i)).square().sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return coll


def by_torch(rule: FusedOptimizer, *steps: int) -> Tensor:
    """The table after several calls of ``train``, by torch's dense optimizer."""
    coll = tables(None)
    made = {
        rse.Adagrad: lambda p: torch.optim.Adagrad(p, rule.lr),
        rse.Adam: lambda p: torch.optim.Adam(p, rule.lr, weight_decay=rule.weight_decay, eps=1e-3),
    }
    optimizer = made[type(rule)](coll.parameters())  # type: ignore[index]
    for count in steps:
        train(coll, count, optimizer)
    return coll.width4.detach()


@pytest.mark.parametrize("rule", [rse.Adagrad(lr=0.1), LAZY], ids=["adagrad", "adam, all rows"])
@pytest.mark.parametrize("order", ["model first", "optimizer first", "weights again, mid-run"])
def test_at_step_model_and_optimizer_load_in_any_order(order: str, rule: FusedOptimizer) -> None:
    coll = tables(rule)
    optimizer = fused_optimizer(coll)
    train(coll, 3, optimizer)
    saved = copy.deepcopy((coll.state_dict(), optimizer.state_dict()))
    if order == "weights again, mid-run":
        coll.load_state_dict(saved[0])
    else:
        coll = tables(rule)
        optimizer = fused_optimizer(coll)
        parts = list(zip((coll, optimizer), saved, strict=True))
        for part, state in parts if order == "model first" else reversed(parts):
            part.load_state_dict(state)
    train(coll, 2, optimizer)
    torch.testing.assert_close(coll.catch_up_().width4.detach(), by_torch(rule, 3, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_step", [True, False])
def test_memory_that_nothing_has_filled_is_no_state(at_step: bool) -> None:
    saved = train(tables(LAZY), 2).state_dict()
    weights = {k: v for k, v in saved.items() if k == "width4" or "extra" in k}
    coll = train(tables(LAZY), 2)
    if at_step:
        fused_optimizer(coll)
    coll.to_empty(device="cpu")
    for state in coll._all_states().values():
        state.fill_(-7)
    coll.load_state_dict(weights, strict=False)
    assert coll.steps_taken() == {"width4": 0}
    assert not any(state.any() for state in coll.optimizer_state_dict()["state"].values())
    coll.load_state_dict(saved)
    assert all(torch.equal(saved[f"{k}"], v) for k, v in coll.optimizer_state_dict()["state"].items())
    assert torch.equal(coll.width4, saved["width4"])


def test_weights_of_one_table_leave_the_state_of_the_others() -> None:
    coll = train(tables(rse.Adagrad(lr=0.1), 4, 8), 3)
    saved = {k: v.clone() for k, v in coll.state_dict().items()}
    coll.load_state_dict({k: v for k, v in saved.items() if k in ("width8", "_extra_state")}, strict=False)
    state = coll.optimizer_state_dict()
    assert torch.equal(state["state"]["width4_sum"], saved["width4_sum"])
    assert not state["state"]["width8_sum"].any()
    assert state["steps"] == {"width4": 3, "width8": 0}
    coll.load_state_dict({k: v for k, v in saved.items() if k.startswith("width8") or "extra" in k}, strict=False)
    assert coll.optimizer_state_dict()["steps"] == {"width4": 3, "width8": 3}


def loaded_by_model(coll: EmbeddingCollection, damage: Callable[[Tensor], object]) -> None:
    saved = copy.deepcopy(coll.state_dict())
    damage(saved["width4_last"])
    coll.load_state_dict(saved)


def loaded_alone(coll: EmbeddingCollection, damage: Callable[[Tensor], object]) -> None:
    saved = copy.deepcopy(coll.optimizer_state_dict())
    damage(saved["state"]["width4_last"])
    coll.load_optimizer_state_dict(saved)


def loaded_by_optimizer(coll: EmbeddingCollection, damage: Callable[[Tensor], object]) -> None:
    optimizer = fused_optimizer(coll)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["state"][0]["last"])
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("damage", [lambda t: t.fill_(-40), lambda t: t[5].fill_(0)], ids=["all rows", "one row"])
@pytest.mark.parametrize("load", [loaded_by_model, loaded_alone, loaded_by_optimizer])
def test_rows_that_claim_other_steps_than_their_table_are_refused(
    load: Callable[[EmbeddingCollection, Callable[[Tensor], object]], None], damage: Callable[[Tensor], object]
) -> None:
    coll = train(tables(LAZY), 3)
    before = coll.catch_up_().width4.clone()
    with pytest.raises(CheckpointError, match="'last' must be 3 in every row"):
        load(coll, damage)
    assert torch.equal(coll.catch_up_().width4, before)


def test_negative_counts_of_rows_are_refused() -> None:
    coll = train(tables(rse.Adam(lr=0.1, bias_correction="row")), 2)
    saved = copy.deepcopy(coll.optimizer_state_dict())
    saved["state"]["width4_count"].fill_(-9)
    with pytest.raises(CheckpointError, match="'count' must not be negative"):
        coll.load_optimizer_state_dict(saved)


@pytest.mark.skipif("native" not in BACKENDS, reason="native kernels")
def test_kernels_read_no_step_before_the_first_of_the_log() -> None:
    """Whatever stands in the state, by hand or by accident."""
    found = []
    for last in (7, -40):
        log, weight = StepLog(7), torch.ones(5, 4)
        state = {k: torch.zeros(5, 4) for k in LAZY.state} | {"last": torch.full((5, 1), last).int()}
        log.advance(LAZY, 0.1)
        row_steps.catch_up(LAZY, weight, state, log)
        found.append(weight)
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.ones(5, 4))


def test_missed_steps_belong_to_the_weights_before_a_state_is_loaded() -> None:
    coll = train(tables(LAZY), 3)
    saved = copy.deepcopy(coll.optimizer_state_dict())
    train(coll, 3)
    coll.load_optimizer_state_dict(saved)
    torch.testing.assert_close(coll.catch_up_().width4.detach(), by_torch(LAZY, 3, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_a_table_change_no_table(backend: str) -> None:
    coll = tables(rse.SGD(lr=0.5), 4, 8, backend=backend)
    optimizer = fused_optimizer(coll)
    coll(torch.tensor([[3, 3]])).sum().backward()
    before = [p.detach().clone() for p in coll.parameters()]
    coll.width8.grad = RowGradient(torch.tensor([7, 99]), torch.ones(2, 8), 50)
    with pytest.raises(IdRangeError, match=r"width8.*\[0, 50\); got rows from 7 to 99"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(coll.parameters(), before, strict=True))
    assert coll.steps_taken() == {"width4": 0, "width8": 0}


def test_what_the_dense_optimizer_refuses_changes_no_table() -> None:
    model = nn.Sequential(tables(rse.SGD(lr=0.5)), nn.Flatten(), nn.Linear(4, 1))
    optimizer = fused_optimizer(model, torch.optim.SparseAdam(list(model[2].parameters())))
    before = model[0].width4.detach().clone()
    model(torch.tensor([[3]])).sum().backward()
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        optimizer.step()
    assert torch.equal(model[0].width4, before)
    with pytest.raises(TypeError, match="`params` must be in order"):
        optimizer.add_param_group({"params": set(nn.Linear(1, 1).parameters())})


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_converted_before_backward_are_named_as_the_reason(backend: str) -> None:
    coll = tables(rse.SGD(lr=0.5), backend=backend)
    out = coll(torch.tensor([[3]]))
    coll.half()
    with pytest.raises(ConfigError, match=r"table 'width4' must be torch\.float32, got torch\.float16"):
        out.sum().backward()


def test_zeroed_gradients_are_not_computed_first() -> None:
    coll, given = tables(rse.SGD(lr=0.5)), torch.ones(1, 1, 4)
    optimizer = fused_optimizer(coll)
    coll(torch.tensor([[3]])).backward(given)
    given.zero_()  # the gradient can no longer be computed
    assert not torch.zeros_like(coll.width4.grad).rows.numel()
    optimizer.zero_grad(set_to_none=False)
    assert isinstance(coll.width4.grad, RowGradient)
    assert not coll.width4.grad.rows.numel()


def test_a_pickled_gradient_has_the_same_rows() -> None:
    grad = RowGradient(torch.tensor([1]), torch.ones(1, 2), 5)
    grad[1] = 2.0  # dense from here on
    rows, values = rows_of(pickle.loads(pickle.dumps(grad)))
    assert (rows.tolist(), values.tolist()) == ([1], [[2.0, 2.0]])


def test_a_row_that_joins_the_batch_before_keeps_its_further_parts() -> None:
    batches = [
        Batch(torch.zeros(n, 0), torch.zeros(n, 1).long(), torch.ones(n), {"weight": torch.arange(n) + 5.0})
        for n in (2, 1)
    ]
    (joined,) = LastRowJoined(batches)
    assert joined.extra["weight"].tolist() == [5.0, 6.0, 5.0]
