"""Steps in backward: the numbers of torch, or a refusal before a table changes."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

import recsys_embed as rse
from recsys_embed import EmbeddingCollection
from recsys_embed.collection import optimizer_watch
from recsys_embed.collection.backward_steps import BackwardSteps
from recsys_embed.errors import ConfigError
from recsys_embed.optim import unfused_parameters
from tests.fused_model import BACKENDS, IDS, PAIRS, SCHEMA, Model, dense, loss_of, one_step, weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_in_backward_sum_the_lookups_of_one_loss(backend: str) -> None:
    rule, of_torch = PAIRS["adam"]
    fused, twin = Model(rule, backend=backend), Model(None, backend=backend)
    optimizer = of_torch(list(twin.tables.parameters()))
    for i in range(3):
        for model in (fused, twin):
            a, b = (checkpoint(model.tables, IDS[16 * i + k : 16 * i + k + 9], use_reentrant=False) for k in (0, 7))
            (a * b).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(fused), weights(twin), rtol=1e-4, atol=2e-6)


def accumulated(model: Model) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    loss_of(model, slice(8)).backward()
    loss_of(model, slice(8, 16)).backward()
    optimizer.step()


def backward_twice(model: Model) -> None:
    loss = loss_of(model, slice(8))
    loss.backward(retain_graph=True)
    loss.backward()


def lookup_ahead(model: Model) -> None:
    first, second = loss_of(model, slice(8)), loss_of(model, slice(8, 16))
    first.backward()
    second.backward()


def gradient_scaler(model: Model) -> None:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = dense(model)
    scaler.scale(loss_of(model, slice(8))).backward()
    scaler.step(optimizer)


def gradient_scaler_after_a_plain_step(model: Model) -> None:
    optimizer, scaler = dense(model), torch.amp.GradScaler("cpu")
    one_step(model, optimizer, 0)
    scaler.scale(loss_of(model, slice(8))).backward()
    scaler.step(optimizer)


def gradient_scaler_of_an_overflow(model: Model) -> None:
    """The scaler would skip the optimizer's step, by which nothing else could be known."""
    scaler = torch.amp.GradScaler("cpu")
    (scaler.scale(loss_of(model, slice(8))) * float("inf")).backward()


def gradient_scaler_of_a_checkpoint(model: Model) -> None:
    scaler, one = torch.amp.GradScaler("cpu"), torch.ones(1, requires_grad=True)
    vectors = checkpoint(lambda ids, w: model.tables(ids) * w, IDS[:8], one, use_reentrant=True)
    scaler.scale(vectors.sum()).backward()


def gradient_scaler_in_a_compiled_step(model: Model) -> None:
    torch._dynamo.reset()
    scaler = torch.amp.GradScaler("cpu")
    loss_of(model, slice(8)).backward()
    torch.compile(lambda: scaler.scale(model.tables(IDS[:8]).sum()), backend="aot_eager")().backward()


def foreign_parameters(model: Model) -> None:
    other = Model(rse.SGD())
    torch.func.functional_call(model, dict(other.named_parameters()), (IDS,)).sum().backward()


def swapped(model: Model) -> None:
    loss = loss_of(model, slice(8))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    loss.backward()


def penalty_on_a_table(model: Model) -> None:
    (loss_of(model, slice(8)) + model.tables.width8.square().sum()).backward()


def scores_of_all_items(model: Model) -> None:
    (model.tables(IDS[:8])[:, 0].detach() @ model.tables.width8.T).sum().backward()


