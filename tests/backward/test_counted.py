"""Steps in backward count the backwards of a step of an optimizer: accumulation and closures."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from recsys_embed.optim import unfused_parameters
from tests.fused_model import BACKENDS, IDS, Model, dense, loss_of


def test_accumulation_is_seen_where_another_optimizer_steps_in_between() -> None:
    model, other = Model(rse.Adagrad(lr=0.1)), nn.Linear(2, 1)
    optimizer, others = dense(model), torch.optim.SGD(other.parameters(), 0.1)

    def loop() -> None:
        for i in range(6):
            loss_of(model, slice(8 * i, 8 * i + 8)).backward()
            other(torch.ones(1, 2)).sum().backward()
            others.step()
            others.zero_grad()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(ConfigError, match="2 backwards of a collection came before one step of SGD"):
        loop()


@pytest.mark.parametrize("given", ["the tables", "no table"])
def test_closures_of_one_backward_are_let_be_and_accumulation_in_them_is_refused(given: str) -> None:
    """Lightning runs the last backward of a step in its closure, and zeroes gradients before the first."""
    model = Model(rse.Adagrad(lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if given == "the tables" else dense(model)

    def backward() -> Any:
        loss_of(model, slice(8)).backward()

    def whole() -> Any:
        optimizer.zero_grad()
        backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step(whole)

    def loop() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            backward()
            optimizer.step(backward)

    with pytest.raises(ConfigError, match="2 backwards of a collection came before one step of SGD"):
        loop()


@pytest.mark.parametrize("slow", ["discarded", "of another model"])
def test_optimizers_that_step_less_often_are_let_be(slow: str) -> None:
    """A discriminator's gradients of the generator's backwards are discarded; a student is trained now and then."""
    model, other = Model(rse.Adagrad(lr=0.1)), nn.Linear(1, 1)
    optimizer, others = dense(model), torch.optim.SGD(other.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(6):
            optimizer.zero_grad()
            scores = model(IDS[:8])[:, None]
            (other(scores) if slow == "discarded" else scores).sum().backward()
            optimizer.step()
            if i % 2:
                others.zero_grad()
                other(torch.ones(1, 1)).sum().backward()
                others.step()


@pytest.mark.parametrize("zero", [None, True, False])
def test_accumulation_beside_an_optimizer_that_knows_no_table_is_refused(zero: bool | None) -> None:
    model = Model(rse.Adagrad(lr=0.1))
    optimizer = dense(model)
    for _ in range(2):  # one backward per step is none
        loss_of(model, slice(8)).backward()
        optimizer.step()
        if zero is not None:
            optimizer.zero_grad(set_to_none=zero)
    for k in (1, 2):
        loss_of(model, slice(8 * k, 8 * k + 8)).backward()
    with pytest.raises(ConfigError, match="2 backwards of a collection came before one step of SGD"):
        optimizer.step()


def test_steps_of_another_models_optimizer_warn() -> None:
    model, other = Model(rse.Adagrad(lr=0.1)), torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(2):
        loss_of(model, slice(8)).backward()
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    for k in (1, 2):
        loss_of(model, slice(8 * k, 8 * k + 8)).backward()
        other(torch.ones(1, 2)).sum().backward()
    with pytest.warns(UserWarning, match="2 backwards of a collection came before one step of SGD"):
        optimizer.step()


@pytest.mark.parametrize("given", ["the tables", "no table"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_in_a_step_is_refused_before_it_and_frozen_tables_are_let_be(
    given: str, backend: str
) -> None:
    model, twin = Model(rse.SGD(lr=0.1), backend=backend), Model(rse.SGD(lr=0.1), backend=backend)

    def lbfgs() -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters() if given == "the tables" else unfused_parameters(model))

    optimizer = lbfgs()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, slice(8))
        loss.backward()
        return loss

    with pytest.raises(ConfigError, match=r"LBFGS runs several backwards .* freeze them .* optimizer=None"):
        optimizer.step(closure)
    loss_of(twin, slice(8)).backward()
    assert torch.equal(model.tables.width8, twin.tables.width8), "one step, of the first backward"
    model.tables.requires_grad_(False)
    optimizer = lbfgs()
    first, last = optimizer.step(closure).item(), loss_of(model, slice(8)).item()
    assert last < 0.1 * first
    assert torch.equal(model.tables.width8, twin.tables.width8)


def test_a_step_that_failed_in_its_closure_is_over() -> None:
    model = Model(rse.SGD(lr=0.1))
    optimizer = dense(model)

    def closure() -> None:
        loss_of(model, slice(8)).backward()
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(closure)
    optimizer.zero_grad()
    loss_of(model, slice(8)).backward()
    optimizer.step()
