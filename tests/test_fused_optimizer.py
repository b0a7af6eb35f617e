"""Fused optimizers at ``step()``: in every habit of a training loop, the numbers of torch's dense optimizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import recsys_embed as rse
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.optim import RowGradient, fused_optimizer, list_rules, make_rule, unfused_parameters
from tests.fused_model import BACKENDS, IDS, LABELS, NATIVE, PAIRS, Model, dense, loss_of, one_step, plain, weights

METHODS = [m.name for m in rse.list_methods() if m.config_cls.plannable]

Loop = Callable[[Model, torch.optim.Optimizer], None]


def accumulation(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for i in range(4):
        for k in range(3):
            (loss_of(model, slice(24 * i + 8 * k, 24 * i + 8 * k + 8)) / 3).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=i % 2 == 0)


def clipping(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for i in range(4):
        optimizer.zero_grad()
        loss_of(model, slice(24 * i, 24 * i + 24)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type=(2.0, float("inf"), 1.0, 2.0)[i])
        nn.utils.clip_grad_value_(model.parameters(), 0.004)
        optimizer.step()


def two_towers(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for i in range(4):
        optimizer.zero_grad()
        query, item = model.tables(IDS[16 * i : 16 * i + 16]).flatten(1), model.tables(IDS[8:24]).flatten(1)
        F.cross_entropy(query @ item.T, torch.arange(16)).backward()
        loss_of(model, slice(8)).backward()
        optimizer.step()


def freezing(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for i in range(6):
        model.tables.requires_grad_(i not in (2, 3))
        optimizer.zero_grad()
        loss_of(model, slice(16 * i, 16 * i + 16)).backward()
        optimizer.step()


def schedule(model: Model, optimizer: torch.optim.Optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for i in range(5):
        optimizer.step(lambda i=i: (optimizer.zero_grad(), loss_of(model, slice(16 * i, 16 * i + 16)).backward())[1])  # type: ignore[arg-type]
        scheduler.step()


def one_cycle(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """It changes momentum too, where the optimizer has it."""
    momentum = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=6, cycle_momentum=momentum)
    for i in range(5):
        one_step(model, optimizer, i)
        scheduler.step()


def plateau(model: Model, optimizer: torch.optim.Optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for i in range(5):
        one_step(model, optimizer, i)
        scheduler.step(1.0)


def recomputed(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for i in range(3):
        optimizer.zero_grad()
        vectors = checkpoint(model, IDS[16 * i : 16 * i + 16], use_reentrant=False)
        (vectors + model(IDS[:16])).square().sum().backward()
        optimizer.step()


def scaled(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """An overflow in the second step, which is left out; for torch's optimizers by hand."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, slice(16 * i, 16 * i + 16)) * (float("inf") if i == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()


