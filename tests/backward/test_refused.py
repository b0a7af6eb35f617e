"""What steps in backward cannot do as torch does is refused, before a table changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from tests.fused_model import BACKENDS, IDS, PAIRS, Model, dense, loss_of, one_step, weights


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
    try:
        optimizer.step()
    finally:
        model.tables.width8.grad = None  # steps of any optimizer tell of it while the tables live


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


def test_not_a_number_changes_nothing_where_told() -> None:
    model = Model(rse.SGD(lr=0.1))
    model.tables.check_finite = True
    before = weights(model)
    with pytest.raises(ConfigError, match="not finite"):
        (loss_of(model, slice(8)) * float("inf")).backward()
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler itself
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_autograd_is_refused_and_runs_at_step(backend: str) -> None:
    """It leaves out what is queued for the end of a backward, and gives lookups dense gradients."""
    rule, of_torch = PAIRS["adam"]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        model = Model(rule, backend=backend)
        before = weights(model)
        loss = loss_of(model, slice(8))
        with pytest.raises(ConfigError, match="compiled autograd runs this backward"):
            torch.compile(lambda loss=loss: loss.backward(), backend="aot_eager")()
        assert all(torch.equal(before[k], v) for k, v in weights(model).items())
        twin = Model(None, backend=backend)
        optimizer = rse.optim.fused_optimizer(model, dense(model))
        others = [of_torch(list(twin.tables.parameters())), torch.optim.SGD(twin.head.parameters(), 0.1)]
        for i in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, slice(8 * i, 8 * i + 8))
            torch.compile(lambda loss=loss: loss.backward(), backend="aot_eager")()
            optimizer.step()
            [other.zero_grad() for other in others]
            loss_of(twin, slice(8 * i, 8 * i + 8)).backward()
            [other.step() for other in others]
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-4, atol=2e-6)
