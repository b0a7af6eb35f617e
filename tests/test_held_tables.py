"""Parameters that a user holds while rows='all' defers steps: torch's numbers, or a refusal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from tests.fused_model import BACKENDS, IDS, PAIRS, Model, dense, loss_of, one_step, weights

RULE, OF_TORCH = PAIRS["adam"]
IN_BACKWARD, AT_STEP = "in backward", "at step"


def trained(mode: str, backend: str = "auto") -> tuple[Model, Model, list[torch.optim.Optimizer]]:
    """A fused model and a plain one, trained alike, so that some rows of the fused one have deferred steps."""
    fused, twin = Model(RULE, backend=backend), Model(None, backend=backend)
    mine = dense(fused)
    if mode == AT_STEP:
        mine = rse.optim.fused_optimizer(fused, mine)
    theirs = [OF_TORCH(list(twin.tables.parameters())), torch.optim.SGD(twin.head.parameters(), 0.1)]
    optimizers = [mine, *theirs]
    train(fused, twin, optimizers)
    return fused, twin, optimizers


def train(fused: Model, twin: Model, optimizers: list[torch.optim.Optimizer]) -> None:
    for i in range(3):
        one_step(fused, optimizers[0], i)
        optimizers[1].zero_grad()
        one_step(twin, optimizers[2], i)
        optimizers[1].step()


def assert_equal(fused: Model, twin: Model) -> None:
    torch.testing.assert_close(weights(fused), weights(twin), rtol=1e-4, atol=2e-6)


# How a user takes a table; with each the steps are applied first.
TAKEN: dict[str, Callable[[Model], nn.Parameter]] = {
    "attribute": lambda m: m.tables.width8,  # type: ignore[dict-item,return-value]
    "get_parameter": lambda m: m.get_parameter("tables.width8"),
    "parameters": lambda m: next(iter(m.parameters())),
    "getattr": lambda m: getattr(m.tables, "width8"),  # noqa: B009
}


@pytest.mark.parametrize("mode", [IN_BACKWARD, AT_STEP])
@pytest.mark.parametrize("taken", TAKEN)
def test_a_table_that_is_taken_from_the_model_is_read_and_written_as_torchs(taken: str, mode: str) -> None:
    fused, twin, optimizers = trained(mode)
    assert fused.tables._has_missed_steps
    for model in (fused, twin):
        with torch.no_grad():
            TAKEN[taken](model).mul_(0.5).add_(0.1)
    train(fused, twin, optimizers)
    torch.testing.assert_close(TAKEN[taken](fused).detach(), TAKEN[taken](twin).detach(), rtol=1e-4, atol=2e-6)
    assert_equal(fused, twin)


# What comes after a write to a held table.
AFTERWARDS: dict[str, Callable[[Model, torch.optim.Optimizer], object]] = {
    "lookup": lambda m, o: loss_of(m, slice(8)),
    "bags": lambda m, o: m.tables(IDS[:2].T.reshape(-1), torch.arange(0, 7, 1)),
    "unpooled": lambda m, o: m.tables.lookup("C1", IDS[:4, 0]),
    "evaluation": lambda m, o: m.eval(),
    "state_dict": lambda m, o: m.state_dict(),
    "load_state_dict": lambda m, o: m.load_state_dict(Model(RULE).state_dict()),
    "average": lambda m, o: [p.clone() for p in m.parameters()],
    "catch_up_": lambda m, o: m.tables.catch_up_(),
    "table": lambda m, o: m.tables.table("C1.weight"),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "all rows": lambda held: held.mul_(0.5),
    "a row": lambda held: held[7].zero_(),
    "initializer": lambda held: nn.init.normal_(held),
}


@pytest.mark.parametrize("mode", [IN_BACKWARD, AT_STEP])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("then", AFTERWARDS)
@pytest.mark.crossed(2)
def test_a_write_to_a_held_table_is_refused_before_steps_change_it(
    then: str, write: str, backend: str, mode: str
) -> None:
    model = Model(RULE, backend=backend)
    held = list(model.parameters())
    optimizer = dense(model) if mode == IN_BACKWARD else rse.optim.fused_optimizer(model, dense(model))
    for i in range(2):
        one_step(model, optimizer, i)
    with torch.no_grad():
        WRITES[write](held[0])
    written = held[0].detach().clone()
    with pytest.raises(ConfigError, match=r"width8 was changed in place while steps .* catch_up_"):
        AFTERWARDS[then](model, optimizer)
    assert torch.equal(held[0], written)


@pytest.mark.parametrize("mode", [IN_BACKWARD, AT_STEP])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_between_backward_and_step_is_refused_before_the_step(backend: str, mode: str) -> None:
    """At step(): a second lookup has made the steps of its rows, and others still wait."""
    model = Model(RULE, backend=backend)
    held = list(model.parameters())
    optimizer = dense(model) if mode == IN_BACKWARD else rse.optim.fused_optimizer(model, dense(model))
    one_step(model, optimizer, 0)
    loss = loss_of(model, slice(8))
    with torch.no_grad():
        held[0].mul_(0.5)
    written = held[0].detach().clone()

    def rest() -> None:
        loss.backward()
        optimizer.step()

    with pytest.raises((ConfigError, RuntimeError), match=r"changed in place|modified by an inplace"):
        rest()
    assert torch.equal(held[0], written)


@pytest.mark.parametrize("mode", [IN_BACKWARD, AT_STEP])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_held_table_is_as_torchs_once_caught_up(backend: str, mode: str) -> None:
    fused, twin, optimizers = trained(mode, backend)
    mine, theirs = next(iter(fused.parameters())), next(iter(twin.parameters()))
    for _ in range(2):
        train(fused, twin, optimizers)
        fused.tables.catch_up_()
        with torch.no_grad():
            for held in (mine, theirs):
                held.mul_(0.5)
    train(fused, twin, optimizers)
    assert_equal(fused, twin)


def test_copies_conversions_and_loads_are_no_writes_of_others() -> None:
    model = Model(RULE)
    one_step(model, dense(model), 0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model).double(), model.float()):
        ids = IDS[:8]
        other.tables(ids).sum().backward()
        other.load_state_dict(other.state_dict())
        other.tables(ids).sum().backward()
    assert model.tables._has_missed_steps


def test_a_penalty_on_a_held_table_is_refused_where_its_rows_have_deferred_steps() -> None:
    fused, twin, optimizers = trained(AT_STEP)
    held = next(iter(fused.parameters()))
    one_step(fused, optimizers[0], 3)
    before = held.detach().clone()
    with pytest.raises(ConfigError, match="reads a table that somebody holds"):
        (loss_of(fused, slice(8)) + held.square().sum()).backward()
    assert held.grad is None
    assert torch.equal(held, before) or fused.tables._has_missed_steps
    fused, twin, optimizers = trained(AT_STEP)
    for i in range(3):
        for model, own in ((fused, optimizers[:1]), (twin, optimizers[1:])):
            [o.zero_grad(set_to_none=i != 1) for o in own]
            (loss_of(model, slice(8 * i, 8 * i + 8)) + 0.01 * model.tables.width8.square().sum()).backward()
            [o.step() for o in own]
    train(fused, twin, optimizers)
    assert_equal(fused, twin)


class WithPenalty(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(ids), self.model.tables.width8.square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [IN_BACKWARD, AT_STEP])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_code_writes_tables_back_as_its_own(compiler: str, backend: str, mode: str) -> None:
    torch._dynamo.reset()
    fused, twin = Model(RULE, backend=backend), Model(None, backend=backend)
    penalised = {fused: torch.compile(WithPenalty(fused), backend=compiler), twin: WithPenalty(twin)}
    mine = dense(fused)
    if mode == AT_STEP:
        mine = rse.optim.fused_optimizer(fused, mine)
    others = [OF_TORCH(list(twin.tables.parameters())), torch.optim.SGD(twin.head.parameters(), 0.1)]
    for i in range(5):
        for model, optimizers in ((fused, [mine]), (twin, others)):
            [o.zero_grad() for o in optimizers]
            loss = loss_of(model, slice(i, i + 8)) if i % 2 else torch.zeros(())
            if mode == AT_STEP or not i % 2:
                scores, penalty = penalised[model](IDS[16 * i : 16 * i + 16])
                loss = loss + scores.sum() + (0.01 * penalty if mode == AT_STEP else 0)
            loss.backward()
            [o.step() for o in optimizers]
            if i == 2:
                with torch.no_grad():
                    model.tables.width8.mul_(0.5)
    assert_equal(fused, twin)


def lookahead(model: Model, optimizer: torch.optim.Optimizer, tables: Callable[[], list[Tensor]]) -> None:
    """As packages of optimizers have it: slow weights meet the fast ones every other step."""
    slow = [p.detach().clone() for p in tables()]
    for i in range(5):
        one_step(model, optimizer, i)
        if i % 2:
            for mean, fast in zip(slow, tables(), strict=True):
                mean.add_(fast.data - mean, alpha=0.5)
                fast.data.copy_(mean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
def test_param_groups_have_all_steps(name: str, backend: str) -> None:
    rule, of_torch = PAIRS[name]
    fused, twin = Model(rule, backend=backend), Model(None, backend=backend)
    for model in (fused, twin):
        model.head.requires_grad_(False)
    mine = rse.optim.fused_optimizer(fused)
    theirs = of_torch(list(twin.tables.parameters()))
    lookahead(fused, mine, lambda: [p for group in mine.param_groups for p in group["params"]])
    lookahead(twin, theirs, lambda: theirs.param_groups[0]["params"])
    assert_equal(fused, twin)
    assert torch.equal(mine.param_groups[0]["params"][0], fused.tables.width8)


def test_norms_and_scalers_leave_steps_deferred() -> None:
    """They read gradients alone, and applying all deferred steps would take as long as torch's dense step."""
    model = Model(RULE)
    optimizer = rse.optim.fused_optimizer(model, dense(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for i in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, slice(16 * i, 16 * i + 16))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert len(model.tables._step_logs["width8"].rates) == 2