def by_hand(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Hooks, rows clipped one by one, and a penalty of the tables."""
    handle = model.tables.width8.register_hook(lambda grad: grad * 0.5)
    for i in range(3):
        optimizer.zero_grad()
        loss_of(model, slice(16 * i, 16 * i + 16)).backward()
        for p in model.parameters():
            if p.grad is not None and p.dim() == 2:
                p.grad.mul_((0.01 / (p.grad.norm(dim=1, keepdim=True) + 1e-9)).clamp(max=1))
        optimizer.step()
    handle.remove()


def overwritten(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """One array of ids, which a loader fills for each batch and which torch does not see change."""
    array = IDS[:8].numpy().copy()
    for i in range(3):
        optimizer.zero_grad()
        for k in range(2):
            array[:] = IDS[16 * i + 8 * k : 16 * i + 8 * k + 8].numpy()
            model(torch.from_numpy(array)).square().sum().backward()
        array[:] = 0
        optimizer.step()


def nothing_read(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Steps and norms without a batch, and with an empty one."""
    for i in range(3):
        optimizer.zero_grad(set_to_none=False)
        model.tables(IDS[:0]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=(2.0, float("inf"))[i % 2])
        optimizer.step()
        one_step(model, optimizer, i)


LOOPS: list[Loop] = [
    plain, accumulation, clipping, two_towers, freezing, schedule, plateau, recomputed, scaled, by_hand, overwritten,
    nothing_read,
]  # fmt: skip


class Both(torch.optim.Optimizer):
    """Torch's optimizers of tables and of the rest, as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([g for p in parts for g in p.param_groups], {})
        self.param_groups = [g for p in parts for g in p.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        for part in self.parts:
            part.step()


def compare(loop: Loop, name: str, method: str, backend: str) -> None:
    rule, of_torch = PAIRS[name]
    fused, twin = Model(rule, method, backend), Model(None, method, backend)
    own = [p for n, p in twin.tables.named_parameters() if n in twin.tables.storages]
    rest = [p for p in twin.parameters() if not any(p is q for q in own)]
    loop(fused, fused_optimizer(fused, torch.optim.SGD(fused.parameters(), 0.1)))
    loop(twin, Both(torch.optim.SGD(rest, 0.1), of_torch(own)))
    wanted = weights(twin)
    for key, found in weights(fused).items():
        torch.testing.assert_close(found, wanted[key], rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_habits_give_the_numbers_of_torchs_dense_optimizer(loop: Loop, name: str, backend: str) -> None:
    compare(loop, name, "full", backend)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
@pytest.mark.parametrize("loop", [accumulation, two_towers, clipping], ids=lambda loop: loop.__name__)
def test_habits_hold_for_every_method(loop: Loop, method: str) -> None:
    # Gradients of products of several factors are small, and rules that divide by their sizes amplify rounding.
    compare(loop, "sgd" if method == "tt" else "adagrad", method, "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list_rules())
def test_a_step_at_step_has_the_bits_of_one_in_backward(name: str, backend: str) -> None:
    rule = make_rule(name, lr=0.1)
    one, other = Model(rule, "compositional", backend), Model(rule, "compositional", backend)
    plain(one, dense(one))
    plain(other, fused_optimizer(other, dense(other)))
    wanted = weights(one)
    assert all(torch.equal(p, wanted[k]) for k, p in weights(other).items())
    # The same where something has read the gradient, so that its rows are computed.
    read = Model(rule, "compositional", backend)
    optimizer = fused_optimizer(read, dense(read))
    for i in range(5):
        optimizer.zero_grad()
        loss_of(read, slice(16 * i, 16 * i + 16)).backward()
        assert isinstance(read.tables.width8.grad, RowGradient)
        assert read.tables.width8.grad.coalesce().rows.diff().gt(0).all()
        optimizer.step()
    assert all(torch.equal(p, wanted[k]) for k, p in weights(read).items())


def test_averages_by_hand_and_by_torch_see_rows_that_moved() -> None:
    for at_step in (False, True):
        model = Model(rse.Adam(lr=0.05, weight_decay=0.1, rows="all"))
        optimizer = fused_optimizer(model, dense(model)) if at_step else dense(model)
        average, mean = AveragedModel(model), copy.deepcopy(model)
        sums = torch.zeros_like(model.tables.width8)
        for i in range(4):
            optimizer.zero_grad()
            loss_of(model, slice(8 * i, 8 * i + 8)).backward()
            optimizer.step()
            average.update_parameters(model)
            for p, q in zip(mean.parameters(), model.parameters(), strict=True):
                p.data.lerp_(q.data, 1 / (i + 1))
            sums += copy.deepcopy(model).tables.catch_up_().width8.detach()
        torch.testing.assert_close(average.module.tables.width8.detach(), sums / 4)
        torch.testing.assert_close(mean.tables.width8.detach(), sums / 4)


def test_what_the_optimizer_refuses() -> None:
    model = Model(rse.SGD(lr=0.1))
    with pytest.raises(ConfigError, match="no module of the model has a fused optimizer"):
        fused_optimizer(Model(None))
    with pytest.raises(ConfigError, match="`dense` must be a torch optimizer"):
        fused_optimizer(model, "adam")  # type: ignore[arg-type]
    first = fused_optimizer(model)
    with pytest.raises(ConfigError, match="add_param_group"):
        first.add_param_group({"params": list(model.head.parameters())})
    second = fused_optimizer(model, dense(model))
    with pytest.raises(ConfigError, match="another optimizer has been made of the tables of 'tables'"):
        first.step()
    extra = nn.Linear(2, 2)
    second.add_param_group({"params": list(extra.parameters()), "lr": 3.0})
    assert [g["lr"] for g in second.param_groups] == [0.1, 3.0, 0.1]
    loss_of(model, slice(8)).backward()
    with pytest.raises(ConfigError, match="holds tables that"):
        torch.optim.Adam(model.parameters()).step()
    second.param_groups[-1]["lr"] = float("nan")
    before = weights(model)
    with pytest.raises(ConfigError, match="`lr` must be a finite number"):
        second.step()
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())
    with pytest.raises(ConfigError, match="set `lr` in its param_groups"):
        model.tables.lr = 0.3
    other = fused_optimizer(Model(rse.Adagrad(lr=0.1)))
    with pytest.raises(CheckpointError, match="lacks 'sum' of shape"):
        other.load_state_dict(fused_optimizer(Model(rse.SGD(lr=0.1))).state_dict())


@pytest.mark.skipif(not NATIVE, reason="native kernels")
def test_gradients_of_vectors_that_are_changed_before_step_are_refused() -> None:
    model = Model(rse.SGD(lr=0.1), backend="native")
    optimizer, given = fused_optimizer(model, dense(model)), torch.ones(96, 3, 8)
    model.tables(IDS).backward(given)
    given.zero_()
    before = weights(model)
    with pytest.raises(ConfigError, match="changed in place between backward and step"):
        optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())


@pytest.mark.parametrize("of_dense", [{"betas": (0.8, 0.9)}, {"momentum": 0.5}, {}, None], ids=str)
@pytest.mark.parametrize("rule", list_rules())
def test_schedules_of_momentum_take_every_rule_beside_every_dense_optimizer(rule: str, of_dense: Any) -> None:
    model, twin = Model(make_rule(rule, lr=0.1)), nn.Linear(24, 1)
    kind = torch.optim.Adagrad if not of_dense else torch.optim.Adam if "betas" in of_dense else torch.optim.SGD
    inner, its = kind(unfused_parameters(model), **of_dense or {}), kind(twin.parameters(), **of_dense or {})
    optimizer = fused_optimizer(model, None if of_dense is None else inner)
    cycles = bool(of_dense) or "betas" in optimizer.defaults
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=6, cycle_momentum=cycles)
    of_twin = torch.optim.lr_scheduler.OneCycleLR(its, 0.2, total_steps=6, cycle_momentum=bool(of_dense))
    for i in range(5):
        one_step(model, optimizer, i)
        its.step()
        if of_dense:
            wanted = {k: v for k, v in its.param_groups[0].items() if k in ("lr", *of_dense)}
            assert {k: optimizer.param_groups[0][k] for k in wanted} == wanted
        scheduler.step(), of_twin.step()
    assert optimizer.param_groups[-1]["lr"] == its.param_groups[0]["lr"]


def test_the_groups_of_a_dense_optimizer_that_was_loaded_are_those_of_the_whole() -> None:
    model = Model(rse.SGD(lr=0.5))
    inner = torch.optim.SGD(model.parameters(), 1.0)
    optimizer = fused_optimizer(model, inner)
    inner.load_state_dict(copy.deepcopy(inner.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    one_step(model, optimizer, 0)
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0] is inner.param_groups[0]
    optimizer.param_groups = [{**group, "lr": 0.25} for group in optimizer.param_groups]
    assert [group["lr"] for group in inner.param_groups] == [0.25]


def test_an_optimizer_that_nobody_keeps_is_missed() -> None:
    model = Model(rse.SGD(lr=0.5))
    inner = torch.optim.SGD(model.parameters(), 1.0)
    fused_optimizer(model, inner)
    loss_of(model, slice(8)).backward()
    with pytest.raises(ConfigError, match=r"no longer exists; keep what it returns and call its step\(\)"):
        inner.step()


def test_optimizers_that_cannot_be_part_are_refused_before_anything_changes() -> None:
    model = Model(rse.SGD(lr=0.1))
    with pytest.raises(ConfigError, match="LBFGS evaluates the model several times"):
        fused_optimizer(model, torch.optim.LBFGS(unfused_parameters(model)))
    optimizer = fused_optimizer(model, dense(model))
    with pytest.raises(ConfigError, match="a fused rule steps these tables already"):
        optimizer.add_param_group({"params": model.tables.parameters()})
    assert len(optimizer.param_groups) == len(optimizer.dense.param_groups) + 1 == 2


@pytest.mark.parametrize("change", ["zeroed", "masked"])
def test_rows_outside_the_batch_keep_still_whatever_the_gradient_went_through(change: str) -> None:
    """Torch's ``foreach`` zeroes gradients as a list; a mask of the table's shape makes the gradient dense."""
    model = Model(rse.Adam(lr=0.1, weight_decay=0.1))
    optimizer = fused_optimizer(model, torch.optim.SGD(model.parameters(), 0.1, foreach=True))
    before = weights(model)["tables.width8"]
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, slice(2)).backward()
        if change == "masked":
            model.tables.width8.grad.mul_(torch.ones_like(before))
        loss_of(model, slice(2)).backward()
        optimizer.step()
    assert int((weights(model)["tables.width8"] != before).any(1).sum()) <= 6


@pytest.mark.parametrize("at_step", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_models_and_steps(backend: str, at_step: bool) -> None:
    """A compiled step is the same step."""
    torch._dynamo.reset()
    pair = [Model(rse.Adam(lr=0.1), backend=backend) for _ in range(2)]
    optimizers = [fused_optimizer(m, dense(m)) if at_step else dense(m) for m in pair]
    step = torch.compile(lambda: optimizers[0].step(), backend="eager") if at_step else optimizers[0].step
    compiled = torch.compile(pair[0], backend="aot_eager")
    for i in range(2):
        for call, optimizer in ((compiled, optimizers[0]), (pair[1], optimizers[1])):
            optimizer.zero_grad()
            F.mse_loss(call(IDS[8 * i : 8 * i + 8]), LABELS[:8]).backward()
        step(), optimizers[1].step()
    for key, found in weights(pair[0]).items():
        torch.testing.assert_close(found, weights(pair[1])[key])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "not kept"])
@pytest.mark.parametrize("given", ["no table", "the tables"])
def test_a_model_without_its_optimizer_is_not_trained_by_another_rule_or_not_at_all(copied: str, given: str) -> None:
    model = Model(rse.Adam(lr=0.1))
    optimizer = fused_optimizer(model, dense(model))
    if copied == "not kept":
        del optimizer
    else:
        model = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    other = dense(model) if given == "no table" else torch.optim.SGD(model.parameters(), 0.1)
    before = weights(model)["tables.width8"]
    with pytest.raises(ConfigError, match=r"no longer exists.*one of its own|holds tables that"):
        plain(model, other)
    assert torch.equal(weights(model)["tables.width8"], before)
    other.zero_grad()
    model.zero_grad()
    again = fused_optimizer(model, dense(model))
    one_step(model, again, 0)
    assert not torch.equal(weights(model)["tables.width8"], before)


def test_gradients_of_a_copy_accumulate_where_nothing_steps_it() -> None:
    """A worker's copy, whose gradients are read."""
    model = Model(rse.Adam(lr=0.1))
    optimizer = fused_optimizer(model, dense(model))
    worker = copy.deepcopy(model)
    for i in range(2):
        loss_of(worker, slice(8 * i, 8 * i + 8)).backward()
    twin = Model(None)
    (loss_of(twin, slice(8)) + loss_of(twin, slice(8, 16))).backward()
    torch.testing.assert_close(worker.tables.width8.grad.to_dense(), twin.tables.width8.grad)
    one_step(model, optimizer, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_second_optimizer_starts_anew_as_torchs(name: str, backend: str) -> None:
    rule, of_torch = PAIRS[name]
    fused, twin = Model(rule, backend=backend), Model(None, backend=backend)
    for _ in range(2):
        optimizer: torch.optim.Optimizer = fused_optimizer(fused, torch.optim.SGD(fused.parameters(), 0.1))
        others = of_torch(list(twin.tables.parameters())), torch.optim.SGD(twin.head.parameters(), 0.1)
        assert optimizer.param_groups[1]["lr"] == others[0].param_groups[0]["lr"]
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 3) for o in (optimizer, *others)]
        for i in range(3):
            one_step(fused, optimizer, i)
            [o.zero_grad() for o in others]
            loss_of(twin, slice(16 * i, 16 * i + 16)).backward()
            for step in (*(o.step for o in others), *(s.step for s in schedules)):
                step()
    torch.testing.assert_close(weights(fused), weights(twin), rtol=1e-4, atol=1e-5)


