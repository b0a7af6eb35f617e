"""Checkpoints, copies and the state of fused optimizers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import recsys_embed as rse
from recsys_embed import EmbeddingCollection
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.optim import fused_optimizer, unfused_parameters
from tests.fused_model import IDS, PAIRS, SCHEMA, Model, dense, one_step, plain, weights


@pytest.mark.parametrize("at_step", [False, True], ids=["in backward", "at step"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_usual_checkpoint_resumes(name: str, at_step: bool) -> None:
    def optimizer_of(model: Model) -> torch.optim.Optimizer:
        inner = torch.optim.Adam(unfused_parameters(model), 0.1)
        return fused_optimizer(model, inner) if at_step else inner

    model = Model(PAIRS[name][0])
    optimizer = optimizer_of(model)
    plain(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    plain(model, optimizer)
    file.seek(0)
    saved, other = torch.load(file), Model(PAIRS[name][0])
    other.load_state_dict(saved["model"])
    again = optimizer_of(other)
    again.load_state_dict(saved["optimizer"])
    plain(other, again)
    wanted = weights(model)
    assert all(torch.equal(p, wanted[k]) for k, p in weights(other).items())
    # Into memory that nothing has filled: the saved state, or the initial one where it is in the optimizer's dict.
    with torch.device("meta"):
        empty = Model.__new__(Model)
        nn.Module.__init__(empty)
        empty.tables = EmbeddingCollection(SCHEMA, None, PAIRS[name][0])
        empty.head = nn.Linear(24, 1)
    empty.to_empty(device="cpu")
    for state in empty.tables.optimizer_state_dict()["state"].values():
        state.fill_(-1)
    empty.load_state_dict(saved["model"])
    initial = Model(PAIRS[name][0]).tables.optimizer_state_dict()["state"]
    for key, state in empty.tables.optimizer_state_dict()["state"].items():
        assert torch.equal(state, initial[key] if at_step else saved["model"][f"tables.{key}"]), key


def test_a_rate_that_was_set_is_resumed() -> None:
    tables, other = (EmbeddingCollection(SCHEMA, None, rse.SGD(lr=1.0)) for _ in range(2))
    other.load_state_dict(tables.state_dict())
    assert other.lr == 1.0
    tables.lr = 0.1
    other.load_state_dict(tables.state_dict())
    assert other.lr == 0.1
    EmbeddingCollection(SCHEMA).load_state_dict(tables.state_dict())
    bad = {**tables.state_dict(), "width8_lr": torch.tensor(-1.0)}
    with pytest.raises(CheckpointError, match="finite number >= 0"):
        other.load_state_dict(bad)
    optimizer = other.make_optimizer()
    assert optimizer.param_groups[0]["lr"] == other.lr == 0.1
    optimizer.param_groups[0]["lr"] = 0.05
    assert other.lr == other.optimizer_state_dict()["lr"] == 0.05
    assert "width8_lr" not in other.state_dict()


def test_a_checkpoint_without_the_state_says_so() -> None:
    rule = rse.Adagrad(lr=0.1)
    plain_state = EmbeddingCollection(SCHEMA).state_dict()
    trained = EmbeddingCollection(SCHEMA, None, rule)
    trained(IDS).sum().backward()
    with pytest.raises(RuntimeError, match=r"Missing key.*width8_sum.*strict=False starts anew"):
        trained.load_state_dict(plain_state)
    trained.load_state_dict(plain_state, strict=False)
    assert not any(s.any() for s in trained.optimizer_state_dict()["state"].values()), "another weights' state is reset"
    # Serving needs no state.
    EmbeddingCollection(SCHEMA).load_state_dict(trained.state_dict())
    left = EmbeddingCollection(SCHEMA, None, rule)
    left.make_optimizer()
    other = EmbeddingCollection(SCHEMA, None, rule)
    other.load_state_dict(left.state_dict())
    with pytest.warns(UserWarning, match="without the state of the fused optimizer"):
        other(IDS).sum().backward()


def test_optimizers_are_copied_and_pickled_with_their_model() -> None:
    model = Model(PAIRS["adam"][0])
    optimizer = fused_optimizer(model, torch.optim.Adam(model.parameters(), 0.1))
    one_step(model, optimizer, 0)
    optimizer.param_groups[-1]["lr"] = 0.03
    pairs = [(model, optimizer), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for own, its in pairs:
        assert its.param_groups[0] is its.dense.param_groups[0]
        one_step(own, its, 1)
    for own, _ in pairs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(weights(model).values(), weights(own).values(), strict=True))


def test_param_groups_hold_the_parameters_that_are_assigned_or_moved() -> None:
    model = Model(rse.Adam(lr=0.1))
    optimizer = fused_optimizer(model, dense(model))
    one_step(model, optimizer, 0)
    model.tables.load_state_dict(copy.deepcopy(model.tables.state_dict()), assign=True)
    assert optimizer.param_groups[-1]["params"] == [model.tables.width8]
    one_step(model, optimizer, 1)
    assert model.tables.width8.grad is not None
    model.double()  # with a gradient that nothing has read
    assert model.tables.width8.grad.dtype is torch.float64
    optimizer.zero_grad()
    assert model.tables.width8.grad is None
    one_step(model, optimizer, 2)


def test_state_is_that_of_the_tables() -> None:
    model = Model(rse.Adam(lr=0.1))
    optimizer = fused_optimizer(model, dense(model))
    one_step(model, optimizer, 0)
    held = optimizer.state[model.tables.width8]
    assert held["step"] == 1
    assert held["exp_avg"].abs().sum() > 0
    with pytest.raises(ConfigError, match="change it by load_state_dict"):
        optimizer.state = {model.tables.width8: {}}
    optimizer.state = {}
    assert optimizer.state[model.tables.width8]["step"] == 0
    assert not held["exp_avg"].any()


def test_what_gathers_groups_and_state_refuses_changes_that_would_be_lost() -> None:
    model = Model(rse.Adam(lr=0.1))
    optimizer = fused_optimizer(model, torch.optim.Adam(model.parameters(), 0.1))
    one_step(model, optimizer, 0)
    table, head = model.tables.width8, model.head.weight
    groups, state = optimizer.param_groups, optimizer.state
    for change in (
        lambda: groups.append({}), lambda: groups.pop(), lambda: groups.__setitem__(0, {}), lambda: state.clear(),
        lambda: state.pop(table), lambda: state.update({}), lambda: state.__delitem__(head),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="would be lost"):
            change()
    assert (type(copy.deepcopy(groups)), type(pickle.loads(pickle.dumps(groups)))) == (list, list)
    assert state[torch.zeros(())] == {}
    # As Lightning moves states to a device.
    for p, held in state.items():
        state[p] = {k: v + 1 if k != "step" else v for k, v in held.items()}
    assert model.tables.width8_exp_avg.min() >= 0.5
    assert optimizer.dense.state[head]["exp_avg"].min() >= 0.5
    with pytest.raises(ConfigError, match="other shapes"):
        state[table] = {}


def test_a_state_dict_that_is_kept_counts_on_with_its_weights() -> None:
    model = Model(PAIRS["adam"][0])
    optimizer = dense(model)
    one_step(model, optimizer, 0)
    live, saved = model.state_dict(), copy.deepcopy(model.state_dict())
    one_step(model, optimizer, 1)
    one_step(model, optimizer, 2)
    model.load_state_dict(live)
    assert model.tables.steps_taken() == {"width8": 3}
    model.load_state_dict(saved)
    assert (model.tables.steps_taken(), int(live["tables.width8_steps"])) == ({"width8": 1}, 1)


@pytest.mark.parametrize("at_step", [False, True], ids=["in backward", "at step"])
def test_torchs_distributed_state_dicts_resume(at_step: bool) -> None:
    """They look for what a state dict names among the attributes of the model."""

    def made() -> tuple[Model, torch.optim.Optimizer]:
        model = Model(PAIRS["adam"][0])
        inner = torch.optim.Adam(unfused_parameters(model), 0.1)
        return model, fused_optimizer(model, inner) if at_step else inner

    (model, optimizer), (other, again) = made(), made()
    plain(model, optimizer)
    if not at_step:
        model.tables.lr = 0.03
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer))
    set_state_dict(other, again, model_state_dict=of_model, optim_state_dict=of_optimizer)
    for each in ((model, optimizer), (other, again)):
        plain(*each)
    wanted = weights(model)
    assert all(torch.equal(p, wanted[k]) for k, p in weights(other).items())
    with pytest.raises(AttributeError, match="width9_steps"):
        _ = model.tables.width9_steps
