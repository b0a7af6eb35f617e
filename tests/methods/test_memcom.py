"""memcom: what the paper says (Pansare et al., MLSys 2022), its accounting, and the optimum of its fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recsys_embed import EmbeddingCollection, FeatureSpec, HashEmbedding, MemcomConfig, MemcomEmbedding, Plan, Schema
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.methods import memcom
from recsys_embed.optim import SGD

OPTIONS: list[dict[str, Any]] = [{"hash": h, "bias": b} for h in ("mod", "splitmix64") for b in (False, True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def buckets(emb: MemcomEmbedding) -> list[int]:
    """The shared row of each id: by definition for 'mod', as the hash method has it otherwise."""
    m = emb.weight.shape[0]
    if emb.config.to_dict()["hash"] == "mod":
        return [i % m for i in range(emb.num_embeddings)]
    twin = HashEmbedding(emb.num_embeddings, 1, num_buckets=m, dtype=torch.float64)
    twin.weight.data.copy_(torch.arange(m).unsqueeze(1))
    return [int(x) for x in twin.materialize().squeeze(1)]


def randomised(rows: int = 40, width: int = 5, **options: Any) -> MemcomEmbedding:
    emb = MemcomEmbedding(rows, width, num_buckets=7, dtype=torch.float64, **options)
    for p in emb.parameters():
        p.data.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator(p.numel())))
    return emb


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_starts_from_hashing(options: dict[str, Any]) -> None:
    hashed = HashEmbedding(100, 8, num_buckets=9, seed=0, hash=options["hash"])
    assert torch.equal(MemcomEmbedding(100, 8, num_buckets=9, seed=0, **options).materialize(), hashed.materialize())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vectors_are_rows_times_scalars(options: dict[str, Any]) -> None:
    emb = randomised(**options)
    row = buckets(emb)
    for i in range(40):
        expected = emb.weight[row[i]] * emb.scale[i] + (emb.bias[i] if options["bias"] else 0.0)
        torch.testing.assert_close(emb(torch.tensor(i)), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_the_product(options: dict[str, Any]) -> None:
    emb = randomised(**options)
    row = buckets(emb)
    ids, g = torch.tensor([3, 39, 3, 10]), torch.randn(4, 5, dtype=torch.float64, generator=generator())
    emb(ids).backward(g)
    rows, scales, biases = (torch.zeros(s, dtype=torch.float64) for s in ((7, 5), (40, 1), (40, 1)))
    for j, i in enumerate(ids.tolist()):
        rows[row[i]] += g[j] * emb.scale.detach()[i]
        scales[i] += (g[j] * emb.weight.detach()[row[i]]).sum()
        biases[i] += g[j].sum()
    torch.testing.assert_close(emb.weight.grad, rows)
    torch.testing.assert_close(emb.scale.grad, scales)
    if options["bias"]:
        torch.testing.assert_close(emb.bias.grad, biases)


@given(n=st.integers(1, 10_000), width=st.integers(1, 64), data=st.data(), bias=st.booleans())
def test_parameters_are_rows_and_one_or_two_scalars_per_id(n: int, width: int, data: st.DataObject, bias: bool) -> None:
    m = data.draw(st.integers(1, n))
    footprint = MemcomConfig(num_buckets=m, bias=bias).footprint(FeatureSpec("C1", n, width))
    assert footprint.serve == 4 * (m * width + n * (2 if bias else 1))


@given(n=st.integers(1, 3000), width=st.integers(1, 40), budget=st.integers(1, 600_000), bias=st.booleans())
def test_budgets_are_filled_to_the_last_row(n: int, width: int, budget: int, bias: bool) -> None:
    spec, scalars = FeatureSpec("C1", n, width), 4 * n * (2 if bias else 1)
    if budget < scalars + 4 * width:
        with pytest.raises(BudgetError, match="a method without a cost per id"):
            MemcomConfig.for_budget(spec, budget, bias=bias)
        return
    config = MemcomConfig.for_budget(spec, budget, bias=bias)
    assert config.num_buckets == min(n, (budget - scalars) // (4 * width))
    assert config.bias == bias


def test_the_most_frequent_ids_have_rows_of_their_own_under_mod() -> None:
    emb = MemcomEmbedding(1000, 4, num_buckets=100)
    rows = emb.program.row_lookups[0].transform.rows(torch.arange(100))
    assert sorted(rows.tolist()) == list(range(100))


def test_ids_of_one_row_learn_to_differ() -> None:
    """Ids 1 and 8 share a row but have opposite labels, which hashing cannot tell apart."""
    emb = MemcomEmbedding(14, 4, num_buckets=7)
    optimizer = torch.optim.SGD(emb.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (emb(torch.tensor([1, 8])).sum(1) - torch.tensor([1.0, -1.0])).square().sum().backward()
        optimizer.step()
    assert emb(torch.tensor([1])).sum() > 0.9
    assert emb(torch.tensor([8])).sum() < -0.9


def optimum(target: Tensor, row: list[int], importance: Tensor, bias: bool) -> float:
    """Least weighted squared error: beside the leading singular value of each bucket, without the means over columns.

    With a bias the row can be taken orthogonal to it, which leaves a problem of rank one.
    """
    if bias:
        target = target - target.mean(1, keepdim=True)
    scaled, error = target * importance.sqrt().unsqueeze(1), 0.0
    for b in set(row):
        members = [i for i in range(len(row)) if row[i] == b]
        error += float(torch.linalg.svdvals(scaled[members])[1:].square().sum())
    return error


@pytest.mark.parametrize("at_once", [1, 200, 1 << 22])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fit_reaches_the_optimum(options: dict[str, Any], weighted: bool, at_once: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(memcom, "_AT_ONCE", at_once)
    target = torch.randn(60, 5, dtype=torch.float64, generator=generator())
    counts = torch.randint(1, 50, (60,), generator=generator(1)).double() ** 2 if weighted else None
    emb = MemcomEmbedding.from_dense(target, num_buckets=7, counts=counts, **options)
    importance = torch.ones(60, dtype=torch.float64) if counts is None else counts
    error = ((emb.materialize() - target).square().sum(1) * importance).sum()
    assert error.item() == pytest.approx(optimum(target, buckets(emb), importance, options["bias"]), rel=1e-9)


def test_fitted_scalars_keep_the_size_they_start_with() -> None:
    target = torch.randn(60, 5, dtype=torch.float64, generator=generator())
    counts = torch.randint(1, 50, (60,), generator=generator(1)).double()
    emb = MemcomEmbedding.from_dense(target, num_buckets=7, counts=counts)
    for b in range(7):
        v, c = emb.scale[b::7, 0], counts[b::7]
        torch.testing.assert_close((c * v.square()).sum() / c.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert (c * v).sum() >= 0


def test_fit_without_counts_of_some_ids() -> None:
    target = torch.randn(60, 5, dtype=torch.float64, generator=generator())
    counts = torch.ones(60)
    counts[3::7] = 0  # a whole bucket
    counts[4:30:7] = 0  # half of one
    start = MemcomEmbedding(60, 5, num_buckets=7, seed=0, dtype=torch.float64)
    emb = MemcomEmbedding.from_dense(target, num_buckets=7, counts=counts)
    assert torch.equal(emb.weight[3], start.weight[3]), "no counted id reads the row"
    assert not torch.equal(emb.weight[4], start.weight[4])
    # Uncounted ids still take their best multiple of the row.
    residual = target - emb.materialize()
    torch.testing.assert_close((residual * emb.weight[torch.arange(60) % 7]).sum(1), torch.zeros(60).double())
    assert emb.materialize().isfinite().all()


def test_fit_leaves_padding_out() -> None:
    target = torch.randn(60, 5, dtype=torch.float64, generator=generator())
    target[5] *= 1000
    emb = MemcomEmbedding.from_dense(target, num_buckets=7, padding_idx=5)
    importance = (torch.arange(60) != 5).double()
    error = ((emb.materialize() - target).square().sum(1) * importance).sum()
    assert error.item() == pytest.approx(optimum(target, buckets(emb), importance, False), rel=1e-9)


def test_zero_tables_and_zero_rows_are_no_trouble() -> None:
    emb = MemcomEmbedding.from_dense(torch.zeros(20, 3), num_buckets=4, bias=True)
    assert not emb.materialize().any()
    counts = (torch.arange(20) % 4 != 1).float()
    emb = MemcomEmbedding.from_dense(torch.randn(20, 3), counts=counts, num_buckets=4, init="normal:0")
    assert not emb.materialize()[1::4].any(), "rows that no counted id reads keep their values, here 0"
    assert emb.materialize()[2::4].any(1).all()


def test_one_fused_step_moves_the_rows_and_scalars_of_the_ids_alone() -> None:
    schema = Schema([FeatureSpec("a", 20, 4), FeatureSpec("b", 30, 4)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "memcom", num_buckets=6, bias=True), optimizer=SGD(lr=0.1))
    before = {key: coll.table(key).detach().clone() for key in coll.tables}
    coll(torch.tensor([[13, 7]])).sum().backward()
    moved = {key: (coll.table(key) != before[key]).any(1).nonzero().flatten().tolist() for key in coll.tables}
    assert moved == {"a.weight": [1], "a.scale": [13], "a.bias": [13], "b.weight": [1], "b.scale": [7], "b.bias": [7]}


def test_the_id_of_unseen_ones_has_scalars_too() -> None:
    spec = FeatureSpec("C1", 10, 4, unseen="oov")
    assert [t.rows for t in MemcomConfig(num_buckets=3, bias=True).program(spec).tables] == [3, 11, 11]


def test_faults_come_together() -> None:
    with pytest.raises(ConfigError, match=r"2 faults in MemcomConfig, feature 'C1'") as error:
        MemcomConfig(num_buckets=11).program(FeatureSpec("C1", 10, 4, ids="raw"))
    assert "`num_buckets` must be in [1, 10]; got 11" in str(error.value)
    with pytest.raises(ConfigError, match="`hash` must be one of mod, splitmix64"):
        MemcomConfig.from_params({"num_buckets": 1, "hash": "md5"})
