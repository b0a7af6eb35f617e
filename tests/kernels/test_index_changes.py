"""Index arrays that change between a lookup and its backward or step: gradients of the rows that it read, or none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, make_embedding
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.native import library as native_library

NATIVE = not isinstance(native_library.library(), str)
BACKENDS = ["torch", "native"] if NATIVE else ["torch"]
SCHEMA = Schema([FeatureSpec("C0", 300, 8)])
IDS = torch.tensor([[3], [250]])


def assigned(coll: Any) -> None:
    counts = torch.arange(300.0)
    coll.assign_({"C0": counts} if isinstance(coll, EmbeddingCollection) else counts)


def loaded(coll: Any) -> None:
    other = copy.deepcopy(coll)
    assigned(other)
    coll.load_state_dict({k: v for k, v in other.state_dict().items() if "index" in k}, strict=False)


def replaced(coll: Any) -> None:
    other = copy.deepcopy(coll)
    assigned(other)
    for name, array in other.bundle.kernel.index.arrays.held.items():
        setattr(coll.bundle.kernel.index, name, array)


def made(method: str, backend: str, rule: rse.optim.FusedOptimizer | None) -> EmbeddingCollection:
    order = rse.get_method(method).config_cls.order_option
    plan = Plan.uniform(SCHEMA, method, budget="6KiB", full_below=1, **{order: "counts"})
    return EmbeddingCollection(SCHEMA, plan, rule, seed=0, backend=backend)


METHODS = [
    m.name
    for m in rse.list_methods()
    if m.config_cls.order_option and m.config_cls.plannable and made(m.name, "torch", None).bundle.kernel.index.nbytes
]


def rows_of(gradient: Tensor) -> list[int]:
    dense = gradient.to_dense() if hasattr(gradient, "to_dense") else gradient
    return dense.abs().sum(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("change", [assigned, loaded, replaced], ids=lambda c: c.__name__)
@pytest.mark.parametrize("when", ["before backward", "before step", "in backward", "no optimizer", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_go_to_the_rows_that_were_read(
    method: str, backend: str, when: str, change: Callable[[Any], None]
) -> None:
    coll = made(method, backend, None if when in ("no optimizer", "compiled") else rse.SGD(lr=0.5))
    optimizer = coll.make_optimizer() if when.endswith(("before backward", "before step")) else None
    name = coll.storages[0]
    before = getattr(coll, name).detach().clone()
    twin = made(method, "torch", None)
    twin(IDS).square().sum().backward()
    wanted = rows_of(getattr(twin, name).grad)
    torch._dynamo.reset()
    call = torch.compile(coll, backend="aot_eager") if when == "compiled" else coll

    def run() -> list[int]:
        loss = call(IDS).square().sum()
        if when != "before step":
            change(coll)
        loss.backward()
        if when == "before step":
            change(coll)
        if optimizer is not None:
            optimizer.step()
        if when in ("no optimizer", "compiled"):
            return rows_of(getattr(coll, name).grad)
        return rows_of(getattr(coll, name).detach() - before)

    if backend == "torch":
        assert run() == wanted
        return
    with pytest.raises(ConfigError, match="index arrays that say which rows ids read have changed"):
        run()
    assert torch.equal(getattr(coll, name), before)


@pytest.mark.skipif(not NATIVE, reason="native kernels")
def test_a_drop_in_refuses_too_and_second_derivatives_with_it() -> None:
    for again in (False, True):
        table = make_embedding("freqcut", 300, 8, budget="6KiB", order="counts")
        loss = table(IDS[:, 0]).square().sum()
        assigned(table)
        with pytest.raises(ConfigError, match="look up again"):
            loss.backward(create_graph=again)
