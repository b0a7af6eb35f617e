"""compress_: which tables a plan means, and tables that share weights."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.compress import compress_, materialize_
from recsys_embed.discover import find_tables
from recsys_embed.errors import ConfigError
from tests.compress.models import METHODS, Model, snapshot, uniform

# -- matching the plan ------------------------------------------------------------------------------------------------


def test_plan_and_tables_must_match_and_every_fault_is_told() -> None:
    model = Model()
    entry = rse.HashConfig(num_buckets=10)
    plan = {"usr": entry, "fields.0": entry, "fields/0": entry, "tower.0.item": rse.HashConfig(num_buckets=101)}
    before = snapshot(model)
    with pytest.raises(ConfigError) as caught:
        compress_(model, plan, counts={"nope": torch.ones(1), "fields/0": torch.ones(5)}, optimizer=[3])
    text = str(caught.value)
    for part in (
        "'usr', which is no table of the model; did you mean 'user'?",
        "table 'fields/0' twice",
        "table 'user' has no entry",
        "table 'fields/1' has no entry",
        "`counts` names 'nope'",
        "must be [300]",
        "`num_buckets` must be in [1, 100]; got 101",
        "`optimizer` must be torch optimizers; got int",
    ):
        assert part in text, part
    assert snapshot(model) == before
    with pytest.raises(ConfigError, match="matches no table"):
        compress_(model, {}, exclude="nope*")
    with pytest.raises(ConfigError, match="leave out"):
        compress_(model, uniform(model, "hash"), exclude="user")
    with pytest.raises(ConfigError, match="`init`"):
        compress_(model, {}, init="warm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`plan`"):
        compress_(model, "hash")  # type: ignore[arg-type]


def test_dotted_paths_patterns_and_what_is_left_out() -> None:
    model = Model()
    entry = rse.HashConfig(num_buckets=10)
    report = compress_(model, {"again": entry, "tower.0.item": entry}, include=["again", "tower.*"])
    assert [(t.name, t.action) for t in report.tables] == [
        ("user", "replaced"),
        ("fields/0", "skipped"),
        ("fields/1", "skipped"),
        ("tower/0/item", "replaced"),
    ]
    assert report["again"] is report["user"]
    assert "left out" in str(report)
    # What is compressed needs no entry to stay so.
    report = compress_(model, {"fields/0": entry, "fields/1": rse.FullConfig()})
    assert [t.method for t in report.tables] == ["hash", "hash", "full", "hash"]


class Doubled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Named(nn.Embedding):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.label = "x"


class Twice(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * self.table(input)


def test_subclasses_need_an_explicit_word() -> None:
    entry = rse.HashConfig(num_buckets=20)
    model = nn.ModuleDict({"plain": nn.Embedding(20, 4), "doubled": Doubled(20, 4), "named": Named(20, 4)})
    assert compress_(model, {"plain": entry}, dry_run=True)["doubled"].note.endswith("more than its base")
    plan = rse.Plan(dict.fromkeys(model, entry))
    with pytest.raises(ConfigError, match=r"name the class in `subclasses`"):
        compress_(model, plan)
    with pytest.raises(ConfigError, match="Doubled overrides forward"):
        compress_(model, plan, subclasses=[Doubled, Named])
    ids = torch.arange(20)
    lossless = rse.Plan(dict.fromkeys(model, rse.LowdimConfig(dim=4)))
    before = {k: m(ids).detach() for k, m in model.items()}
    compress_(model, lossless, subclasses={Doubled: lambda old, new: Twice(new), Named: None})
    for key, out in before.items():
        torch.testing.assert_close(model[key](ids), out, rtol=1e-4, atol=1e-5)
    assert model["named"].label == "x"
    assert type(model["doubled"]) is Twice
    again = nn.ModuleList([Doubled(20, 4)])
    with pytest.raises(ConfigError, match="must return a module"):
        compress_(again, {"0": entry}, subclasses={Doubled: lambda old, new: None})  # type: ignore[dict-item,return-value]
    assert type(again[0]) is Doubled


# -- tables that share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 0])
def test_tied_weights_stay_tied(padding: int | None) -> None:
    model = nn.Module()
    model.a, model.c = nn.Embedding(50, 4, padding_idx=padding), nn.Embedding(50, 4)
    model.b = nn.EmbeddingBag(50, 4, mode="sum", padding_idx=padding)
    model.b.weight = model.a.weight
    plan = rse.Plan.uniform(rse.Schema.from_model(model), "hash", num_buckets=11)
    assert len(plan) == 2
    report = compress_(model, plan)
    assert model.a.table("weight") is model.b.table("weight")
    assert len(list(model.parameters())) == 2
    assert [t.paths for t in find_tables(model)] == [("a", "b"), ("c",)]
    assert report.bytes_after == 2 * 11 * 4 * 4
    ids = torch.arange(1, 50)
    assert torch.equal(model.a(ids), model.b(ids.unsqueeze(1)))
    (model.a(ids).sum() + model.b(ids.unsqueeze(1)).sum()).backward()
    assert model.a.table("weight").grad is not None
    materialize_(model)
    assert model.a.weight is model.b.weight
    assert model.c.weight is not model.a.weight


@pytest.mark.parametrize("method", [m for m in METHODS if m == "unified"] + ["unified sum"])
def test_features_that_name_a_shared_table_store_it_once(method: str) -> None:
    torch.manual_seed(0)
    params: dict[str, Any] = {"combine": "sum"} if method.endswith("sum") else {}
    model = nn.ModuleDict({f"C{i}": nn.Embedding(rows, 8) for i, rows in enumerate((500, 300, 40, 700))})
    schema = rse.Schema.from_model(model)
    plan = rse.Plan.uniform(schema, "unified", budget="8KiB", full_below=100, **params)
    assert plan["C2"].method == "full"
    dry = compress_(model, plan, dry_run=True)
    dense = {k: m.weight.detach().clone() for k, m in model.items()}
    report = compress_(model, plan)
    assert report.bytes_after == plan.footprint(schema).serve == sum(p.nbytes for p in model.parameters())
    assert dry.bytes_after == report.bytes_after
    (shared,) = report.shared
    assert shared.readers == ("C0", "C1", "C3")
    assert "shared by 3" in str(report)
    assert model["C0"].table("unified") is model["C3"].table("unified")
    readers = [model[k] for k in shared.readers]
    table = readers[0].table("unified")
    # The joint fit comes near the least-squares optimum, found by torch from the matrix of the lookup.
    with torch.no_grad():
        reached = sum((m.weight - dense[k]).square().sum() for k, m in zip(shared.readers, readers, strict=True))
        kept = table.clone()
        table.copy_(torch.eye(len(table))[:, : table.shape[1]])
        columns = []
        for start in range(0, len(table), table.shape[1]):
            table.zero_()
            for j in range(min(table.shape[1], len(table) - start)):
                table[start + j, j] = 1.0
            columns.append(torch.cat([m.weight + 0 for m in readers]))
        table.copy_(kept)
    width = table.shape[1]
    target = torch.cat([dense[k] for k in shared.readers])
    blocks = target.shape[1] // width
    matrix = torch.cat([torch.cat([c[:, i * width : (i + 1) * width] for c in columns], 1) for i in range(blocks)])
    matrix = matrix[:, : len(table)].double()
    wanted = torch.cat(target.double().split(width, 1))
    best = wanted - matrix @ torch.linalg.lstsq(matrix, wanted, driver="gelsd").solution
    assert float(best.square().sum()) <= float(reached) * (1 + 1e-6)
    assert float(reached) < 1.01 * float(best.square().sum())
    alone = compress_(nn.ModuleDict({"C0": nn.Embedding(500, 8, _weight=dense["C0"].clone())}), {"C0": plan["C0"]})
    assert alone["C0"].relative_error < report["C0"].relative_error < 1, "sharers press on the rows"
    # All places lead to the one table whatever replaces parameters.
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert readers[0].table("unified") is readers[2].table("unified")
    twin = copy.deepcopy(model)
    assert twin["C0"].table("unified") is twin["C1"].table("unified")
    assert twin["C0"].table("unified") is not table
    twin.to("meta").to_empty(device="cpu")
    assert twin["C0"].table("unified") is twin["C1"].table("unified")
    assert sum(p.nbytes for p in twin.parameters()) == report.bytes_after


def test_sharing_across_dtypes_or_shapes_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(50, 8), "b": nn.Embedding(50, 8, dtype=torch.float64)})
    entry = rse.UnifiedConfig(num_buckets=10)
    with pytest.raises(ConfigError, match=r"'a' and 'b' cannot share table 'unified': dtype"):
        compress_(model, rse.Plan({"a": entry, "b": entry}))
    with pytest.raises(ConfigError, match="10 x 4 for 'a' and 12 x 4 for 'b'"):
        compress_(model, rse.Plan({"a": entry, "b": rse.UnifiedConfig(num_buckets=12)}))
    compress_(model, rse.Plan({"a": entry, "b": rse.UnifiedConfig(num_buckets=10, table="other")}))
