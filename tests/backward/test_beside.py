"""What steps in backward tell of or let be beside other parts of torch."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import recsys_embed as rse
from recsys_embed.collection import optimizer_watch
from recsys_embed.errors import ConfigError
from recsys_embed.optim import unfused_parameters
from tests.fused_model import PAIRS, Model, dense, loss_of, one_step, weights


def test_a_scaler_of_another_model_is_let_be() -> None:
    """A teacher steps in backward, beside a student whose loss is scaled."""
    model, student, scaler = Model(rse.Adagrad(lr=0.1)), nn.Linear(2, 1), torch.amp.GradScaler("cpu")
    optimizers = [dense(model), torch.optim.SGD(student.parameters(), 0.1)]
    for _ in range(2):
        loss_of(model, slice(8)).backward()
        scaler.scale(student(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizers[1])
        scaler.update()
        optimizers[0].step()


def test_training_in_eval_mode_is_told_of_once() -> None:
    model = Model(rse.SGD(lr=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    one_step(model.eval(), optimizer, 0)  # nothing has been trained
    one_step(model.train(), optimizer, 0)
    before = weights(model)["tables.width8"]
    loss_of(model.eval(), slice(8))  # an evaluation that forgot torch.no_grad()
    one_step(model.train(), optimizer, 0)
    assert not torch.equal(before, before := weights(model)["tables.width8"])
    with pytest.warns(UserWarning, match="call train.. of their collection after model.eval"):
        one_step(model.eval(), optimizer, 0)
    one_step(model, optimizer, 0)
    assert torch.equal(weights(model)["tables.width8"], before)
    model.tables.train()
    one_step(model, optimizer, 0)
    assert not torch.equal(weights(model)["tables.width8"], before)


def test_torch_is_as_it_was_once_no_tables_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaler(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            return super().scale(outputs)

    def parts() -> tuple[object, ...]:
        hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
        return (torch.optim.Optimizer.add_param_group, vars(Scaler)["scale"], *(len(h) for h in hooks))

    monkeypatch.setattr(optimizer_watch, "_TABLES", {})  # those of other tests may be alive
    monkeypatch.setattr(optimizer_watch, "_undo", [])
    before = parts()
    first, second = Model(rse.SGD(lr=0.1)), Model(rse.SGD(lr=0.1))
    optimizer = dense(second)
    one_step(second, optimizer, 0)
    del first
    gc.collect()
    assert all(now != was for now, was in zip(parts(), before, strict=True)), "tables are left"
    with pytest.raises(ConfigError, match="GradScaler scales"):
        Scaler("cpu").scale(loss_of(second, slice(8))).backward()
    del second, optimizer
    gc.collect()
    assert parts() == before
    model = Model(rse.SGD(lr=0.1))
    with pytest.raises(ConfigError, match="GradScaler scales"):
        Scaler("cpu").scale(loss_of(model, slice(8))).backward()


CHANGES: dict[str, Callable[[Model], object]] = {
    "clip_grad_norm_": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 100.0),
    "clip_grad_value_": lambda model: nn.utils.clip_grad_value_(model.parameters(), 100.0),
    "noise": lambda model: [p.grad.add_(1e-3) for p in unfused_parameters(model) if p.grad is not None],
    "none": lambda model: None,
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_are_changed_before_step_are_told_of_once(change: str, set_to_none: bool) -> None:
    model = Model(PAIRS["adam"][0])
    optimizer = torch.optim.Adam(unfused_parameters(model))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            a, b = loss_of(model, slice(i, i + 8)), loss_of(model, slice(8, 16))
            (a + b).backward()
            CHANGES[change](model)
            optimizer.step()
    words = [str(w.message) for w in told if "gradients were changed between backward() and step()" in str(w.message)]
    assert len(words) == (change != "none")
    assert all(w.filename == __file__ for w in told)


def test_a_gradient_that_nothing_steps_is_told_of_once() -> None:
    model = Model(rse.SGD(lr=0.1))
    optimizer = dense(model)
    for value in (0.0, 1.0):  # zeros are none
        model.tables.width8.grad = torch.full_like(model.tables.width8, value)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            [optimizer.step() for _ in range(2)]
        words = [str(w.message) for w in told]
        assert len(words) == value
        assert all("was put into .grad of tables that step in backward" in word for word in words)
    assert all(w.filename == __file__ for w in told)


@pytest.mark.parametrize("name", PAIRS)
def test_an_average_is_loaded_for_an_evaluation_between_steps(name: str) -> None:
    """Its buffers are copies of the model's, and with them the optimizer's state."""
    models = Model(PAIRS[name][0]), Model(PAIRS[name][0])
    optimizers = [dense(model) for model in models]
    average = torch.optim.swa_utils.AveragedModel(models[0])
    for i in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            one_step(model, optimizer, i)
        average.update_parameters(models[0])
        kept = copy.deepcopy(models[0].state_dict())
        models[0].load_state_dict(average.module.state_dict())
        models[0].load_state_dict(kept)
    wanted = weights(models[1])
    assert all(torch.equal(found, wanted[key]) for key, found in weights(models[0]).items())
    again = Model(PAIRS[name][0])
    again.load_state_dict(average.module.state_dict())
    one_step(again, dense(again), 0)
