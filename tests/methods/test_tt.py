"""tt: products of cores against dense ones, the calibrated start, budgets, TT-SVD and checkpoints of others."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_embed import FeatureSpec, Schema, plan_for_budget
from recsys_embed.core.generators import TensorTrain
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.native.trains import run_natively
from recsys_embed.method_parts.tensor_train import rank_bounds
from recsys_embed.methods.tt import TtConfig, TtEmbedding

ORDERS = ("most_significant", "least_significant")


def dense(cores: list[np.ndarray], widths: tuple[int, ...], ranks: tuple[int, ...], order: str) -> np.ndarray:
    """The whole table of a train, one id after the other, in plain products of matrices."""
    edges, rows = (1, *ranks, 1), [len(core) for core in cores]
    out = []
    for i in range(prod(rows)):
        digits = np.unravel_index(i, rows) if order == "most_significant" else np.unravel_index(i, rows[::-1])[::-1]
        vector = np.ones((1, 1))
        for k, digit in enumerate(digits):
            piece = cores[k][digit].reshape(edges[k], widths[k], edges[k + 1])
            vector = np.einsum("ar,rqs->aqs", vector, piece).reshape(-1, edges[k + 1])
        out.append(vector[:, 0])
    return np.stack(out)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=4),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 100),
)
def test_vectors_are_the_rows_of_the_dense_product(shapes: list[tuple[int, int, int]], order: Any, seed: int) -> None:
    rows, widths, ranks = (tuple(s[i] for s in shapes) for i in range(3))
    config = TtConfig(ranks=ranks[1:], id_shape=rows, width_shape=widths, order=order, seed=seed)
    emb = TtEmbedding(prod(rows), prod(widths), config=config, dtype=torch.float64)
    cores = [emb.table(f"core{k}").detach().numpy() for k in range(len(rows))]
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, prod(rows), 50))
    wanted = dense(cores, widths, ranks[1:], order)[ids]
    np.testing.assert_allclose(emb(ids).detach().numpy(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_pass_gradcheck(order: Any) -> None:
    emb = TtEmbedding(30, 12, ranks=(2, 3), order=order, dtype=torch.float64, seed=1)
    names = [name for name, _ in emb.named_parameters()]

    def look_up(*tables: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(
            emb, dict(zip(names, tables, strict=True)), (torch.tensor([0, 7, 7, 29]),)
        )
        return out

    tables = tuple(p.detach().requires_grad_(True) for p in emb.parameters())
    assert torch.autograd.gradcheck(look_up, tables)


@pytest.mark.parametrize("ranks", [(1,), (32,), (2, 16), (24, 24), (4, 8, 4)], ids=str)
@pytest.mark.parametrize("init", ["normal:1", "uniform:0.01"])
def test_elements_start_with_the_variance_of_a_plain_table(ranks: tuple[int, ...], init: str) -> None:
    std = 1.0 if init == "normal:1" else 0.01 / 3**0.5
    squares = [
        TtEmbedding(20_000, 16, ranks=ranks, init=init, seed=seed).materialize().square().mean() for seed in range(12)
    ]
    # Elements of one train share cores, so a few trains are averaged.
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(std, rel=0.12)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 100_000), dim=st.sampled_from([1, 4, 15, 16, 64]), budget=st.integers(200, 500_000))
def test_a_budget_gets_the_largest_ranks_that_fit(n: int, dim: int, budget: int) -> None:
    spec = FeatureSpec("C1", n, dim)
    least = TtConfig.sized(spec, 1).footprint(spec).serve
    if budget < least:
        return
    size = next(
        (s for s in range(TtConfig.max_size(spec), 0, -1) if TtConfig.sized(spec, s).footprint(spec).serve <= budget), 0
    )
    assert TtConfig.for_budget(spec, budget) == TtConfig.sized(spec, size)
    assert size == 1 or TtConfig.sized(spec, size).footprint(spec).serve < 4 * n * dim
    bounds = rank_bounds(*TtConfig.sized(spec, size).shapes_of(spec))
    assert all(r <= most for r, most in zip(TtConfig.sized(spec, size).ranks, bounds, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_a_table_that_a_train_holds_is_fitted_exactly(order: Any) -> None:
    source = TtEmbedding(216, 16, ranks=(3, 4), order=order, dtype=torch.float64, seed=3).materialize()
    fitted = TtEmbedding.from_dense(source, ranks=(3, 4), order=order)
    torch.testing.assert_close(fitted.materialize(), source, rtol=1e-6, atol=1e-8)
    # With slices of no id.
    fitted = TtEmbedding.from_dense(source[:190], ranks=(3, 4), order=order)
    assert (fitted.materialize() - source[:190]).square().mean() < 0.01 * source.square().mean()
    table = torch.randn(60, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bounds = rank_bounds((3, 4, 5), (1, 2, 3))
    whole = TtEmbedding.from_dense(table, ranks=bounds, id_shape=(3, 4, 5), width_shape=(1, 2, 3), order=order)
    torch.testing.assert_close(whole.materialize(), table, rtol=1e-6, atol=1e-8)


def test_the_fit_is_within_the_bound_of_the_best_one() -> None:
    table = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fitted = TtEmbedding.from_dense(table, ranks=(5, 5))
    error = (fitted.materialize() - table).square().sum()
    # Every train of these ranks is at least as far as its unfoldings from theirs (Oseledets 2011, corollary 2.4).
    tensor = table.view(4, 4, 4, 2, 2, 2).permute(0, 3, 1, 4, 2, 5)
    left = [torch.linalg.svdvals(tensor.reshape(8**k, -1))[5:].square().sum() for k in (1, 2)]
    assert max(left) <= error * (1 + 1e-9)
    assert error <= sum(left) * (1 + 1e-9)


def test_ids_that_occur_are_fitted_first() -> None:
    table = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(300).index_fill(0, torch.arange(0, 300, 7), 50.0) + 0.01
    plain, weighted = (TtEmbedding.from_dense(table, ranks=(4, 4), counts=c) for c in (None, counts))
    errors = [((e.materialize() - table).square().sum(1) * counts).sum() for e in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


def test_cores_of_fbtt_are_read() -> None:
    p, q, ranks = (4, 5, 6), (2, 3, 2), (3, 2)
    edges = (1, *ranks, 1)
    shapes = [(2, p[k], edges[k] * q[k] * edges[k + 1]) for k in range(3)]
    state = {f"emb.tt_cores.{k}": torch.randn(shape, dtype=torch.float64) for k, shape in enumerate(shapes)}
    state |= {"emb.L": torch.tensor([30, 6, 1])}
    # As its `full_weight` has it: cores [p, r, q, r'] as [r, p, q, r'], multiplied, and axes sorted out at the end.
    cores = [state[f"emb.tt_cores.{k}"][1].view(p[k], edges[k], q[k], edges[k + 1]).transpose(0, 1) for k in range(3)]
    whole = torch.einsum("apbr,rqcs,stdu->pqtbcd", *cores).reshape(120, 12)
    emb = TtEmbedding.from_fbtt(state, 100, ranks, table=1)
    torch.testing.assert_close(emb.materialize(), whole[:100])
    with pytest.raises(ConfigError, match="use_cache=False"):
        TtEmbedding.from_fbtt({**state, "emb.cache_weight": torch.ones(3, 12)}, 100, ranks)
    with pytest.raises(ConfigError, match=r"tt_cores\.0"):
        TtEmbedding.from_fbtt({}, 100, ranks)
    both = {f"{module}.tt_cores.{k}": torch.ones(1, 10, 8) for module in "ab" for k in range(2)}
    with pytest.raises(ConfigError, match="2 modules, 'a', 'b'; give the state dict of one"):
        TtEmbedding.from_fbtt(both, 100, [2])
    with pytest.raises(ConfigError, match=r"core 'tt_cores\.0' must be an array; got NoneType"):
        TtEmbedding.from_fbtt({"tt_cores.0": None}, 100, ranks)


def test_cores_of_hetu_are_read() -> None:
    p, q, rank = (4, 5, 6), (2, 2, 4), 3
    edges, rng = (1, rank, rank, 1), np.random.default_rng(0)
    cores = {f"emb_{k}": rng.normal(size=(p[k], edges[k] * q[k] * edges[k + 1])) for k in range(3)}
    ids = left = np.arange(110)
    got = np.ones((110, 1, 1))
    for k in range(3):
        digit, left = (left, left) if k == 2 else (left % p[k], left // p[k])
        piece = cores[f"emb_{k}"][digit].reshape(110, edges[k], q[k] * edges[k + 1])
        got = (got.reshape(110, -1, edges[k]) @ piece).reshape(110, -1, edges[k + 1])
    emb = TtEmbedding.from_hetu(cores, 110, (rank, rank))
    np.testing.assert_allclose(emb(torch.from_numpy(ids)).detach().numpy(), got[:, :, 0], rtol=1e-10)
    with pytest.raises(ConfigError, match="_0, _1"):
        TtEmbedding.from_hetu({"a": cores["emb_0"]}, 110, (rank,))
    with pytest.raises(ConfigError, match="multiple"):
        TtEmbedding.from_hetu(list(cores.values()), 110, (rank, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (2, 2, 2, 2)}, "1 to 3 integers"),
        ({"ranks": (2, 0)}, "1 to 3 integers"),
        ({"ranks": (2, 2), "id_shape": (10, 10)}, "3 integers"),
        ({"ranks": (2, 2), "id_shape": (4, 4, 4)}, "product of at least 100"),
        ({"ranks": (2, 2), "width_shape": (2, 2, 3)}, "product 16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TtEmbedding(100, 16, **options)


def test_the_planner_offers_trains_where_no_network_reads_the_vectors() -> None:
    schema = Schema([FeatureSpec("user", 5000, 16), FeatureSpec("item", 3000, 16)])
    plan = plan_for_budget(schema, "40KiB", methods=["tt"])
    assert [config.method for config in plan.configs.values()] == ["tt", "tt"]
    assert plan.footprint(schema).serve <= 40 << 10


@pytest.mark.parametrize(
    "shapes", [((2, 4), (5,)), ((1, 3, 5), (4, 17)), ((4, 4, 4), (16, 8)), ((2, 1, 3, 2), (3, 20, 1))]
)
def test_products_of_the_kernels_are_those_of_torch(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    head = TensorTrain(*shapes)
    columns = torch.randn(300, sum(prod(s) for s in head.shapes), generator=torch.Generator().manual_seed(0))
    exact = columns.double().requires_grad_(True)
    wanted = head.apply(exact, [])
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    wanted.backward(upstream.double())
    columns.requires_grad_(True)
    results = []
    before = torch.get_num_threads()
    for threads in (3, before):
        torch.set_num_threads(threads)
        out = run_natively(head, columns)
        if out is None:
            pytest.skip("needs the compiled kernels")
        (found,) = torch.autograd.grad(out, columns, upstream, create_graph=False)
        results.append((out, found))
    for name, got, right in zip(("out", "gradient"), results[0], (wanted, exact.grad), strict=True):
        scale = float(right.detach().abs().max())
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6 * scale, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "bits do not depend on threads"
    (once,) = torch.autograd.grad(run_natively(head, columns), columns, upstream, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), columns)
    again = columns.detach().double().requires_grad_(True)
    (of,) = torch.autograd.grad(head.apply(again, []), again, upstream.double(), create_graph=True)
    (right,) = torch.autograd.grad(of.square().sum(), again)
    torch.testing.assert_close(twice.double(), right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
