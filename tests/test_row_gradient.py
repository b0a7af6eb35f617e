"""Gradients by row: the operations of torch give the numbers of the dense gradient."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys_embed import SGD, EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.errors import ConfigError
from recsys_embed.optim import RowGradient

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
    "foreach norm in another type": lambda p: torch.stack(torch._foreach_norm([p.grad], 2, dtype=torch.float64)),
    "matmul": lambda p: p.grad @ p.grad.T,
    "out=": lambda p: torch.mul(p.grad, p.data, out=p.grad),
    "data =": lambda p: setattr(p.grad, "data", p.data.clone()),
    "data = a gradient": lambda p: setattr(p.grad, "data", p.grad * 2),
    "dlpack": lambda p: torch.from_dlpack(p.grad),
    "share_memory_": lambda p: p.grad.share_memory_(),
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


@pytest.mark.parametrize("in_place", [True, False])
def test_a_sum_with_zeros_has_memory_of_its_own(in_place: bool) -> None:
    grad = RowGradient(torch.tensor([1]), torch.ones(1, 4), 5)
    buffer = torch.zeros_like(grad)
    buffer = buffer.add_(grad) if in_place else buffer + grad
    buffer.mul_(0.5)
    assert (float(grad.sum()), float(buffer.sum())) == (4.0, 2.0)


@pytest.mark.parametrize(
    "read",
    [Tensor.data_ptr, RowGradient.data_ptr, torch._C._to_dlpack, RowGradient.untyped_storage],
)
def test_memory_that_is_not_there_is_refused(read: Callable[[RowGradient], Any]) -> None:
    """Address 0 ends the process when something reads it."""
    with pytest.raises((ConfigError, RuntimeError), match=r"no memory of its own|Cannot access data pointer"):
        read(RowGradient(torch.tensor([1]), torch.ones(1, 4), 5))


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_compiled_functions_take_gradients() -> None:
    torch._dynamo.reset()
    grad = RowGradient(torch.tensor([1]), torch.ones(1, 4), 5)
    assert float(torch.compile(lambda g: g * 2, backend="aot_eager")(grad).sum()) == 8.0


def test_a_table_moves_to_shared_memory_with_its_gradient() -> None:
    tables = EmbeddingCollection(Schema([FeatureSpec("C1", 9, 2)]), optimizer=SGD(lr=1.0))
    optimizer, before = tables.make_optimizer(), tables.width2.detach().clone()
    tables(torch.tensor([[3], [3]])).sum().backward()
    tables.share_memory()
    assert tables.width2.is_shared()
    assert tables.width2.grad.is_shared()
    optimizer.step()
    assert (before - tables.width2)[:, 0].tolist() == pytest.approx([0, 0, 0, 2, 0, 0, 0, 0, 0], abs=1e-6)
