"""Derivatives beyond the first backward: of second order, batched, and of forward mode, for every method and mode.

Torch's operations in float64 are held to finite differences, and the float32 kernels to these.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.errors import ConfigError, IdRangeError
from tests.kernels.cases import METHODS, plan_of

ROWS, WIDTH = 60, 4
MODES = ("none", "sum", "mean", "max", "weighted")
SHAPE = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        yield


def made(method: Any, mode: str, **options: Any) -> nn.Module:
    pooling = None if mode == "none" else "sum" if mode == "weighted" else mode
    spec = FeatureSpec("a", ROWS, WIDTH, pooling=pooling or "sum", unseen=options.get("unseen"))
    least = method.config_cls.sized(spec, 1).footprint(spec).serve
    budget = max(least, ROWS * WIDTH * 2)
    module = rse.make_embedding(method.name, ROWS, WIDTH, mode=pooling, budget=budget, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    return module


def arguments(mode: str, like: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if mode == "none":
        return {"input": torch.randint(0, ROWS, (3, 4), generator=generator)}
    # An id twice in a bag, one in two bags, and an empty bag.
    given = {"input": torch.tensor([5, 5, 9, 30, 9, 59, 1]), "offsets": torch.tensor([0, 3, 3, 6])}
    if mode == "weighted":
        given["per_sample_weights"] = torch.randn(7, generator=generator).to(like)
    return given


def run_of(module: nn.Module, mode: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The module's call as a function of its tables and of the weights of ids."""
    held = dict(module.named_parameters())
    given = arguments(mode, next(iter(held.values())).dtype)
    weights = given.pop("per_sample_weights", None)

    def run(*values: Tensor) -> Tensor:
        extra = {} if weights is None else {"per_sample_weights": values[-1]}
        tables = dict(zip(held, values, strict=False))
        out: Tensor = functional_call(module, tables, (), {**given, **extra})
        return out

    values = [p.detach() for p in held.values()] + ([] if weights is None else [weights])
    return run, tuple(v.clone().requires_grad_() for v in values)


