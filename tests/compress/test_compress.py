"""compress_: the tables of a model are replaced, and come back."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.compress import compress_, materialize_
from recsys_embed.discover import find_tables
from recsys_embed.embedding.plain_table import PlainView
from recsys_embed.errors import BudgetError, ConfigError
from tests.compress.models import CASES, METHODS, Model, snapshot, uniform


@pytest.mark.parametrize("init", ["dense", "fresh"])
@pytest.mark.parametrize("method", CASES)
def test_every_method_takes_the_place_of_every_table(method: str, init: Any) -> None:
    model = Model()
    plan = uniform(model, method)
    dry = compress_(model, plan, init=init, dry_run=True)
    before = snapshot(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        report = compress_(model, plan, init=init)
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1)), "the global random state is left alone"
    assert [t.name for t in report.tables] == ["user", "fields/0", "fields/1", "tower/0/item"]
    assert dry.dry_run
    assert [(t.bytes_after, t.method) for t in dry.tables] == [(t.bytes_after, t.method) for t in report.tables]
    assert report.bytes_before == 4 * 8 * 1000
    held = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("head"))
    index = sum(v.nbytes for k, v in model.state_dict().items() if ".index." in k)
    assert report.bytes_after <= held + index
    if method == "full":
        assert snapshot(model) == before
        assert all(t.action == "kept" for t in report.tables)
        return
    assert report.bytes_after <= 0.5 * report.bytes_before
    assert report.bytes_after == plan.footprint(rse.Schema.from_model(model)).serve
    assert model.again is model.user
    assert all(t.kind == "compressed" for t in find_tables(model))
    ids = torch.tensor([3, 7, 99])
    assert model(ids).shape == (3,)
    assert model.tower[0]["item"](ids)[0].eq(0).all(), "the padding id gives zeros"
    errors = [t.relative_error for t in report.replaced]
    if init == "dense":
        assert all(e is not None and 0 <= e <= 1.01 for e in errors)
        assert "error" in str(report)
    else:
        assert errors == [None] * len(errors)
    loss = model(ids).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_model_learns(method: str) -> None:
    torch.manual_seed(0)
    model = Model()
    compress_(model, uniform(model, method), init="fresh")
    ids = torch.arange(100)
    target = torch.sin(ids * 1.7)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(ids) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_hash_buckets_start_as_weighted_means_of_the_trained_rows() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(50, 4)})
    weight = model["a"].weight.detach().double()
    counts = torch.arange(50) % 7
    plan = rse.Plan({"a": rse.HashConfig(num_buckets=10)})
    report = compress_(model, plan, counts={"a": counts})
    rows = model["a"].program.row_lookups[0].transform.rows(torch.arange(50))
    got = torch.empty(50, 4, dtype=torch.float64)
    for bucket in rows.unique():
        at = rows == bucket
        c = counts[at].double()
        if c.sum() > 0:
            got[at] = (weight[at] * c[:, None]).sum(0) / c.sum()
    seen = counts > 0
    torch.testing.assert_close(model["a"].materialize().double()[seen], got[seen], rtol=1e-4, atol=1e-5)
    lost = ((weight - got).square().sum(1) * counts)[seen].sum() / (weight.square().sum(1) * counts).sum()
    assert report["a"].relative_error == pytest.approx(float(lost.sqrt()), rel=1e-4)


def test_tables_fitted_together_weigh_unknown_counts_as_the_mean_known_one() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(50, 4), "b": nn.Embedding(30, 4)})
    targets = torch.cat([model["a"].weight, model["b"].weight]).detach().double()
    counts = 100.0 * torch.arange(1, 51)
    plan = rse.Plan.uniform(rse.Schema.from_model(model), "unified", num_buckets=8, num_hashes=1, dim=4)
    compress_(model, plan, counts={"a": counts})
    rows = torch.cat(
        [model[n].program.row_lookups[0].transform.rows(torch.arange(k)) for n, k in (("a", 50), ("b", 30))]
    )
    importance = torch.cat([counts.double(), torch.full((30,), float(counts.mean()), dtype=torch.float64)])
    sums = torch.zeros(8, 4, dtype=torch.float64).index_add_(0, rows, targets * importance[:, None])
    means = sums / torch.zeros(8, dtype=torch.float64).index_add_(0, rows, importance)[:, None].clamp_min(1e-9)
    both = torch.cat([model["a"].materialize(), model["b"].materialize()]).double()
    torch.testing.assert_close(both, means[rows], rtol=1e-3, atol=1e-4)


def test_the_padding_row_is_no_part_of_the_error() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(40, 8, padding_idx=3)})
    with torch.no_grad():
        model["a"].weight[3] = 1e4
    report = compress_(model, rse.Plan({"a": rse.LowdimConfig(dim=8)}))
    assert report["a"].relative_error < 1e-5
    assert "padding row" in report["a"].note


@pytest.mark.parametrize("paddings", [(None, 0), (0, None), (0, 3), (0, 0)])
def test_modules_of_one_table_with_different_paddings_are_tied_again(paddings: tuple[Any, Any]) -> None:
    model = nn.ModuleDict({n: nn.Embedding(40, 8, padding_idx=p) for n, p in zip("ab", paddings, strict=True)})
    model["b"].weight = model["a"].weight
    compress_(model, {"a": rse.HashConfig(num_buckets=9)})
    ids = torch.arange(40)
    read = [module(ids).detach() for module in model.values()]
    report = materialize_(model)
    assert model["a"].weight is model["b"].weight
    assert ("pad with different ids" in report["a"].note) == (paddings[0] != paddings[1])
    # What either module read, zeros only where both did.
    wanted = torch.where(read[0] == 0, read[1], read[0])
    assert torch.equal(model["a"].weight.detach(), wanted)


def test_low_rank_tables_come_back_exactly() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(60, 8)})
    with torch.no_grad():
        model["a"].weight.copy_(torch.randn(60, 3) @ torch.randn(3, 8))
    weight = model["a"].weight.detach().clone()
    report = compress_(model, rse.Plan({"a": rse.LowdimConfig(dim=3)}))
    torch.testing.assert_close(model["a"].weight + 0, weight, rtol=1e-4, atol=1e-5)
    assert report["a"].relative_error < 1e-5
    materialize_(model)
    torch.testing.assert_close(model["a"].weight.detach(), weight, rtol=1e-4, atol=1e-5)


def test_fresh_rows_are_as_wide_as_those_they_replace() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5000, 8, padding_idx=0), "m": nn.Embedding(5000, 8, device="meta")})
    with torch.no_grad():
        model["a"].weight.normal_(0, 0.001)
        model["a"].weight[0] = 1000.0
    report = compress_(model, rse.Plan(dict.fromkeys("am", rse.HashConfig(num_buckets=2000))), init="fresh")
    assert abs(float(model["a"].materialize().std()) - 0.001) < 2e-4
    assert "padding row" in report["a"].note
    assert model["m"].table("weight").is_meta
    model["m"].to_empty(device="cpu").reset_parameters()
    assert abs(float(model["m"].materialize().std()) - 1) < 0.2


# -- the weight as others read it -------------------------------------------------------------------------------------


def test_weight_reads_as_the_plain_table_with_gradients_and_refuses_writes() -> None:
    model = nn.ModuleDict({"item": nn.Embedding(30, 4, padding_idx=0)})
    compress_(model, {"item": rse.HashConfig(num_buckets=7)})
    item: Any = model["item"]
    assert item.weight.shape == (30, 4)
    assert torch.equal(item.weight, item.materialize())
    scores = torch.ones(2, 4) @ item.weight.T
    assert type(scores) is torch.Tensor
    scores.sum().backward()
    everything = item(torch.arange(30))
    wanted = torch.autograd.grad(everything.sum() * 2, [item.table("weight")])[0]
    torch.testing.assert_close(item.table("weight").grad, wanted)
    assert item.state_dict()["stored_weight"].shape == (7, 4)
    writes: list[Any] = [
        lambda w: nn.init.xavier_uniform_(w),
        lambda w: w.data.copy_(torch.zeros(30, 4)),
        lambda w: w.data.zero_(),
        lambda w: w[1:].fill_(0),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.requires_grad_(False),
        lambda w: setattr(w, "requires_grad", False),
        lambda w: setattr(w, "data", torch.zeros(30, 4)),
        lambda w: w.detach().unbind(0)[3].add_(1),
        lambda w: w.register_hook(lambda g: g),
        lambda w: torch.add(torch.ones(30, 4), 1, out=w),
        lambda w: w.__imul__(2),
    ]
    for write in writes:
        with torch.no_grad(), pytest.raises(ConfigError, match="would change nothing"):
            write(item.weight)
    with pytest.raises(ConfigError, match="would change nothing"):
        item.weight = torch.zeros(30, 4)
    with pytest.raises(TypeError):
        nn.Linear(4, 30).weight = item.weight
    assert isinstance(item.weight, PlainView)
    assert repr(item.weight)
    copy.deepcopy(model)


# -- back -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CASES)
def test_materialize_undoes_all_but_the_values(method: str) -> None:
    model = Model()
    shape = repr(model)
    keys = [(k, v.shape) for k, v in model.state_dict().items()]
    made = compress_(model, uniform(model, method))
    ids = torch.tensor([3, 50, 99])
    out = model(ids)
    if method == "full":
        with pytest.raises(ConfigError, match="no compressed table"):
            materialize_(model)
        return
    compressed = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in model.head.parameters())
    assert made.bytes_held >= compressed
    report = materialize_(model)
    assert repr(model) == shape
    assert [(k, v.shape) for k, v in model.state_dict().items()] == keys
    assert model.again is model.user
    torch.testing.assert_close(model(ids), out, rtol=1e-5, atol=1e-6)
    assert report.bytes_after == 4 * 8 * 1000
    assert report.bytes_before == made.bytes_after


def test_from_one_method_to_another() -> None:
    model = Model()
    compress_(model, uniform(model, "hash", 0.5))
    ids = torch.arange(100)
    report = compress_(model, uniform(model, "lowdim", 0.3))
    assert {t.kind for t in report.tables} == {"compressed"}
    assert {type(t.module) for t in find_tables(model)} == {rse.LowdimEmbedding}
    report = compress_(model, rse.Plan.full(rse.Schema.from_model(model)))
    assert all(t.action == "replaced" and t.method == "full" for t in report.tables)
    assert isinstance(model.user, nn.Embedding)
    assert model(ids).shape == (100,)


def test_budget_errors_come_from_the_plan() -> None:
    with pytest.raises(BudgetError):
        uniform(Model(), "hash", share=1e-4)