def gradient_by_hand(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.tables.width8.grad = torch.ones_like(model.tables.width8)
    optimizer.step()


def ascent(model: Model) -> None:
    _optimizer = torch.optim.SGD(model.parameters(), 0.1, maximize=True)
    loss_of(model, slice(8)).backward()


REFUSED = [
    penalty_on_a_table, scores_of_all_items, gradient_by_hand, ascent,
    accumulated, backward_twice, lookup_ahead, gradient_scaler, gradient_scaler_after_a_plain_step,
    gradient_scaler_of_an_overflow, gradient_scaler_of_a_checkpoint, gradient_scaler_in_a_compiled_step,
    foreign_parameters, swapped,
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loop", REFUSED)
def test_steps_in_backward_refuse_what_they_cannot_do(loop: Callable[[Model], None], backend: str) -> None:
    model = Model(rse.Adagrad(lr=0.1), backend=backend)
    with pytest.raises(ConfigError, match=r"fused_optimizer|look up again|negate the loss"):
        loop(model)
    assert all(p.isfinite().all() for p in model.tables.parameters())


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


def test_threads_that_train_at_once_are_independent() -> None:
    steps, faults = BackwardSteps(lambda gradients: None), []
    for _ in range(2):  # the first backwards step when they end
        steps.count.add()

    def train() -> None:
        try:
            for _ in range(60):
                held = [steps.begin(False) for _ in range(100)]
                assert steps.collects(held[0], ["width8"]), "one of several lookups of this thread"
                held.clear()
                assert not steps.collects(steps.begin(False), ["width8"])
        except Exception as error:
            faults.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=train) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    sys.setswitchinterval(interval)
    assert faults == []


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


def test_not_a_number_changes_nothing_where_told() -> None:
    model = Model(rse.SGD(lr=0.1))
    model.tables.check_finite = True
    before = weights(model)
    with pytest.raises(ConfigError, match="not finite"):
        (loss_of(model, slice(8)) * float("inf")).backward()
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tables_rest_and_others_tensors_get_gradients(backend: str) -> None:
    model = Model(rse.SGD(lr=0.1), backend=backend)
    before = weights(model)
    model.tables.requires_grad_(False)
    loss_of(model, slice(8)).backward()
    model.tables.requires_grad_(True)
    given = {k: (p.detach() + 1).requires_grad_() for k, p in model.named_parameters()}
    torch.func.functional_call(model, given, (IDS,)).sum().backward()
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())
    assert given["tables.width8"].grad is not None
    assert model.tables.width8.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_returned_step_nothing_in_backward(backend: str) -> None:
    model = Model(rse.Adam(lr=0.1), backend=backend)
    before = weights(model)
    with pytest.raises(ConfigError, match=r"torch\.autograd\.grad of a table"):
        torch.autograd.grad(loss_of(model, slice(8)), model.tables.width8, allow_unused=True)
    torch.autograd.grad(loss_of(model, slice(8)), model.head.weight)
    loss_of(model, slice(8)).backward(inputs=[model.head.weight])
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())
    loss_of(model, slice(8)).backward(inputs=[model.tables.width8])
    assert not torch.equal(model.tables.width8, before["tables.width8"])


@pytest.mark.parametrize("plain", [False, True], ids=["alone", "beside a plain lookup"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_activations_make_one_step(backend: str, reentrant: bool, plain: bool) -> None:
    """Reentrant checkpointing looks parts up again one by one, each with a backward inside of the backward."""
    one = torch.ones(1, requires_grad=True)
    for parts in (1, 2):
        fused, twin = Model(rse.SGD(lr=0.5), backend=backend), Model(None, backend=backend)
        losses: list[Tensor] = []
        for model in (fused, twin):

            def part(ids: Tensor, scale: Tensor, tables: nn.Module = model.tables) -> Tensor:
                return (tables(ids) * scale).square()

            beside = part(IDS[4:12], one).sum() if plain else torch.zeros(())
            found = [checkpoint(part, IDS[:8], one, use_reentrant=reentrant).sum() for _ in range(parts)]
            losses.append(torch.stack(found).sum() + beside)
        for loss in losses:
            loss.backward()
        torch.optim.SGD(twin.tables.parameters(), 0.5).step()
        torch.testing.assert_close(weights(fused)["tables.width8"], weights(twin)["tables.width8"])


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


def penalty_before(model: Model) -> None:
    (model.tables.width8.square().sum() + loss_of(model, slice(8))).backward()


def penalty_after(model: Model) -> None:
    (loss_of(model, slice(8)) + model.tables.width8.square().sum()).backward()


def hook_on_a_table(model: Model) -> None:
    model.tables.width8.register_hook(lambda grad: grad * 2)
    loss_of(model, slice(8)).backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loop", [penalty_before, penalty_after, hook_on_a_table])
def test_gradients_that_tables_cannot_take_are_refused_before_any_change(
    loop: Callable[[Model], None], backend: str, compiled: bool
) -> None:
    model = Model(rse.SGD(lr=0.1), backend=backend)
    before = weights(model)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
    # Compiled code writes tables back, which torch refuses where an operation before the lookup has saved them.
    words = "modified by an inplace operation" if compiled and loop is penalty_before else "step in backward"
    with pytest.raises((ConfigError, RuntimeError), match=words):
        loop(model)
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())


def test_a_hook_on_a_table_that_compiled_code_looks_up_is_refused_at_step_too() -> None:
    model = Model(rse.SGD(lr=0.1))
    optimizer = rse.optim.fused_optimizer(model, dense(model))
    handle, seen = model.tables.width8.register_hook(lambda grad: seen.append(grad)), []  # type: ignore[has-type]
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager")
    with pytest.raises(ConfigError, match="register_post_accumulate_grad_hook"):
        call(IDS[:8])
    handle.remove()
    call(IDS[:8]).sum().backward()
    optimizer.step()
    assert seen == []


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
