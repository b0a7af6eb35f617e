"""A backward is one step of the tables, whatever it runs through, and has the numbers of torch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import recsys_embed as rse
from recsys_embed.collection.backward_steps import BackwardSteps
from recsys_embed.errors import ConfigError
from tests.fused_model import BACKENDS, IDS, PAIRS, Model, dense, loss_of, weights


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
                steps.collects(steps.begin(False), ["width8"])  # that of no other thread has made it stale
        except Exception as error:
            faults.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=train) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    sys.setswitchinterval(interval)
    assert faults == []


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_are_frozen_after_the_lookup_rest(backend: str, compiled: bool) -> None:
    model = Model(rse.SGD(lr=0.5), backend=backend)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
    for _ in range(3):  # past the backwards that are watched
        loss_of(model, slice(8)).backward()
    before = weights(model)["tables.width8"]
    loss = loss_of(model, slice(8))
    model.tables.requires_grad_(False)
    loss.backward()
    assert torch.equal(weights(model)["tables.width8"], before)


def in_threads(lookups: list[Callable[[], Tensor]], end: bool) -> list[Tensor]:
    """Each in a thread of its own, at once; ``end`` waits until all have ended."""
    made, done = threading.Barrier(len(lookups) + 1), threading.Event()
    found: list[Tensor] = []

    def look_up(lookup: Callable[[], Tensor]) -> None:
        found.append(lookup())
        made.wait()
        done.wait(10)

    threads = [threading.Thread(target=look_up, args=(lookup,), daemon=True) for lookup in lookups]
    [thread.start() for thread in threads]
    made.wait()
    if end:
        done.set()
        [thread.join() for thread in threads]
    return found


@pytest.mark.parametrize("by", ["threads that have ended", "threads that go on", "this thread first"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lookups_of_several_threads_are_one_step(backend: str, by: str) -> None:
    fused, twin = Model(rse.SGD(lr=0.5), backend=backend), Model(None, backend=backend)
    optimizer = torch.optim.SGD(twin.tables.parameters(), 0.5)
    for i in range(4):
        for model in (fused, twin):
            optimizer.zero_grad()
            own = [] if by == "threads that go on" else [loss_of(model, slice(i, i + 8))]
            rows = [slice(i + k, i + k + 8) for k in (8, 16)]
            others = in_threads([partial(loss_of, model, at) for at in rows], by == "threads that have ended")
            if by == "this thread first":
                # The last lookup is the first that backward comes to: it has a product above it.
                others = [other * own[0].detach() for other in others]
            torch.stack(own + others).sum().backward()
        optimizer.step()
        torch.testing.assert_close(weights(fused)["tables.width8"], weights(twin)["tables.width8"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's compiler itself
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_train_step_is_compiled_as_a_whole(backend: str, name: str, compiler: str) -> None:
    """Torch's compiler runs its backward as it is, and would compile the Python that the backward calls."""
    torch._dynamo.reset()
    models = Model(PAIRS[name][0], backend=backend), Model(PAIRS[name][0], backend=backend)
    for model, compiled in zip(models, (True, False), strict=True):
        optimizer = dense(model)

        def step(at: slice, model: Model = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(model, at).backward()
            optimizer.step()

        run = torch.compile(step, backend=compiler) if compiled else step
        for i in range(4):
            run(slice(16 * i, 16 * i + 16))
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-4, atol=2e-6)