def test_steps_in_backward_are_part_of_the_first_optimizer() -> None:
    model, whole = Model(rse.Adam(lr=0.1)), Model(rse.Adam(lr=0.1))
    model.tables.lr = whole.tables.lr = 0.05
    optimizer: torch.optim.Optimizer = dense(model)
    of_whole = dense(whole)
    one_step(model, optimizer, 0)
    optimizer = fused_optimizer(model, optimizer)
    assert optimizer.param_groups[1]["lr"] == 0.05
    one_step(model, optimizer, 1)
    one_step(whole, of_whole, 0)
    one_step(whole, of_whole, 1)
    assert all(torch.equal(p, q) for p, q in zip(weights(model).values(), weights(whole).values(), strict=True))


def test_optimizers_that_ascend_are_refused() -> None:
    model = Model(rse.SGD(lr=0.1))
    with pytest.raises(ConfigError, match="`dense` has maximize=True"):
        fused_optimizer(model, torch.optim.SGD(model.parameters(), 0.1, maximize=True))
    optimizer, before = fused_optimizer(model, dense(model)), weights(model)
    for group in optimizer.param_groups:
        loss_of(model, slice(8)).backward()
        group["maximize"] = True
        with pytest.raises(ConfigError, match="negate the loss"):
            optimizer.step()
        group["maximize"] = False
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["full", "memcom"])
def test_gradient_penalties_have_the_numbers_of_torch_beside_deferred_steps(method: str, backend: str) -> None:
    rule, of_torch = PAIRS["adam"]
    fused, twin = Model(rule, method, backend), Model(None, method, "torch")
    optimizer = fused_optimizer(fused, torch.optim.SGD(fused.parameters(), 0.1))
    others = of_torch(list(twin.tables.parameters())), torch.optim.SGD(twin.head.parameters(), 0.1)
    for i in range(3):
        for model, steps in ((fused, (optimizer,)), (twin, others)):
            model.zero_grad()
            loss = loss_of(model, slice(16 * i, 16 * i + 16))
            # Listing the parameters applies deferred steps between lookup and backward.
            given = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            (loss + sum(g.square().sum() for g in given)).backward()
            [o.step() for o in steps]
    torch.testing.assert_close(weights(fused), weights(twin), rtol=1e-3, atol=1e-4)


