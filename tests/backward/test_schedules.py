"""Steps in backward follow the schedule of an optimizer that was given the tables."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed import EmbeddingCollection
from tests.fused_model import BACKENDS, IDS, SCHEMA, Model, dense, loss_of, one_step, weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("found", ["before", "after its first step"])
def test_steps_in_backward_follow_the_schedule_of_an_optimizer_that_was_given_the_tables(
    found: str, backend: str
) -> None:
    model, by_hand = Model(rse.SGD(lr=0.5), backend=backend), Model(rse.SGD(lr=0.5), backend=backend)
    if found != "before":
        for m in (model, by_hand):
            loss_of(m, slice(8)).backward()
            dense(m).step()
    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), dense(by_hand)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for i in range(4):
        # An optimizer made later is known from its first step on, where the rate is the first.
        by_hand.tables.lr = 0.5 * 0.5**i
        other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        for m, o in ((model, optimizer), (by_hand, other)):
            o.zero_grad()
            loss_of(m, slice(8 * i, 8 * i + 8)).backward()
            o.step()
        scheduler.step()
    wanted = weights(by_hand)
    assert all(torch.equal(p, wanted[k]) for k, p in weights(model).items())
    assert copy.deepcopy(model).tables._rate == pickle.loads(pickle.dumps(model)).tables._rate == 0.5
    # A rate that is set is the rate.
    model.tables.lr = 0.25
    assert model.tables._rate == 0.25


def rate_by_hand(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.4 * (step + 1) / 8


Scheduler = Callable[[torch.optim.Optimizer], Any]

SCHEDULERS: dict[str, Scheduler] = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.4, total_steps=12, cycle_momentum=False),
    "by hand": lambda o: None,
}


@pytest.mark.filterwarnings("ignore:a param group of SGD holds tables")
@pytest.mark.parametrize("event", ["", "optimizer loaded", "tables assigned", "resumed"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_tables_have_the_rate_of_torchs_optimizer_whatever_schedules_it(name: str, event: str) -> None:
    """The rule's rate is that which the optimizer is made with, so that both are equal at every step."""

    def made() -> tuple[EmbeddingCollection, torch.optim.Optimizer, Any]:
        tables = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.4))
        optimizer = torch.optim.SGD(tables.parameters(), 0.4)
        return tables, optimizer, SCHEDULERS[name](optimizer)

    tables, optimizer, scheduler = made()
    for step in range(8):
        if name == "by hand":
            rate_by_hand(optimizer, step)
        if step == 4 and event == "optimizer loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 4 and event == "tables assigned":
            tables.load_state_dict(copy.deepcopy(tables.state_dict()), assign=True)
            optimizer.param_groups[0]["params"] = list(tables.parameters())
        if step == 4 and event == "resumed":
            held = [copy.deepcopy(x.state_dict()) for x in (tables, optimizer, scheduler) if x is not None]
            tables, optimizer, scheduler = made()
            for x, state in zip((tables, optimizer, scheduler), held, strict=False):
                x.load_state_dict(state)
        before = tables.width8.detach().clone()
        wanted = optimizer.param_groups[0]["lr"]
        tables(IDS[:1]).sum().backward()
        moved = (before - tables.width8.detach())[IDS[0, 0]]
        torch.testing.assert_close(moved, torch.full((8,), wanted), rtol=1e-4, atol=1e-6)
        optimizer.step()
        if scheduler is not None:
            scheduler.step(1.0) if name == "plateau" else scheduler.step()


def test_a_rate_of_a_group_without_a_scheduler_is_told_of() -> None:
    tables = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.4))
    optimizer = torch.optim.SGD([{"params": tables.parameters(), "lr": 3.0}], 0.1)
    with pytest.warns(UserWarning, match="set `lr` of the collection"):
        tables(IDS[:1]).sum().backward()
    assert tables._rate == 0.4
    optimizer.step()
    tables.lr = 0.3
    assert tables._rate == 0.3


def test_tables_that_are_replaced_are_let_go() -> None:
    tables = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.4))
    old = weakref.ref(tables.width8)
    tables.load_state_dict(copy.deepcopy(tables.state_dict()), assign=True)
    gc.collect()
    assert old() is None


def test_the_first_step_of_a_new_optimizer_follows_it() -> None:
    """The one before has come to a rate of 0."""
    model = Model(rse.SGD(lr=0.5))
    old = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(old, 1.0, 0.0, 2)
    for i in range(2):
        one_step(model, old, i)
        schedule.step()
    before = weights(model)["tables.width8"]
    loss_of(model, slice(8)).backward()
    assert torch.equal(weights(model)["tables.width8"], before)
    _new = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model, slice(8)).backward()
    assert not torch.equal(weights(model)["tables.width8"], before)