@pytest.mark.crossed
@SHAPE
@METHODS
def test_finite_differences_agree(method: Any, mode: str) -> None:
    module = made(method, mode).double()
    run, values = run_of(module, mode)
    assert gradcheck(run, values, fast_mode=True, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(run, values, fast_mode=True, check_batched_grad=True)


def second(run: Callable[..., Tensor], values: tuple[Tensor, ...]) -> list[Tensor]:
    """A gradient penalty's gradients; a loss without curvature would not tell whether a term is missing."""
    loss = (run(*values) ** 3).sum()
    first = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
    penalty = torch.stack([(g**2).sum() for g in first if g is not None]).sum()
    found = torch.autograd.grad(penalty, values, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]


def batched(run: Callable[..., Tensor], values: tuple[Tensor, ...]) -> list[Tensor]:
    out = run(*values)
    upstream = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return list(torch.autograd.grad(out, values, upstream, is_grads_batched=True))


def forward_mode(run: Callable[..., Tensor], values: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tangents = [torch.randn(v.shape, generator=generator).to(v.dtype) for v in values]
    out = []
    for context in (torch.enable_grad, torch.no_grad):
        with context(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(v.detach(), t) for v, t in zip(values, tangents, strict=True)]
            tangent = forward_ad.unpack_dual(run(*duals)).tangent
            assert tangent is not None
            out.append(tangent)
    out.append(jvp(run, tuple(v.detach() for v in values), tuple(tangents))[1])
    return out


def assert_as_in_float64(module: nn.Module, mode: str, takes: Callable[..., list[Tensor]]) -> None:
    found = takes(*run_of(module, mode))
    wanted = takes(*run_of(module.double(), mode))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.to_dense().double(), want.to_dense(), rtol=2e-3, atol=2e-3)


@pytest.mark.crossed
@pytest.mark.parametrize("takes", [second, batched, forward_mode])
@SHAPE
@METHODS
def test_kernels_agree_with_float64(method: Any, mode: str, takes: Callable[..., list[Tensor]]) -> None:
    assert_as_in_float64(made(method, mode), mode, takes)


@pytest.mark.crossed
@pytest.mark.parametrize("unseen", [None, "oov", "zero"])
@SHAPE
@METHODS
def test_gradients_per_sample(method: Any, mode: str, unseen: Any) -> None:
    """`vmap(grad)` over samples is a loop over them, and counts the ids of all."""
    module = made(method, mode, unseen=unseen)
    tables = {k: v.detach() for k, v in module.named_parameters()}
    ids = torch.randint(0, ROWS if unseen is None else ROWS + 5, (5, 2, 3))
    weights = torch.randn(5, 2, 3)

    def loss(tables: dict[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        extra = {"per_sample_weights": weights} if mode == "weighted" else {}
        out: Tensor = functional_call(module, tables, (ids,), extra)
        return (out**2).sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(tables, ids, weights)
    if unseen is not None:
        assert module.unseen_counts()["embedding"].looked_up == ids.numel()
    for s in range(len(ids)):
        want = grad(loss)(tables, ids[s], weights[s])
        for name in tables:
            torch.testing.assert_close(found[name][s], want[name], rtol=1e-4, atol=1e-4)


def test_vmap_checks_the_ids_of_all_samples() -> None:
    module = rse.make_embedding("lowdim", ROWS, WIDTH, dim=2)
    with pytest.raises(IdRangeError):
        vmap(module)(torch.tensor([[1, 2], [3, ROWS]]))


# -- collections -----------------------------------------------------------------------------------------------------

SCHEMA = Schema([FeatureSpec("a", 50, 4), FeatureSpec("b", 40, 4, pooling="mean"), FeatureSpec("c", 30, 8)])
IDS = torch.tensor([[3, 1, 29], [49, 1, 0], [3, 39, 7]])
BAGS = (torch.tensor([3, 3, 49, 1, 1, 39, 29, 0]), torch.tensor([0, 2, 2, 3, 4, 6, 6, 7, 7, 8]))


def collection_run(coll: EmbeddingCollection, bags: bool) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A collection's call as a function of its own parameters, to which autograd leads."""
    values = tuple(coll.parameters())

    def run(*given: Tensor) -> Tensor:
        args = BAGS if bags else (IDS,)
        if given[0] is values[0]:
            return coll(*args)
        names = [n for n, _ in coll.named_parameters()]
        return functional_call(coll, dict(zip(names, given, strict=True)), args)

    return run, values


@pytest.mark.crossed
@pytest.mark.parametrize("bags", [False, True], ids=["ids", "bags"])
@pytest.mark.parametrize("kind", ["native", "torch", "sparse", "step"])
@pytest.mark.parametrize("takes", [second, batched, forward_mode])
@METHODS
def test_collections_agree_with_float64(method: Any, takes: Callable[..., list[Tensor]], kind: str, bags: bool) -> None:
    if kind == "sparse" and takes is second:
        pytest.skip("torch does not multiply sparse gradients")
    plan = plan_of(method, SCHEMA)
    backend = "torch" if kind == "torch" else "native"
    rule = rse.SGD(lr=0.1) if kind == "step" else None
    ours = EmbeddingCollection(SCHEMA, plan, rule, backend=backend, sparse=kind == "sparse")
    if rule is not None:
        ours.make_optimizer()
    oracle = EmbeddingCollection(SCHEMA, plan, backend="torch").double()
    found, wanted = takes(*collection_run(ours, bags)), takes(*collection_run(oracle, bags))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.to_dense().double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("how", [{"create_graph": True}, {"is_grads_batched": True}], ids=lambda h: next(iter(h)))
def test_steps_in_backward_refuse_further_derivatives(backend: str, how: dict[str, bool]) -> None:
    coll = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.1), backend=backend)
    before = [p.detach().clone() for p in coll.parameters()]
    out = coll(IDS)
    upstream = torch.randn(2, *out.shape) if "is_grads_batched" in how else torch.randn(out.shape)
    with pytest.raises(ConfigError, match="fused_optimizer"):
        torch.autograd.grad(out, list(coll.parameters()), upstream, **how)
    assert all(map(torch.equal, before, coll.parameters())), "nothing has changed"


def test_a_penalty_steps_as_torch_does() -> None:
    """A gradient penalty through tables whose optimizer steps at `step()`."""
    coll = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.1), backend="native")
    twin = EmbeddingCollection(SCHEMA, None, backend="torch")
    optimizer = coll.make_optimizer()
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for model, step in ((coll, optimizer), (twin, plain)):
        loss = (model(IDS) ** 3).sum()
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + sum((g**2).sum() for g in first)).backward()
        step.step()
    for p, q in zip(coll.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_tables_that_changed_have_no_further_derivatives() -> None:
    """Products of rows read the tables again."""
    module = rse.make_embedding("compositional", ROWS, WIDTH, budget=500)
    out = module(torch.tensor([1, 2]))
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    with pytest.raises(ConfigError, match="changed in place"):
        torch.autograd.grad(out.sum(), list(module.parameters()), create_graph=True)


def test_functions_of_given_tables_learn_in_eval() -> None:
    """Only a collection's own tables are constants in `eval()`."""
    coll = EmbeddingCollection(SCHEMA, None, rse.SGD(lr=0.1)).eval()
    given = {k: v.detach().clone().requires_grad_() for k, v in coll.named_parameters()}
    functional_call(coll, given, (IDS,)).sum().backward()
    assert all(v.grad is not None for v in given.values())
    assert not coll(IDS).requires_grad