def test_a_step_between_a_lookup_and_its_second_derivative_is_refused() -> None:
    model = Model(rse.Adam(lr=0.1, rows="all"), "memcom")
    optimizer = fused_optimizer(model, dense(model))
    for i in range(2):
        vectors = model.tables(IDS[:16])
        one_step(model, optimizer, i)
    with pytest.raises(ConfigError, match="a table changed in place between a lookup and a backward"):
        torch.autograd.grad(vectors.sum(), list(model.tables.parameters()), create_graph=True)


def test_not_a_number_changes_nothing_at_step_where_told() -> None:
    model = Model(rse.Adagrad(lr=0.1))
    optimizer, before = fused_optimizer(model, dense(model)), weights(model)
    (loss_of(model, slice(8)) * float("nan")).backward()
    model.tables.check_finite = True
    with pytest.raises(ConfigError, match="no table has been changed"):
        optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())


def test_what_is_given_in_the_wrong_place_is_named() -> None:
    schema = rse.Schema([rse.FeatureSpec("C1", 9, 2)])
    with pytest.raises(ConfigError, match="an update rule is given as optimizer="):
        rse.EmbeddingCollection(schema, rse.Adam(lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"tables of compress_ .* have ordinary gradients"):
        fused_optimizer(nn.Sequential(rse.make_embedding("full", 9, 2)))
    for backend in BACKENDS:
        with pytest.raises(ConfigError, match=r"ids must be dense.*got layout torch.sparse_coo"):
            rse.EmbeddingCollection(schema, backend=backend)(torch.tensor([[3]]).to_sparse())
