"""Fused optimizers at ``step()``: in every habit of a training loop, the numbers of torch's dense optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.kernels.native import library as native_library
from recsys_embed.optim import FusedOptimizer, RowGradient, fused_optimizer, list_rules, make_rule, unfused_parameters

NATIVE = not isinstance(native_library.library(), str)
BACKENDS = ["native", "torch"] if NATIVE else ["torch"]
SCHEMA = Schema([FeatureSpec("C1", 300, 8), FeatureSpec("C2", 40, 8), FeatureSpec("C3", 3, 8)])
METHODS = [m.name for m in rse.list_methods() if m.config_cls.plannable]
# A rule of the library, and torch's for dense tables.
PAIRS: dict[str, tuple[FusedOptimizer, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (rse.SGD(lr=0.5, weight_decay=0.01, rows="all"), lambda p: torch.optim.SGD(p, 0.5, weight_decay=0.01)),
    "adagrad": (rse.Adagrad(lr=0.3, eps=1e-8), lambda p: torch.optim.Adagrad(p, 0.3, eps=1e-8)),
    "adam": (
        rse.Adam(lr=0.1, weight_decay=0.05, rows="all", eps=1e-3),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.05, eps=1e-3),
    ),
}
DATA = torch.Generator().manual_seed(5)
IDS = torch.stack([torch.randint(0, s.num_embeddings, (96,), generator=DATA) for s in SCHEMA], 1)
LABELS = torch.rand(96, generator=DATA)


def plan_of(method: str) -> Plan:
    return Plan.full(SCHEMA) if method == "full" else Plan.uniform(SCHEMA, method, budget="6KiB", full_below=1)


class Model(nn.Module):
    def __init__(self, rule: FusedOptimizer | None, method: str = "full", backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tables = EmbeddingCollection(SCHEMA, plan_of(method), rule, seed=0, backend=backend)
        self.head = nn.LazyLinear(1)
        with torch.no_grad():
            self(IDS[:2])

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tables(ids).flatten(1)).squeeze(1)  # type: ignore[no-any-return]


def loss_of(model: nn.Module, at: slice) -> Tensor:
    return F.mse_loss(model(IDS[at]), LABELS[at])


Loop = Callable[[Model, torch.optim.Optimizer], None]


def one_step(model: Model, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    rows = slice(16 * number, 16 * number + 16)
    F.mse_loss(model(IDS[rows]), LABELS[rows].to(model.head.weight.dtype)).backward()
    optimizer.step()


def plain(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for i in range(5):
        optimizer.zero_grad()
        loss_of(model, slice(16 * i, 16 * i + 16)).backward()
        optimizer.step()


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
    plain, accumulation, clipping, two_towers, freezing, schedule, recomputed, scaled, by_hand, overwritten,
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


def weights(model: Model) -> dict[str, Tensor]:
    model.tables.catch_up_()
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def dense(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(unfused_parameters(model), 0.1)


def compare(loop: Loop, name: str, method: str, backend: str) -> None:
    rule, of_torch = PAIRS[name]
    fused, twin = Model(rule, method, backend), Model(None, method, backend)
    own = [p for n, p in twin.tables.named_parameters() if n in twin.tables.storages]
    rest = [p for p in twin.parameters() if not any(p is q for q in own)]
    loop(fused, fused_optimizer(fused, torch.optim.SGD(fused.parameters(), 0.1)))
    loop(twin, Both(torch.optim.SGD(rest, 0.1), of_torch(own)))
    wanted = weights(twin)
    for key, found in weights(fused).items():
        torch.testing.assert_close(found, wanted[key], rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_habits_give_the_numbers_of_torchs_dense_optimizer(loop: Loop, name: str, backend: str) -> None:
    compare(loop, name, "full", backend)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
@pytest.mark.parametrize("loop", [accumulation, two_towers, clipping], ids=lambda loop: loop.__name__)
def test_habits_hold_for_every_method(loop: Loop, method: str) -> None:
    compare(loop, "adagrad", method, "auto")


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


def foreign_parameters(model: Model) -> None:
    other = Model(rse.SGD())
    torch.func.functional_call(model, dict(other.named_parameters()), (IDS,)).sum().backward()


def swapped(model: Model) -> None:
    loss = loss_of(model, slice(8))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "loop", [accumulated, backward_twice, lookup_ahead, gradient_scaler, foreign_parameters, swapped]
)
def test_steps_in_backward_refuse_what_they_cannot_do(loop: Callable[[Model], None], backend: str) -> None:
    with pytest.raises(ConfigError, match=r"fused_optimizer|look up again"):
        loop(Model(rse.Adagrad(lr=0.1), backend=backend))


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


def test_steps_of_another_models_optimizer_are_told() -> None:
    model, other = Model(rse.Adagrad(lr=0.1)), torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(2):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    for k in (1, 2):
        loss_of(model, slice(8 * k, 8 * k + 8)).backward()
        other(torch.ones(1, 2)).sum().backward()
    with pytest.warns(UserWarning, match="2 backwards of a collection came before one step of SGD"):
        optimizer.step()


@pytest.mark.parametrize("found", ["before", "after its first step"])
def test_steps_in_backward_follow_the_schedule_of_an_optimizer_that_was_given_the_tables(found: str) -> None:
    model, by_hand = Model(rse.SGD(lr=0.5)), Model(rse.SGD(lr=0.5))
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
    # Weights of another moment take the state along, or start anew.
    with torch.device("meta"):
        empty = Model.__new__(Model)
        nn.Module.__init__(empty)
        empty.tables = EmbeddingCollection(SCHEMA, None, PAIRS[name][0])
        empty.head = nn.Linear(24, 1)
    empty.to_empty(device="cpu").load_state_dict(saved["model"])
    held = empty.tables.optimizer_state_dict()["state"].values()
    assert all(torch.isfinite(s.float()).all() for s in held)


def test_a_checkpoint_without_the_state_says_so() -> None:
    rule = rse.Adagrad(lr=0.1)
    plain_state = EmbeddingCollection(SCHEMA).state_dict()
    trained = EmbeddingCollection(SCHEMA, None, rule)
    trained(IDS).sum().backward()
    with pytest.raises(RuntimeError, match=r"Missing key.*width8_sum"):
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


OPERATIONS: dict[str, Callable[[nn.Parameter], Any]] = {
    "clip_grad_norm_": lambda p: nn.utils.clip_grad_norm_([p], 0.1),
    "clip_grad_value_": lambda p: nn.utils.clip_grad_value_([p], 0.1),
    "mul_": lambda p: p.grad.mul_(2.0),
    "div_ by a tensor": lambda p: p.grad.div_(torch.tensor(3.0)),
    "add_ a number": lambda p: p.grad.add_(1.0),
    "add_ itself": lambda p: p.grad.add_(p.grad.clone(), alpha=0.5),
    "add_ a dense tensor": lambda p: p.grad.add_(p.data),
    "isfinite": lambda p: torch.isfinite(p.grad).all(),
    "norms of rows": lambda p: p.grad.norm(dim=1),
    "norm": lambda p: p.grad.norm(1),
    "a row": lambda p: p.grad[7],
    "set rows": lambda p: p.grad.__setitem__(slice(1, 4), 5.0),
    "a change through a view": lambda p: p.grad[2:8].mul_(3.0),
    "momentum": lambda p: torch.optim.SGD([p], 0.1, momentum=0.9, weight_decay=0.1).step(),
    "zero_grad": lambda p: torch.optim.SGD([p], 0.1).zero_grad(set_to_none=False),
    "data": lambda p: p.grad.data.mul_(2.0),
    "sub_ from weights": lambda p: p.data.sub_(p.grad, alpha=0.5),
    "sub": lambda p: p.grad - p.grad.clone() * 0.5,
    "copy_": lambda p: p.grad.copy_(torch.where(p.grad > 0, p.grad, 0.0)),
    "mean": lambda p: p.grad.mean(),
    "deepcopy": lambda p: setattr(p, "grad", copy.deepcopy(p.grad)),
    "pickle": lambda p: setattr(p, "grad", pickle.loads(pickle.dumps(p.grad))),
    "double": lambda p: p.grad.double().float(),
    "tolist": lambda p: torch.tensor(p.grad.tolist()),
    "numpy": lambda p: torch.from_numpy(p.grad.cpu().numpy()),
    "largest": lambda p: p.grad.abs().max(),
    "foreach": lambda p: torch._foreach_mul_([p.grad, torch.ones(2)], 2.0),
    "foreach norm": lambda p: torch.stack(torch._foreach_norm([p.grad, p.data])),
    "matmul": lambda p: p.grad @ p.grad.T,
}


SPARSE = ("clip_grad_norm_", "clip_grad_value_", "mul_", "div_ by a tensor", "add_ itself", "norm", "zero_grad", "data",
          "sub_ from weights", "deepcopy", "pickle", "double", "foreach", "foreach norm")  # fmt: skip


@pytest.mark.parametrize("operation", SPARSE)
def test_the_usual_operations_never_build_the_dense_gradient(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(self: RowGradient, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("as much memory as the table")

    p = nn.Parameter(torch.randn(10, 3))
    p.grad = RowGradient(torch.tensor([7, 2, 7, 1]), torch.randn(4, 3), 10)
    monkeypatch.setattr(RowGradient, "to_dense", dense)
    OPERATIONS[operation](p)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([p], 0.1)
    scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_gradients_by_row_take_torchs_operations(operation: Callable[[nn.Parameter], Any]) -> None:
    found: list[tuple[Tensor, Tensor, Any]] = []
    for to in (lambda g: g, RowGradient.to_dense):
        generator = torch.Generator().manual_seed(0)
        grad = RowGradient(torch.tensor([7, 2, 7, 1]), torch.randn(4, 3, generator=generator), 10)
        p = nn.Parameter(torch.randn(10, 3, generator=generator))
        p.grad = to(grad)
        out = operation(p)
        assert p.grad is not None
        held = p.grad.to_dense() if isinstance(p.grad, RowGradient) else p.grad
        out = out.to_dense() if isinstance(out, RowGradient) else out
        found.append((p.detach().clone(), held.clone(), out if isinstance(out, Tensor) else None))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
